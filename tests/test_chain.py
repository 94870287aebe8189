"""Ranges one behind the other: what a run reads that has two others' tokens, and what its ledger says of them."""

import json

import lessons
import pytest
import torch
import training
from test_order import stream

from prunus.data.order import Chain
from prunus.errors import UserError
from prunus.ledger import Ledger, compare


def chained(first=7, second=5, **options):
    one, other = stream(60, 40, **options), stream(50, 30, seed=0, **options)
    return one, other, Chain({"parent": (one, first), "retrain": (other, second)})


def ranges(tokens):
    return {name: {"tokens": size} for name, size in tokens.items()}


def test_a_chain_is_its_streams_one_behind_the_other():
    one, other, both = chained()
    want = torch.cat([one.take(0, 7).ids, other.take(0, 5).ids])
    assert both.num_sequences == 12 and torch.equal(both.take(0, 12).ids, want)
    for count in (1, 2, 5, 12):  # however it is asked for
        got = [both.take(at, min(count, 12 - at)) for at in range(0, 12, count)]
        assert torch.equal(torch.cat([batch.ids for batch in got]), want)
        ranges = [r for batch in got for r in batch.ranges]
        assert ranges[:7] == [(f"parent:{name}", a, b) for name, a, b in one.take(0, 7).ranges]
        assert ranges[7:] == [(f"retrain:{name}", a, b) for name, a, b in other.take(0, 5).ranges]
        names = [both.domains[k].name for batch in got for k in batch.domains.tolist()]
        assert names == [name for name, _, _ in ranges]
    segments = torch.cat([one.segments(one.take(0, 7)), other.segments(other.take(0, 5))])
    assert torch.equal(both.segments(both.take(0, 12)), segments)
    assert sum(domain.weight for domain in both.domains) == pytest.approx(1)
    json.dumps(both.history)


def test_chains_that_are_too_short():
    _, _, both = chained()
    both.check_budget(12)
    with pytest.raises(UserError, match="65 tokens are asked for, but the ranges hold 60"):
        both.check_budget(13)
    with pytest.raises(UserError, match="are used up; name more"):
        both.take(11, 2)
    _, _, far = chained(first=100)
    with pytest.raises(UserError, match="range 'parent': budget"):
        far.check_budget(1)


def test_a_run_on_two_ranges_sees_what_two_runs_saw(tmp_path):
    """The second protocol of the comparison study: parent and child against fresh weights on all of their tokens."""
    tokens = {"parent": 8 * 4 * training.SEQ, "retrain": 4 * 4 * training.SEQ}
    training.run(tmp_path / "parent", training.asked(data__range="parent"))
    source = {"source": str(tmp_path / "parent" / "model")}
    training.run(tmp_path / "child", training.asked(model=source, tokens=tokens["retrain"]))
    training.run(tmp_path / "scratch", training.asked(data__range=ranges(tokens), tokens=sum(tokens.values())))
    child, scratch = (Ledger.read(tmp_path / name) for name in ("child", "scratch"))
    found = compare(child, scratch, parents=True)
    assert (found.verdict, found.only_a, found.only_b, found.shared) == ("same", 0, 0, sum(tokens.values()))
    assert child.total_tokens == scratch.total_tokens
    assert compare(child, scratch).verdict == "overlapping"


def test_a_run_on_two_ranges_goes_on_bit_for_bit(tmp_path):
    recipe = training.asked(data__range=ranges({"parent": 4 * 4 * training.SEQ, "retrain": 4 * 4 * training.SEQ}))
    training.run(tmp_path / "whole", recipe)
    with pytest.raises(training.Killed):
        training.run(tmp_path / "cut", recipe, hooks=[training.KilledAt(5)])
    training.run(tmp_path / "cut", recipe)
    assert training.same(training.weights(tmp_path / "whole"), training.weights(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"parent": 10}, "range parent: 10 tokens is no whole number of sequences of seq_len 16"),
        ({"parent": 0}, "field 'data.range.each.parent.tokens': 0 is wrong"),
        ({}, "range nothing is no"),
        ({"paren": 16}, "paren"),
        ({"parent": 16}, "512 tokens are asked for, but the ranges hold 16"),
    ],
)
def test_ranges_that_are_refused(asked, message, tmp_path):
    with pytest.raises(UserError, match=message):
        training.opened(training.asked(data__range=ranges(asked)), tmp_path / "out")


def test_shares_by_losses_need_one_range():
    mixing = {"references": {"tokens": 1.0}}
    with pytest.raises(UserError, match="range names several"):
        training.asked(data__range=ranges({"parent": 16, "retrain": 16}), data__mixing=mixing)


def test_each_range_may_have_a_seed_of_its_own(tmp_path):
    whole = {"parent": {"tokens": 8 * training.SEQ, "seed": 3}, "retrain": {"tokens": 8 * training.SEQ}}
    both = training.opened(training.asked(data__range=whole, tokens=64), tmp_path / "a").feeds.training
    one = training.opened(training.asked(data__range="parent", data__seed=3), tmp_path / "b").feeds.training
    other = training.opened(training.asked(), tmp_path / "c").feeds.training
    assert torch.equal(both.take(0, 16).ids, torch.cat([one.take(0, 8).ids, other.take(0, 8).ids]))


@pytest.mark.parametrize(
    "other",
    [
        {"parent": {"tokens": 256, "seed": 7}, "retrain": {"tokens": 256}},
        {"parent": {"tokens": 256}, "retrain": {"tokens": 256, "seed": 7}},
        {"parent": {"tokens": 512}, "retrain": {"tokens": 512}},  # in the same proportions
    ],
)
def test_a_teachers_words_on_ranges_are_of_their_seeds_and_tokens(tmp_path, other):
    one = ranges({"parent": 256, "retrain": 256})
    lessons.teach(tmp_path / "cache", lessons.taught_by(data__range=one))
    said = {"parent": {"tokens": 256, "seed": 0}, "retrain": {"tokens": 256}}  # the default, spelled out
    training.opened(lessons.taught_by(tmp_path / "cache", data__range=said), tmp_path / "run")
    with pytest.raises(UserError, match=r"written for another recipe \(data.domains or data.range differs\)"):
        training.opened(lessons.taught_by(tmp_path / "cache", data__range=other), tmp_path / "run")
    with pytest.raises(UserError, match=r"was written for something else \(data differs\)"):
        lessons.teach(tmp_path / "cache", lessons.taught_by(data__range=other))


def test_runs_whose_ranges_have_other_seeds_have_another_order(tmp_path):
    whole = training.opened(training.asked(), tmp_path / "a").feeds.training.num_sequences  # the same tokens in any order

    def ledger(**seeds):
        asked = {"retrain": {"tokens": whole * training.SEQ, **seeds}}
        recipe = training.asked(data__range=asked, tokens=whole * training.SEQ)
        feeds = training.opened(recipe, tmp_path / "b").feeds
        return Ledger.model_validate(feeds.ledger(recipe, whole, {"train": 1}, 1, None))

    one, said, other = ledger(), ledger(seed=0), ledger(seed=7)
    assert compare(one, said).same_order
    assert (compare(one, other).verdict, compare(one, other).same_order) == ("same", False)
