"""Scratch or prune: published cases get the published answers, each with its row; what nobody measured gets none."""

import dataclasses
import json

import pytest
from pipeline import cli
from test_study_results import folder, line

from prunus.errors import UserError
from prunus.study import advise as advice
from prunus.study.advise import Asked, Row, advise, published
from prunus.study.results import Run

B = 1e9


def answered(*arguments, rows=None, **options):
    return advise(Asked(*arguments, rate=1e15, **options), published() if rows is None else rows)


def test_fifty_billion_tokens_and_a_released_parent_prune():
    """Finding 1 of the comparison study: every method is ahead of fresh weights on the same 50 B tokens."""
    said = answered(8 * B, 4.5 * B, 50 * B, False)
    assert said["answer"] == "prune" and said["range"][0] > 0.1
    assert {"T13-minitron-width-4.5B-Meta-R50", "T12-minitron-depth-4.5B-Meta-R50"} <= set(said["rows"])
    assert len(said["reasons"]) == 3 and "costs nothing" in said["reasons"][0]
    assert said["cost"]["flops"] == 6 * 4.5 * B * 50 * B and said["cost"]["hours"] == pytest.approx(
        6 * 4.5e9 * 50e9 / 1e15 / 3600
    )


def test_all_tokens_and_no_parent_by_depth_is_scratch():
    """Finding 2: on 250 B tokens in all, depth loses 0.05 nats to fresh weights of its own shape, 0.09 to the best of that size."""
    said = answered(8 * B, 4.5 * B, 250 * B, True, granularity="depth")
    assert said["answer"] == "scratch" and said["rows"] == ["T16-minitron-depth-4.5B-P200-R50"]
    assert said["expected"]["minitron-depth"] == pytest.approx(2.45 - 2.54)
    assert "IDEA-Prune" in said["alternative"] and advice.sources()["idea-prune"]["says"] in said["alternative"]


def test_no_structured_method_pays_for_a_parent_of_its_own():
    said = answered(8 * B, 4.5 * B, 250 * B, True)
    assert said["answer"] == "scratch" and set(said["expected"]) == {
        "minitron-depth",
        "minitron-width",
        "flap",
        "sheared-llama",
    }
    assert max(said["expected"].values()) == pytest.approx(-0.02)


def test_what_is_left_of_the_parent_matters():
    """Table 11: by depth nothing is gained at 81 % removed."""
    said = answered(8 * B, 1.5 * B, 50 * B, False, granularity="depth")
    assert said["answer"] == "scratch" and "no more than 0.02" in said["reasons"][2]
    assert answered(8 * B, 1.5 * B, 50 * B, False, granularity="width")["answer"] == "prune"


def test_it_does_not_guess():
    said = answered(135e6, 100e6, 1e6, False)
    assert said["answer"] == "unknown" and said["method"] is None and not said["rows"]
    assert "No row is near 100 M parameters" in said["reasons"][0] and "The nearest is T1" in said["reasons"][1]
    assert answered(8 * B, 4.5 * B, 250 * B, True, rows=[])["reasons"][1] == "The nearest is none at all."


def test_published_rows_are_the_paper_s():
    """Table 16: what P200-R50 lost and won against S250; table 12: the first row."""
    by = {row.id: row for row in published()}
    total = {row.method: round(row.advantage, 2) for row in published() if row.protocol == "total"}
    assert total == {
        "minitron-depth": -0.05, "minitron-width": -0.01, "flap": 0.04, "sheared-llama": -0.03, "wanda-2:4": -0.04, "wanda": 0.02,
        "sparsegpt-2:4": -0.03, "sparsegpt": 0.01,
    }  # fmt: skip
    one = by["T12-minitron-depth-4.5B-Meta-R10"]
    assert (one.protocol, one.granularity, one.params, one.tokens) == ("training", "depth", 4.5e9, 10e9)
    assert one.advantage == pytest.approx(3.09 - 2.69) and one.kept == pytest.approx(4.5 / 8)
    assert len(by) == len(published())


def test_what_is_said_of_the_rows_is_in_them():
    """Less is gained the more tokens there are, of every method; by depth, the more is removed."""
    by = {row.id: row.advantage for row in published()}
    for table, method, size in (
        ("T12", "minitron-depth", 4.5),
        ("T13", "minitron-width", 4.5),
        ("T14", "flap", 4.5),
        ("T15", "sheared-llama", 4.6),
    ):
        for parent in ("P200", "Meta"):
            first, _, _, fourth, last = (by[f"{table}-{method}-{size}B-{parent}-R{n}"] for n in (10, 30, 50, 250, 500))
            assert first > fourth and first > last
    depth = [by[f"T11-minitron-depth-{size}B-P200-R50"] for size in (4.5, 2.8, 1.9, 1.5)]
    assert depth == sorted(depth, reverse=True) and depth[-1] == 0


def test_the_nearer_row_counts_more():
    near, far = (
        Row(name, "training", "flap", 1e9, 0.5, tokens, gain)
        for name, tokens, gain in (("a", 1e10, 0.4), ("b", 3.9e10, 0.0))
    )
    said = answered(2e9, 1e9, 1e10, False, rows=[near, far])["expected"]["flap"]
    assert 0.35 < said < 0.4
    turned = answered(2e9, 1e9, 3.9e10, False, rows=[near, far])["expected"]["flap"]
    assert 0 < turned < 0.05
    outside = dataclasses.replace(far, tokens=4.1e10)
    assert answered(2e9, 1e9, 1e10, False, rows=[outside])["answer"] == "unknown"


PRUNED = {"P": {"recipe": "scratch"}, "P-R": {"from": "P", "cut": {"method": "flap"}}, "S": {"shape_of": "P-R"}}


def own_study(tmp_path, sizes, arms, *, compare=("P-R", "S"), cut=None):
    """A folder of runs of these sizes: one is 0.3 nats ahead of fresh weights."""
    lines = [line(arm, 0, 3.3 if arm == "S" else 3.0, tokens=10_000, name=arm) for arm in sizes]
    for one in lines:
        one["place"], one["figures"]["params"] = {}, sizes[one["arm"]]
        one |= cut or {}
    tmp_path.mkdir(exist_ok=True)
    return with_arms(folder(tmp_path, lines, compare=[{"protocol": "training-tokens", "arms": list(compare)}]), arms)


def with_arms(out, arms):
    """A study's folder whose file has these arms."""
    told = json.loads((out / "study.json").read_text())
    told["file"]["arms"] = arms
    (out / "study.json").write_text(json.dumps(told))
    return out


def test_what_is_left_is_of_the_arm_s_own_parent(tmp_path):
    """Not of the largest model in the study; and where another arm made the cut, of what that one took."""
    sizes = {"big": 8000, "P": 2000, "P-R": 1000, "S": 1000}
    found, silent = advice.own([own_study(tmp_path / "direct", sizes, PRUNED | {"big": {"recipe": "scratch"}})])
    assert [(row.kept, row.method) for row in found] == [(0.5, "flap")] and not silent
    behind = {"C": {"from": "P", "cut": {"method": "sleb"}}, "P-R": {"from": "C"}}
    (row,), _ = advice.own([own_study(tmp_path / "behind", sizes | {"C": 1000}, PRUNED | behind)])
    assert (row.kept, row.method) == (0.5, "sleb")


def test_a_released_parent_has_its_size_from_the_record_of_the_cut(tmp_path):
    arms = PRUNED | {"P-R": {"model": "SmolLM2-135M", "cut": {"method": "flap"}}}
    sizes = {"P-R": 1000, "S": 1000}
    (row,), silent = advice.own([own_study(tmp_path / "told", sizes, arms, cut={"uncut": 4000})])
    assert row.kept == 0.25 and not silent
    out = own_study(tmp_path / "untold", sizes, arms)
    assert advice.own([out]) == (
        [], {str(out): "P-R - S: the records do not say what size P-R was cut from; gather the study again"}
    )  # fmt: skip


def test_either_arm_may_be_named_first(tmp_path):
    sizes = {"P": 2000, "P-R": 1000, "S": 1000}
    found = [
        advice.own([own_study(tmp_path / "-".join(arms), sizes, PRUNED, compare=arms)])[0]
        for arms in (("P-R", "S"), ("S", "P-R"))
    ]
    assert [(row.advantage, row.kept, row.params) for (row,) in found] == [(pytest.approx(0.3), 0.5, 1000)] * 2


@pytest.mark.parametrize(
    ("sizes", "arms", "compare", "why"),
    [
        ({}, {}, ("S", "P"), "S - P: both begin with fresh weights"),
        ({}, {"S": {"from": "P"}}, ("P-R", "S"), "P-R - S: neither begins with fresh weights"),
        ({}, {"P-R": {"from": "P", "recipe": "adapt-pruner"}}, ("P-R", "S"), "P-R - S: P-R goes on from no cut"),
        ({"P-R": 2000}, {}, ("P-R", "S"), "P-R has no fewer parameters than what it was cut from, since zeros are counted"),
        ({}, {}, ("P-R", "T"), "no two arms that have a validation loss are compared on training-tokens or total-tokens"),
    ],
)
def test_studies_that_say_nothing_say_why(sizes, arms, compare, why, tmp_path):
    out = own_study(tmp_path, {"P": 2000, "P-R": 1000, "S": 1000} | sizes, PRUNED | arms, compare=compare)
    found, silent = advice.own([out])
    assert not found and silent[str(out)].endswith(why)
    words = ("--parent-params", "8B", "--target-params", "4.5B", "--tokens", "50B", "--rate", "1e15", "--study", out)
    assert json.loads(cli("advise", *words, "--json")[1])["silent"] == silent
    assert f"no row of {out}: {silent[str(out)]}" in " ".join(cli("advise", *words)[1].split())


def test_arms_that_go_on_from_no_arm_are_refused_in_a_sentence(tmp_path):
    out = own_study(tmp_path, {"P-R": 1000, "S": 1000}, {"P-R": {"from": ["P"]}, "S": {}})
    with pytest.raises(UserError, match=r"its records cannot be read .*arms\.P-R\.from"):
        advice.own([out])
    out = with_arms(out, {"P-R": {"from": "Q"}, "Q": {"from": "P-R"}, "S": {}})
    assert "P-R goes on from no cut" in advice.own([out])[1][str(out)]


@pytest.mark.parametrize(
    ("method", "cuts"),
    [
        ("sparsegpt-4:8", "sparse"), ("wanda-2:4", "sparse"), ("minitron-depth+wanda", "sparse"), ("shortgpt+wanda-4:8", "sparse"),
        ("shortgpt+flap", "depth and width"), ("flap+minitron-width", "width"), ("shortgpt", "depth"), ("flap", "width"),
    ],
)  # fmt: skip
def test_what_methods_cut(method, cuts):
    assert advice.granularity_of(method) == cuts


def test_a_study_of_one_s_own_speaks(tmp_path):
    """Its arms at equal training tokens, where nothing that was published is near."""
    lines = []
    for arm, loss in (("P-R", 3.0), ("S", 3.3)):
        for seed in (0, 1):
            one = line(arm, seed, loss, tokens=10_000)
            one["place"]["cut.method"] = "flap"
            one["figures"]["params"] = 1000
            lines.append(one)
    parent = line("P", 0, 2.9, tokens=40_000)
    parent["place"], parent["figures"]["params"] = {}, 2000
    out = with_arms(folder(tmp_path, [*lines, parent]), PRUNED)
    (row,), _ = advice.own([out])
    assert (row.protocol, row.method, row.params, row.kept, row.tokens) == ("training", "flap", 1000, 0.5, 10_000)
    assert row.advantage == pytest.approx(0.3)
    words = ("--parent-params", "2000", "--target-params", "1000", "--tokens", "10k", "--rate", "1e9")
    code, said, err = cli("advise", *words, "--json")
    assert code == 0 and json.loads(said)["answer"] == "unknown", err
    code, said, err = cli("advise", *words, "--study", out, "--json")
    told = json.loads(said)
    assert code == 0 and told["answer"] == "prune" and told["rows"] == [row.id], err
    code, said, _ = cli("advise", *words, "--study", out)
    assert code == 0 and "prune, by flap, and retrain" in said and "rows: half:" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--parent-params", "1B", "--target-params", "2B", "--tokens", "1B"), "2 G is not below the parent's 1 G"),
        (("--target-params", "2B", "--tokens", "1B"), "give the parent as SOURCE, or its size"),
        (("--parent-params", "8B", "--target-params", "2B", "--tokens", "0"), "0 are none"),
        (("--parent-params", "8B", "--target-params", "2B", "--tokens", "1X"), "'1X' is no number"),
        (
            ("--parent-params", "8B", "--target-params", "2B", "--tokens", "1B", "--granularity", "dept"),
            "did you mean 'depth'",
        ),
        (("--parent-params", "8B", "--target-params", "2B", "--tokens", "1B", "--device", "tpu"), "unknown device 'tpu'"),
        *(
            (
                ("--parent-params", "8B", "--target-params", "4.5B", "--tokens", "50B", "--rate", rate),
                f"rate: {rate} is not above 0 and finite; give the FLOPs a second that training reaches, or leave it out",
            )
            for rate in ("0", "-1", "nan", "inf")
        ),
        (("nowhere", "--target-params", "2B", "--tokens", "1B"), "nowhere: no such file or folder"),
    ],
)
def test_questions_that_cannot_be_asked(words, message):
    code, _, err = cli("advise", *words)
    assert code == 2 and message in err


def test_hours_of_a_gpu_need_a_rate():
    code, said, err = cli(
        "advise", "--parent-params", "8B", "--target-params", "4B", "--tokens", "50B", "--device", "gpu", "--json"
    )
    assert code == 0 and json.loads(said)["cost"]["hours"] is None, err


def test_cuts_of_a_study_go_by_their_methods(tmp_path):
    """Whether the grid, a name, the arm or the whole study says them; what was not cut before it trained has none."""
    file = {
        "cut": {"method": "flap"},
        "cuts": {"thin": {"method": "minitron-width"}, "holes": {"method": "wanda", "pattern": "2:4"}},
        "arms": {"A": {"cut": {}}, "B": {"cut": {"method": "shortgpt"}}, "C": {}},
    }

    def method(arm, **place):
        one = line(arm, 0, 3.0) | {"place": {name.replace("__", "."): value for name, value in place.items()}}
        return advice._method_of(Run.of(one), file)

    assert [method("A"), method("B"), method("C")] == ["flap", "shortgpt", None]
    assert [method("A", cut="thin"), method("A", cut="holes")] == ["minitron-width", "wanda-2:4"]
    assert [advice._is_fresh(arm, {"arms": {"S": {"shape_of": "R"}, "R": {"from": "P", "cut": {}}}}) for arm in "SR"] == [
        True,
        False,
    ]
    assert method("B", cut__method="sleb") == "sleb" == method("unknown", cut__method="sleb")
