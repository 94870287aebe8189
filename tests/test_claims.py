"""Findings that a study is asked about: verdicts by hand, and ranks against SciPy's."""

import itertools
import json
from dataclasses import replace

import pytest
from scipy import stats
from test_study import written
from test_study_results import folder, line

from prunus.errors import UserError
from prunus.study import claims, formats, page, results
from prunus.study import file as files

BETTER = {"says": "pruned is ahead", "better": ["P-R", "S"]}


def asked(tmp_path, lines, *what, **grid):
    """What a folder holds of a study that asks; `grid` in the order of its values, a dot as ``__``, else in that of the runs."""
    out = folder(tmp_path, lines)
    told = json.loads((out / "study.json").read_text())
    told["file"]["grid"] = {key.replace("__", "."): values for key, values in grid.items()}
    for key, value in (item for one in lines for item in one["place"].items()):
        if value not in told["file"]["grid"].setdefault(key, []):
            told["file"]["grid"][key].append(value)
    told["file"]["claims"] = [files.ClaimPart.model_validate(one).model_dump() for one in what]
    (out / "study.json").write_text(json.dumps(told))
    return results.load(out)


def arms(ahead, **places):
    """P-R ahead of S by so much, seed by seed."""
    pairs = [(line("P-R", s, 4.0 - lead, **places), line("S", s, 4.0, **places)) for s, lead in enumerate(ahead)]
    return [one for pair in pairs for one in pair]


@pytest.mark.parametrize(
    ("ahead", "verdict"),
    [
        ([0.15, 0.2, 0.25], "holds"),  # mean 0.2, error 0.0289, 4.30 of which are noise
        ([-0.15, -0.2, -0.25], "does not hold"),
        ([0.1, 0.2, 0.3], "within noise"),
        ([0.1, -0.2, 0.2], "within noise"),
        ([0.1], "holds (one seed)"),
        ([-0.1], "does not hold (one seed)"),
    ],
)
def test_a_claim_that_one_arm_is_better(ahead, verdict, tmp_path):
    (one,) = claims.verdicts(asked(tmp_path, arms(ahead), BETTER))
    assert one.verdict == verdict and one.metric == results.LOSS
    assert one.leads[0][1].mean == pytest.approx(sum(ahead) / len(ahead)) and one.leads[0][1].seeds == len(ahead)


def test_places_that_differ_are_counted(tmp_path):
    lines = arms([0.15, 0.2, 0.25]) + arms([-0.15, -0.2, -0.25], ratio=0.8)
    found = asked(tmp_path, lines, BETTER, BETTER | {"where": {"cut.ratio": [0.8]}})
    first, second = claims.verdicts(found)
    assert first.verdict == "holds in 1, does not hold in 1 of 2" and second.verdict == "does not hold"
    assert first.told == "0.5 +0.2000 ± 0.1242, 0.8 -0.2000 ± 0.1242; 3 seeds"
    table = formats.tables(found)[0]
    assert table.title == "Findings" and table.rows[0][2:] == (first.verdict, "validation loss", first.told)


def test_more_is_better_of_accuracy(tmp_path):
    lines = [line("P-R", 0, 4.0, accuracy=0.65), line("S", 0, 3.0, accuracy=0.62)]
    loss, accuracy = claims.verdicts(asked(tmp_path, lines, BETTER, BETTER | {"on": "piqa acc"}))
    assert loss.verdict == "does not hold (one seed)" and accuracy.verdict == "holds (one seed)"
    assert accuracy.told == "0.5 +3.0; 1 seed"


def test_a_lead_that_shrinks_is_taken_from_the_same_seeds(tmp_path):
    """Leads 0.3 and 0.1, 0.45 and 0.24: falls by 0.2 and 0.21, mean 0.205, error 0.005, 12.7 of which are noise."""
    lines = arms([0.3, 0.45], ratio=0.5) + arms([9.0, 9.0], ratio=0.6) + arms([0.1, 0.24], ratio=0.8)
    lead = {"arms": ["P-R", "S"], "along": "cut.ratio"}
    back = lead | {"values": [0.8, 0.5]}
    first, second, third = claims.verdicts(
        asked(tmp_path, lines, *({"says": "x", "shrinks": one} for one in (lead, back, lead | {"values": [0.6, 0.8]})))
    )
    assert (first.verdict, second.verdict, third.verdict) == ("holds", "does not hold", "holds")
    assert [name for name, _ in first.leads] == ["0.5", "0.6", "0.8"] and [name for name, _ in second.leads] == [
        "0.8",
        "0.5",
    ]


def placed(key, value, ahead):
    """P-R ahead of S by so much, seed by seed, at a value of one key alone."""
    return [
        one | {"run": f"{one['run']}-{value}", "place": {key: value, "data.seed": one["place"]["data.seed"]}}
        for one in arms(ahead)
    ]


def test_without_values_a_lead_shrinks_in_the_order_of_the_grid(tmp_path):
    """Not by the alphabet, and names beside numbers have no other order; an arm's own grid comes before the study's."""
    values = ["tokens-2", "tokens-10", 0.5]
    lines = [
        one for i, value in enumerate(reversed(values)) for one in placed("cut", value, [0.1 + 0.1 * i, 0.11 + 0.1 * i])
    ]
    lead = {"says": "x", "shrinks": {"arms": ["P-R", "S"], "along": "cut"}}
    found = asked(tmp_path, lines, lead, cut=["later", *values])
    (one,) = claims.verdicts(found)
    assert one.verdict == "holds" and [name for name, _ in one.leads] == ["tokens-2", "tokens-10", "0.5"]
    own = {"P-R": {"grid": {"cut": values[::-1]}}, "S": {"grid": None}}
    (other,) = claims.verdicts(replace(found, written=found.written | {"arms": own}))
    assert other.verdict == "does not hold" and [name for name, _ in other.leads] == ["0.5", "tokens-10", "tokens-2"]


def test_values_of_a_grid_may_be_tables_and_lists(tmp_path):
    """As those of cut.target are: in verdicts, tables, the index and pages."""
    values = [{"num_hidden_layers": 2}, {"num_hidden_layers": 1, "hidden_size": 8}, [1, 2]]
    lines = [one for i, value in enumerate(values) for one in placed("cut.target", value, [0.3 - 0.1 * i, 0.31 - 0.1 * i])]
    lead = {"says": "x", "shrinks": {"arms": ["P-R", "S"], "along": "cut.target"}}
    found = asked(
        tmp_path, lines, BETTER, lead, BETTER | {"where": {"cut.target": values[:1]}}, {"says": "x", "ranks": ["P-R", "S"]}
    )
    better, shrinks, first, ranks = claims.verdicts(found)
    assert (better.verdict, shrinks.verdict, first.verdict) == ("holds",) * 3
    names = ["{'num_hidden_layers': 2}", "{'num_hidden_layers': 1, 'hidden_size': 8}", "[1, 2]"]
    assert [[name for name, _ in one.leads] for one in (better, shrinks, first)] == [names, names, names[:1]]
    assert "over 3 places" in ranks.more
    for form in formats.FORMATS:
        assert formats.written(found, form)
    results.index(found)
    written_ = page.write(found.folder, tmp_path / "page.html")
    assert written_["charts"] and "num_hidden_layers" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_ranks_that_agree(tmp_path):
    lines = [one for i, ratio in enumerate((0.2, 0.3, 0.5, 0.6, 0.7, 0.8)) for one in
             (line("P-R", 0, 3.0 + i, ratio=ratio), line("S", 0, 4.0 + i * i, ratio=ratio))]  # fmt: skip
    (one,) = claims.verdicts(asked(tmp_path, lines, {"says": "x", "ranks": ["P-R", "S"]}))
    assert one.verdict == "holds" and one.told == "Kendall's tau +1.00 over 6 places, p = 0.0028"  # 2 of 6! orders


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_kendall_is_scipys(n):
    for order in itertools.islice(itertools.permutations(range(n)), 0, None, max(1, n * n - 9)):
        tau, chance = claims.kendall([(float(a), float(b)) for a, b in enumerate(order)])
        known = stats.kendalltau(range(n), order, method="exact")
        assert tau == pytest.approx(known.statistic) and chance == pytest.approx(known.pvalue)


def test_what_was_not_run_is_said(tmp_path):
    lead = {"arms": ["P-R", "S"], "along": "cut.ratio"}
    asking = (BETTER, {"says": "x", "shrinks": lead}, {"says": "x", "ranks": ["P-R", "S"]})
    found = asked(tmp_path, [line("P-R", 0, 3.0)], *asking)
    assert {one.verdict for one in claims.verdicts(found)} == {"not run yet"}
    (tmp_path / "b").mkdir()
    one = asked(tmp_path / "b", arms([0.1]), asking[1])  # at one ratio only
    assert claims.verdicts(one)[0].verdict == "not run yet"


def test_a_verdict_without_all_of_its_runs_says_so_far(tmp_path):
    found = asked(tmp_path, arms([0.15, 0.2, 0.25]), BETTER)
    for missing, verdict in ((("S_later",), "holds, so far"), (("Saint_later",), "holds"), ((), "holds")):
        assert claims.verdicts(replace(found, missing=missing))[0].verdict == verdict


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (BETTER | {"better": ["P-R", "Q"]}, r"claims.0: unknown arm 'Q'"),
        (BETTER | {"better": ["P-R"]}, r"claims.0: \['P-R'\] are not two arms"),
        (BETTER | {"ranks": ["P-R", "S"]}, "claims.0: give one of better, shrinks and ranks"),
        (BETTER | {"where": {"cut.method": ["wanda"]}}, "P-R and S are run at cut.method=flap, minitron-depth"),
        (BETTER | {"where": {"tokens": [3]}}, "P-R and S are run at tokens=nothing; name values of their grid"),
    ],
)
def test_claims_that_are_refused(claim, message, tmp_path):
    with pytest.raises(UserError, match=message):
        files.read(written(tmp_path, claims=[claim]))
