"""The ledger counts every token once, says what two runs share, and refuses to guess."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import cli
from prepared import made, texts

from prunus.data.order import Domain, Stream
from prunus.data.shards import Shards
from prunus.errors import UserError
from prunus.ledger import Data, Intervals, Ledger, Stage, compare

SPLITS = {"validation": 0.1, "parent": 0.4, "retrain": 0.5}


def data(which="retrain", manifest="m1", sources=("s1",), splits=SPLITS):
    return Data(manifest=manifest, range=which, splits=splits, sources=list(sources))


def stage(*spans, name="train", of=None, **fields):
    made_stage = Stage(name=name, data={"a": of or data()}, **fields)
    made_stage.consume([("a", *span) for span in spans])
    return made_stage


# -- intervals ----------------------------------------------------------------------------------------------------------

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda s: (s[0], s[0] + s[1])), max_size=15)


def numbers(listed):
    return {i for a, b in listed for i in range(a, b)}


@settings(max_examples=200, deadline=None)
@given(spans, spans)
def test_intervals_are_sets(x, y):
    a, b = Intervals(x), Intervals(y)
    assert a.size == len(numbers(x)) and numbers(a.spans) == numbers(x)
    assert all(p[1] < q[0] for p, q in zip(a.spans, a.spans[1:], strict=False))  # merged where they touch
    assert a.shared(b) == len(numbers(x) & numbers(y)) and (a | b).size == len(numbers(x) | numbers(y))
    assert (a == b) == (numbers(x) == numbers(y))
    assert Intervals.of(json.loads(json.dumps(a.to_json()))) == a


def test_many_intervals_are_packed():
    """10,000 of 20,000 sequences in shuffled order: about a byte each, where plain JSON takes 18."""
    import random

    chosen = random.Random(0).sample(range(20_000), 10_000)
    many = Intervals((i * 512, i * 512 + 512) for i in chosen)
    packed = json.dumps(many.to_json())
    assert Intervals.of(json.loads(packed)) == many and many.size == 10_000 * 512
    assert len(packed) < 6_000 and len(json.dumps(many.spans)) > 60_000


def test_intervals_grow_in_small_steps():
    grown = Intervals()
    for i in range(5000):
        grown.add(i * 3, i * 3 + 3)
    assert grown.spans == [(0, 15000)]


def test_few_intervals_are_listed():
    for count, kind in ((32, list), (33, dict)):
        some = Intervals((i * 6, i * 6 + 4) for i in range(count))
        assert type(some.to_json()) is kind and Intervals.of(some.to_json()) == some
    assert some.to_json()["unit"] == 2  # which all of 0, 4, 6, 10 ... are multiples of
    assert Intervals.of([]).size == 0 and Intervals.of([]).to_json() == [] and Intervals.of([[0, 2]]).spans == [(0, 2)]
    assert Intervals.of(some) is some
    with pytest.raises(ValueError, match="base64"):  # a spoilt letter is not passed over
        Intervals.of(some.to_json() | {"packed": f"!{some.to_json()['packed']}"})


@pytest.mark.parametrize(
    "text",
    [
        [[5, 3]],
        [[3, 3]],
        [[0, 4], [4, 8]],
        {"unit": 1},
        {"unit": "1", "packed": ""},
        {"unit": 1, "packed": 3},
        [[0, 4], [2, 6]],
        [[-1, 2]],
        [[1, 2, 3]],
        {"unit": 0, "packed": ""},
        {"unit": 1, "packed": "!!"},
        "x",
    ],
)
def test_no_intervals(text):
    with pytest.raises(ValueError):  # noqa: PT011  # pydantic turns any of them into one sentence
        Intervals.of(text)
    with pytest.raises(ValueError, match="interval"):
        Intervals([(3, 3)])


# -- ledgers ------------------------------------------------------------------------------------------------------------


def family():
    """A parent of two stages, and a run that went on from it."""
    parent = Ledger(stages=[stage((0, 100), name="warm"), stage((100, 400), name="parent", params=1000)])
    parent.stages[1].spend("train", 5_000)
    run = Ledger(stages=[stage((400, 500), name="retrain", params=600)], parent=parent)
    run.stages[0].spend("train", 700)
    run.stages[0].spend("teacher", 300)
    run.stages[0].spend("train", 1)
    return parent, run


def test_totals_include_the_parent():
    parent, run = family()
    assert (run.tokens, run.total_tokens, parent.total_tokens) == (100, 500, 400)
    assert (run.flops, run.total_flops) == (1001, 6001) and run.stages[0].flops == {"train": 701, "teacher": 300}
    assert [s["name"] for s in run.summary()["stages"]] == ["warm", "parent", "retrain"]
    assert [s["parent"] for s in run.summary()["stages"]] == [True, True, False]


def test_a_summary_is_counts_alone():
    parent, run = family()
    parent.unrecorded, run.stages[0].teacher_cache = "a model", "cache"
    run.stages[0].consume([("a", 400, 450)])
    warm, before, own = run.summary()["stages"]
    assert {k: v for k, v in run.summary().items() if k != "stages"} == {
        "tokens": 150, "flops": 1001, "total_tokens": 550, "total_flops": 6001, "unrecorded": ["a model"],
    }  # fmt: skip
    assert own == {
        "name": "retrain", "parent": False, "params": 600, "tokens": 150, "unique_tokens": 100,
        "flops": {"train": 701, "teacher": 300}, "teacher_cache": "cache", "data": ["m1:retrain"],
    }  # fmt: skip
    assert (before["params"], before["flops"], warm["params"], warm["flops"]) == (1000, {"train": 5000}, None, {})


def test_only_what_was_done_alike_has_the_same_order():
    same = {"seed": 0, "seq_len": 10, "positions": (0, 10), "history": [(0, {"a": 1.0})]}
    one = Ledger(stages=[Stage(name="cut"), stage((0, 100), **same)])  # what reads no data has no order
    assert compare(one, Ledger(stages=[stage((0, 100), **same)])).same_order
    others = {"seed": 1, "seeds": {"parent": 1}, "seq_len": 20, "positions": (0, 20), "history": [(0, {"a": 0.5})]}
    for name, value in others.items():
        found = compare(one, Ledger(stages=[stage((0, 100), **same | {name: value})]))
        assert found.verdict == "same" and not found.same_order, name
    renamed = Stage(name="train", data={"b": data()}, **same)
    renamed.consume([("b", 0, 100)])
    assert not compare(one, Ledger(stages=[renamed])).same_order
    assert not compare(Ledger(stages=[stage((0, 5))]), Ledger(stages=[stage((5, 10))])).same_order  # disjoint


def test_stages_in_the_order_of_their_runs():
    parent, run = family()
    assert [s.name for s in run.all_stages()] == ["warm", "parent", "retrain"]
    assert [s.name for s in run.all_stages(parents=False)] == ["retrain"] and list(run.lineage()) == [run, parent]


def test_repeated_tokens_count_but_are_not_different():
    twice = stage((0, 10), (10, 20), (0, 10))
    assert (twice.tokens, twice.unique_tokens) == (30, 20)


def test_calibration_text_counts():
    calibrated = Stage(name="prune")
    calibrated.consume_text("c4", 4096)
    calibrated.consume_text("c4", 4096)
    assert (calibrated.tokens, calibrated.unique_tokens, calibrated.other_text) == (8192, 4096, {"c4": 4096})


def test_calibration_text_is_the_same_or_another_as_a_whole():
    def cut(text):
        made = Stage(name="flap")
        made.consume_text(text, 64)
        return Ledger(stages=[made])

    same, other = compare(cut("c4"), cut("c4")), compare(cut("c4"), cut("wiki"))
    assert (same.verdict, same.shared, same.notes) == ("same", 64, [])
    assert (other.verdict, other.only_a, other.only_b) == ("disjoint", 64, 64) and "as a whole" in other.notes[0]


def test_what_stands_before(tmp_path):
    run = tmp_path / "run"
    assert Ledger.after(run / "model", "a model", []).missing == ["a model"]
    (run / "model").mkdir(parents=True)
    Ledger(stages=[stage((0, 10))]).write(run / "ledger.json")
    assert Ledger.after(run / "model", "a model", []).total_tokens == 10
    Ledger(stages=[stage((0, 30))]).write(run / "model" / "ledger.json")
    after = Ledger.after(run / "model", "a model", [stage((0, 5))])
    assert (after.total_tokens, after.missing) == (35, [])
    Ledger.check(run / "model"), Ledger.check(tmp_path / "not" / "there")
    (run / "model" / "ledger.json").write_text("{")
    with pytest.raises(UserError, match=r"model/ledger.json: not readable as JSON"):
        Ledger.check(run / "model")


def test_a_domain_that_is_not_the_stage_s():
    with pytest.raises(ValueError, match="domain 'b' is not among the stage's data"):
        stage().consume([("b", 0, 1)])


def test_there_and_back(tmp_path):
    _, run = family()
    run.stages[0].consume([("a", 1000 + 30 * i, 1010 + 30 * i) for i in range(100)])
    run.parent.unrecorded = "SmolLM2-135M"
    for place in (tmp_path / "ledger.json", tmp_path / "checkpoint" / "prunus" / "ledger.json"):
        place.parent.mkdir(parents=True, exist_ok=True)
        run.write(place)
    back = Ledger.read(tmp_path / "checkpoint")
    assert back == run == Ledger.read(tmp_path / "ledger.json") == Ledger.read(tmp_path)
    assert back.missing == ["SmolLM2-135M"] and back.summary() == run.summary()


@settings(max_examples=100, deadline=None)
@given(spans, spans)
def test_verdicts_are_those_of_sets(x, y):
    a, b = (Ledger(stages=[stage(*listed)]) for listed in (x, y))
    found = compare(a, b)
    left, right = numbers(x), numbers(y)
    assert (found.shared, found.only_a, found.only_b) == (len(left & right), len(left - right), len(right - left))
    expected = "disjoint" if not left & right else "same" if left == right else "overlapping"
    assert found.verdict == expected == compare(b, a).verdict


def test_the_protocols_of_the_field():
    """Equal training tokens: the same in the same order. Equal total tokens: the same with parents, disjoint without."""
    order = {"seed": 0, "seq_len": 10, "positions": (0, 10)}
    parent = Ledger(stages=[stage((0, 400), of=data("parent"))])
    retrained = Ledger(stages=[stage((0, 100), **order)], parent=parent)
    scratch = Ledger(stages=[stage((0, 100), **order)])
    union = Ledger(stages=[stage((0, 400), of=data("parent")), stage((0, 100))])
    assert (compare(retrained, scratch).verdict, compare(retrained, scratch).same_order) == ("same", True)
    assert compare(retrained, scratch, parents=True).verdict == "overlapping"
    assert compare(retrained, union, parents=True).verdict == "same"
    assert compare(parent, retrained).verdict == "disjoint"
    shuffled = Ledger(stages=[stage((0, 100), **order | {"seed": 1})])
    assert (compare(retrained, shuffled).verdict, compare(retrained, shuffled).same_order) == ("same", False)


def test_more_epochs_are_the_same_tokens_seen_oftener():
    once, twice = Ledger(stages=[stage((0, 10))]), Ledger(stages=[stage((0, 10), (0, 10))])
    found = compare(once, twice)
    assert found.verdict == "same" and found.notes == ["the same tokens, but seen 10 and 20 times in all"]


def test_it_does_not_guess():
    run = Ledger(stages=[stage((0, 10))])
    other_way = Ledger(stages=[stage((0, 10), of=data(manifest="m2"))])
    found = compare(run, other_way)
    assert found.verdict == "unknown"
    assert found.notes == ["m1:retrain and m2:retrain were prepared from one source in two ways"]
    for apart in (data(manifest="m2", sources=["s2"]), data("parent", manifest="m2"), data("parent")):
        assert compare(run, Ledger(stages=[stage((0, 10), of=apart)])).verdict == "disjoint"
    other_splits = data("parent", manifest="m2", splits={"parent": 0.9, "retrain": 0.1})
    assert compare(run, Ledger(stages=[stage((0, 10), of=other_splits)])).verdict == "unknown"
    released = Ledger(stages=[stage((0, 10))], unrecorded="SmolLM2-135M")
    assert compare(run, released).verdict == "same" and compare(run, released, parents=True).verdict == "unknown"
    part = Ledger(stages=[stage((0, 5), (90, 95))], unrecorded="SmolLM2-135M")
    assert compare(run, part, parents=True).verdict == "overlapping"  # that much is sure


def test_every_reason_is_told_once():
    """Of two runs with the same kind of hole, and of text that both read besides."""
    one, other = (Ledger(stages=[stage((0, 10), of=data(manifest=m))], unrecorded="a model") for m in ("m1", "m2"))
    found = compare(one, other, parents=True)
    assert found.notes == ["m1:retrain and m2:retrain were prepared from one source in two ways", "a model has no ledger"]
    assert (found.verdict, found.only_a, found.only_b, found.same_order) == ("unknown", 10, 10, False)
    for ledger in (one, other):
        ledger.stages[0].consume_text("c4", 64)
    assert (compare(one, other).shared, compare(one, other).verdict) == (64, "overlapping")
    assert len(compare(one, other).notes) == 1  # the same text on both sides needs no word


def test_domain_names_do_not_matter():
    named = Stage(name="x", data={"wiki": data()})
    named.consume([("wiki", 0, 10)])
    assert compare(Ledger(stages=[named]), Ledger(stages=[stage((0, 10))])).verdict == "same"


def test_streams_fill_ledgers(tmp_path):
    """What a stream hands out is what a ledger counts: halves of one order are disjoint and together the whole."""
    _, folder = made(tmp_path, texts(), shard_tokens=150)
    shards = Shards.open(folder, "retrain")

    def run(first, end, seed=0):
        stream = Stream([Domain("a", shards)], 8, seed)
        made_stage = Stage(name="train", seed=seed, seq_len=8, positions=(first, end), data={"a": Data(**shards.identity())})
        for position in range(first, end):
            made_stage.consume(stream.take(position, 1).ranges)
        return Ledger(stages=[made_stage])

    n = Stream([Domain("a", shards)], 8, 0).num_sequences
    assert run(0, n).tokens == n * 8
    assert compare(run(0, n // 2), run(n // 2, n)).verdict == "disjoint"
    assert compare(run(0, n), run(0, n, seed=1)).verdict == "same"
    assert compare(run(0, n // 2), run(0, n)).verdict == "overlapping"
    joined = Ledger(stages=[*run(0, n // 2).stages, *run(n // 2, n).stages])
    assert compare(joined, run(0, n)).verdict == "same"


# -- the command --------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    parent, run = family()
    run.parent.unrecorded = "SmolLM2-135M"
    (tmp_path / "a").mkdir()
    parent.write(tmp_path / "p.json")
    run.write(tmp_path / "a" / "ledger.json")
    code, said, err = cli("ledger", tmp_path / "a", tmp_path / "p.json")
    assert code == 0 and "their own tokens: disjoint" in said and "with all that came before: unknown" not in said, err
    assert "in all: at least 500 tokens" in said and "without a ledger: SmolLM2-135M" in said
    code, said, err = cli("ledger", tmp_path / "a", tmp_path / "p.json", "--json")
    result = json.loads(said)
    assert result["own"]["verdict"] == "disjoint" and result["with_parents"]["verdict"] == "overlapping"
    assert result["runs"][0]["total_flops"] == 6001
    code, said, err = cli("ledger", tmp_path / "a", "--json")
    assert code == 0 and set(json.loads(said)) == {"runs"}


def test_wrong_inputs(tmp_path):
    (tmp_path / "empty").mkdir()
    good = json.loads(family()[0].model_dump_json())
    spoilt = {
        "json": ("{", "not readable as JSON"),
        "list": ("[]", "is no ledger (as a whole: "),
        "format": (json.dumps(good | {"format": 7}), r"is no ledger (format: "),
        "field": (json.dumps(good | {"colour": 1}), r"is no ledger (colour: "),
        "kind": (json.dumps(good | {"stages": [{"name": "x", "flops": {"trian": 1}}]}), r"is no ledger (stages.0.flops."),
        "spans": (json.dumps(good | {"stages": [{"name": "x", "consumed": {"a": [[3, 1]]}}]}), r"(stages.0.consumed.a: "),
    }
    asked = {tmp_path / "gone": "gone: no such file or folder", tmp_path / "empty": "there is no ledger.json in it"}
    for name, (text, message) in spoilt.items():
        (tmp_path / f"{name}.json").write_text(text)
        asked[tmp_path / f"{name}.json"] = message
    for path, message in asked.items():
        code, said, err = cli("ledger", path)
        assert code == 2 and said == "" and message in err and err.count("\n") == 1, err
    with pytest.raises(UserError):
        Ledger.read(tmp_path / "gone")
