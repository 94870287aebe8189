"""The order of the data: permutations, exact shares, and nothing that hangs on how it is asked for."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared import made, texts

from prunus.data.mixing import PARTS, Schedule, millionths
from prunus.data.order import Domain, Stream, open_domains, permuted
from prunus.data.tokenizer import fingerprint
from prunus.errors import UserError


class Numbers:
    """Data whose token at position i is i + offset, a new document at every multiple of `every`."""

    def __init__(self, size, offset=0, every=7):
        self.ids, self.num_tokens, self.every = np.arange(size, dtype=np.int64) + offset, size, every

    def __getitem__(self, span):
        return self.ids[span]

    def document_starts(self, first, end):
        return np.array([i for i in range(first, end) if i % self.every == 0], np.int64)


def stream(*sizes, weights=None, seq_len=5, seed=0, epochs=1):
    weights = weights or [s / sum(sizes) for s in sizes]
    named = zip("abcdefgh", sizes, weights, strict=False)
    return Stream([Domain(n, Numbers(s, 1000 * i), w) for i, (n, s, w) in enumerate(named)], seq_len, seed, epochs)


def key(*numbers):
    return np.array(numbers, np.uint64)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.lists(st.integers(0, 2**64 - 1), min_size=8, max_size=8))
def test_a_permutation_of_any_size(size, round_keys):
    out = permuted(np.arange(size), size, key(*round_keys))
    assert sorted(out.tolist()) == list(range(size))
    one = [int(permuted(np.array([i]), size, key(*round_keys))[0]) for i in range(min(size, 20))]
    assert one == out[:20].tolist()


def naive_feistel(i, size, round_keys):
    """In Python's own numbers, one index at a time."""
    half = 1
    while 4**half < size:
        half += 1

    def mixed(x):
        x = (x + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    while True:
        left, right = divmod(i, 2**half)
        for k in round_keys:
            left, right = right, left ^ (mixed(right ^ k) % 2**half)
        i = left * 2**half + right
        if i < size:
            return i


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 2**33 + 5])
def test_the_network_is_its_definition(size):
    keys = [3, 2**63 + 5, 7, 11, 2**64 - 1, 0, 99, 1]
    indices = [i for i in (0, 1, 2, 3, 15, 16, 999, 2**33) if i < size]
    assert permuted(np.array(indices), size, key(*keys)).tolist() == [naive_feistel(i, size, keys) for i in indices]


def test_the_shuffle_looks_random():
    """Neighbours are torn apart, and every place is about equally likely: 400 keys send 0 to 20 cells of 1,000 places.

    A count of 20 with standard deviation 4.4: 5 of them are 22.
    """
    places = [
        int(permuted(np.array([0]), 1000, np.random.default_rng(s).integers(0, 2**63, 8).astype(np.uint64))[0])
        for s in range(400)
    ]
    assert max(abs(n - 20) for n in np.bincount(np.array(places) // 50, minlength=20)) < 22
    out = permuted(np.arange(10_000), 10_000, key(*range(8)))
    steps = np.abs(np.diff(out))
    assert abs(steps.mean() - 3333) < 120  # a random permutation: mean |difference| n/3, standard error about 24
    assert abs(np.corrcoef(np.arange(10_000), out)[0, 1]) < 0.05


def test_sequences_are_where_they_say():
    s = stream(103, weights=[1.0])
    batch = s.take(0, s.num_sequences)
    assert s.num_sequences == 20  # (103 - 1) // 5: the last sequence needs the token behind it
    for row, (name, first, end) in zip(batch.ids, batch.ranges, strict=True):
        assert name == "a" and end - first == 5 and first % 5 == 0
        assert row.tolist() == list(range(first, end + 1))
    assert sorted(first for _, first, _ in batch.ranges) == list(range(0, 100, 5))
    assert batch.ids.dtype == batch.domains.dtype == torch.int64


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(30, 400), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(1, 3),
    st.data(),
)
def test_independent_of_the_batch_split_and_of_restarts(sizes, seq_len, seed, epochs, data):
    def fresh():
        return stream(*sizes, seq_len=seq_len, seed=seed, epochs=epochs)

    whole = fresh()
    n = whole.num_sequences
    everything = whole.take(0, n)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=6))})
    for start, end in data.draw(st.permutations(list(itertools.pairwise(cuts)))):
        part = fresh().take(start, end - start)
        assert torch.equal(part.ids, everything.ids[start:end])
        assert torch.equal(part.domains, everything.domains[start:end])
        assert part.ranges == everything.ranges[start:end]
    counts = Counter(everything.ranges)
    assert max(counts.values()) <= epochs


def test_every_process_may_take_its_part():
    """Two processes with batches of 3 each see what one with batches of 6 sees."""
    s = stream(400, 200, seq_len=4)
    for step in range(5):
        whole = s.take(step * 6, 6)
        parts = [stream(400, 200, seq_len=4).take(step * 6 + rank * 3, 3) for rank in range(2)]
        assert torch.equal(torch.cat([p.ids for p in parts]), whole.ids)


def test_epochs_are_different_orders_of_all_sequences():
    s = stream(103, weights=[1.0], epochs=3)
    assert s.num_sequences == 60
    orders = [tuple(s.take(e * 20, 20).ranges) for e in range(3)]
    assert len(set(orders)) == 3 and len({frozenset(o) for o in orders}) == 1


def test_seeds_and_domains_have_orders_of_their_own():
    orders = {tuple(first for _, first, _ in stream(503, weights=[1.0], seed=s).take(0, 100).ranges) for s in range(5)}
    assert len(orders) == 5
    ranges = stream(503, 503, weights=[0.5, 0.5]).take(0, 200).ranges
    first, second = ([f for n, f, _ in ranges if n == name] for name in "ab")
    assert first != second and sorted(first) == sorted(second)


def test_the_names_decide_not_their_order():
    """A domain's own order hangs on its name: adding another one behind it does not reshuffle it."""
    alone = [f for _, f, _ in stream(503, weights=[1.0]).take(0, 50).ranges]
    among = [f for n, f, _ in stream(503, 503, weights=[0.5, 0.5]).take(0, 100).ranges if n == "a"]
    assert alone == among


# -- shares -------------------------------------------------------------------------------------------------------------


def walk(weights, steps):
    return Schedule(weights).draws(0, steps)[0].tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8))
def test_no_prefix_is_off_by_more_than_a_sequence(raw):
    weights = [r / sum(raw) for r in raw]
    steps = 1500
    chosen = np.array(walk(weights, steps))
    parts = np.array(millionths(weights))
    bound = 1 - 1 / max(2, 2 * len(raw) - 2)  # Tijdeman's
    for k in range(len(raw)):
        drawn = np.cumsum(chosen == k)
        assert np.abs(drawn - np.arange(1, steps + 1) * parts[k] / PARTS).max() <= bound + 1e-9


def test_the_published_mix_repeats_exactly():
    """Sheared LLaMA's initial shares are multiples of 1/200: every 200 draws hold them exactly."""
    weights = [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15]
    chosen = walk(weights, 1000)
    for start in range(0, 1000, 200):
        assert chosen[start : start + 200] == chosen[:200]
    assert [chosen[:200].count(k) for k in range(7)] == [134, 9, 9, 4, 9, 5, 30]


@pytest.mark.parametrize(
    "weights", [[1 / 3] * 3, [1e-7, 1 - 1e-7], [0.1] * 10, [0.5, 0.25, 0.125, 0.125], [1.0], [1e-9] * 5 + [1 - 5e-9]]
)
def test_millionths(weights):
    parts = millionths(weights)
    assert sum(parts) == PARTS and min(parts) >= 1
    assert max(abs(p - w * PARTS) for p, w in zip(parts, weights, strict=True)) <= len(weights)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.integers(0, 5000), st.integers(1, 300))
def test_random_access_is_the_walk(raw, position, count):
    weights = [r / sum(raw) for r in raw]
    chosen = walk(weights, position + count)
    domains, ordinals = Schedule(weights).draws(position, count)
    assert domains.tolist() == chosen[position:]
    before = Counter(chosen[:position])
    for k, ordinal in zip(domains.tolist(), ordinals.tolist(), strict=True):
        assert ordinal == before[k]
        before[k] += 1
    assert Schedule(weights).counts(position).tolist() == [chosen[:position].count(k) for k in range(len(raw))]


def test_far_positions_cost_nothing():
    """Position 10^12 is reached by arithmetic, since the shares repeat."""
    domains, ordinals = Schedule([0.75, 0.25]).draws(10**12, 4)
    assert Counter(domains.tolist()) == {0: 3, 1: 1}
    assert ordinals[domains == 1].tolist() == [10**12 // 4]


# -- shares that change -------------------------------------------------------------------------------------------------

changes = st.lists(st.tuples(st.integers(0, 60), st.lists(st.integers(1, 40), min_size=3, max_size=3)), max_size=8)


@settings(max_examples=60, deadline=None)
@given(changes)
def test_changing_shares_are_met_in_sum(steps):
    """What a domain is due is the sum of its shares so far. The bound of 2 is what random histories stay below."""
    schedule = Schedule([0.2, 0.3, 0.5])
    position, due, parts = 0, np.zeros(3), np.array([0.2, 0.3, 0.5])
    for length, raw in [*steps, (60, [1, 1, 1])]:
        if length:
            due = due + length * parts
        position += length
        assert np.abs(schedule.counts(position) - due).max() < 2
        weights = [r / sum(raw) for r in raw]
        schedule.change(position, weights)
        parts = np.array(millionths(weights)) / PARTS
    chosen = schedule.draws(0, position)[0]
    for p in range(0, position, 7):
        assert schedule.counts(p).tolist() == np.bincount(chosen[:p], minlength=3).tolist()


def test_a_small_share_is_not_starved_by_frequent_changes():
    """A share of 1 % under changes every 10 draws: it still gets 1 % of 5,000."""
    schedule = Schedule([0.01, 0.5, 0.49])
    for i in range(1, 500):
        schedule.change(i * 10, [0.01, 0.49, 0.5] if i % 2 else [0.01, 0.5, 0.49])
    assert abs(int(schedule.counts(5000)[0]) - 50) <= 1


def test_history_and_position_are_the_whole_state():
    weights = [{"a": 0.7, "b": 0.3}, {"a": 0.123, "b": 0.877}, {"a": 0.5, "b": 0.5}]
    first = stream(5000, 5000, weights=[0.4, 0.6])
    before = first.take(0, 30)
    for position, shares in zip((30, 71, 71), weights, strict=True):
        first.reweight(position, shares)
    assert torch.equal(first.take(0, 30).ids, before.ids)  # the past stays
    second = stream(5000, 5000, weights=[0.9, 0.1])
    second.replay(first.history)
    for position, count in ((0, 200), (65, 12), (100, 50)):
        a, b = first.take(position, count), second.take(position, count)
        assert torch.equal(a.ids, b.ids) and a.ranges == b.ranges
    assert second.history == first.history
    assert len(set(first.take(0, 200).ranges)) == 200  # nothing is drawn twice


def test_a_history_of_other_domains():
    with pytest.raises(UserError, match="domains: the run had x, y, now there are a, b"):
        stream(500, 500).replay([(0, {"x": 0.5, "y": 0.5})])


# -- ends ---------------------------------------------------------------------------------------------------------------


def test_no_more_than_there_is():
    s = stream(103, 1003, weights=[0.5, 0.5])
    n = s.num_sequences
    assert abs(n - 40) <= 1  # twice the 20 of the smaller one
    s.check_budget(n)
    s.take(0, n)
    message = (
        rf"budget: {(n + 1) * 5} tokens are asked for, but domain 'a' is used up after {n * 5}; "
        r"lower the budget, or allow repetition with epochs \(now 1\)"
    )
    with pytest.raises(UserError, match=message):
        s.check_budget(n + 1)
    with pytest.raises(UserError, match="domain 'a' is used up: its 20 sequences of 5 have been seen 1 times"):
        s.take(n, 2)
    assert stream(103, 1003, weights=[0.5, 0.5], epochs=4).num_sequences >= 4 * 40 - 1


def test_all_of_the_data_is_used_with_shares_by_size():
    """Two sequences a domain at most are left over by rounding."""
    s = stream(1003, 4003, 503)
    assert sum(s.sizes) - s.num_sequences <= 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": (4,), "weights": [1.0]}, "domain 'a': 4 tokens are fewer than one sequence of 5 and the token behind it"),
        ({"sizes": (5,), "weights": [1.0]}, "domain 'a': 5 tokens are fewer"),
        ({"sizes": (50,), "weights": [0.9]}, "weights: 0.9 are no shares"),
        ({"sizes": (50, 50), "weights": [1.1, -0.1]}, "weights: 1.1, -0.1 are no shares"),
        ({"sizes": (50, 50), "weights": [1.0, 0.0]}, "weights: 1, 0 are no shares"),
        ({"sizes": (50, 50), "weights": [float("nan"), 1.0]}, "weights: nan, 1 are no shares"),
        ({"sizes": (50,), "weights": [1.0], "epochs": 0}, "seq_len and epochs are 5 and 0"),
        ({"sizes": (50,), "weights": [1.0], "seq_len": 0}, "seq_len and epochs are 0 and 1"),
        ({"sizes": (), "weights": []}, "domains: none; give at least one"),
    ],
)
def test_streams_that_cannot_be(arguments, message):
    arguments = dict(arguments)
    with pytest.raises(UserError, match=message):
        stream(*arguments.pop("sizes"), **arguments)


def test_two_domains_of_one_name():
    with pytest.raises(UserError, match="domains: a, a; give at least one, each with a name of its own"):
        Stream([Domain("a", Numbers(50), 0.5), Domain("a", Numbers(50), 0.5)], 5, 0)


# -- prepared data ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = []
    for i, name in enumerate(("wiki", "web")):
        parent = tmp_path_factory.mktemp("x") / name
        parent.mkdir()
        _, data = made(parent, texts(60 + 40 * i, seed=i))
        out.append(str(data.rename(parent / name)))
    return out


def test_domains_of_prepared_data(folders):
    domains = open_domains(folders, "parent")
    s = Stream(domains, 8, seed=3)
    assert [d.name for d in domains] == ["wiki", "web"] and abs(sum(d.weight for d in domains) - 1) < 1e-12
    batch = s.take(0, 12)
    for row, (name, first, end) in zip(batch.ids, batch.ranges, strict=True):
        shards = next(d.shards for d in domains if d.name == name)
        assert row.tolist() == shards[first : end + 1].tolist()
    segments = s.segments(batch)
    eos = domains[0].shards.manifest.eos_token_id
    ends = (batch.ids[:, :-1] == eos).long().cumsum(1)
    assert torch.equal(segments, torch.cat([torch.zeros(12, 1, dtype=torch.int64), ends], 1)) and segments.max() > 0


def test_ranges_share_no_document(folders):
    seen = {}
    for which in ("validation", "parent", "retrain"):
        shards = open_domains(folders[:1], which)[0].shards
        pieces = np.split(shards[:], shards.document_starts(1, shards.num_tokens))
        seen[which] = {tuple(p.tolist()) for p in pieces}
    assert not any(a & b for a, b in itertools.combinations(seen.values(), 2))


def test_domains_that_do_not_fit(folders, tmp_path):
    with pytest.raises(UserError, match=r"unknown range of .*wiki 'parnet' \(did you mean 'parent'\?\)"):
        open_domains(folders, "parnet")
    with pytest.raises(UserError, match="was prepared with another tokenizer than the model's"):
        open_domains(folders, "parent", tokenizer="0" * 64)
    with pytest.raises(UserError, match="weights: are for wiki, but the domains are wiki, web"):
        open_domains(folders, "parent", weights={"wiki": 1.0})
    with pytest.raises(UserError, match=r"weights: 0.5, 0.6 are no shares"):
        open_domains(folders, "parent", weights={"wiki": 0.5, "web": 0.6})
    with pytest.raises(UserError, match="name folders whose last parts differ"):
        open_domains([folders[0], folders[0]], "parent")
    import pipeline

    from prunus.data.prepare import Text, prepare
    from prunus.data.tokenizer import train_tokenizer

    assert open_domains(folders, "parent", tokenizer=fingerprint(pipeline.tokenizer()))
    (tmp_path / "a.txt").write_text("some text")
    prepare([Text(str(tmp_path / "a.txt"))], train_tokenizer(iter(texts(9)), 260), tmp_path / "b", splits={"parent": None})
    with pytest.raises(UserError, match="were prepared with different tokenizers"):
        open_domains([folders[0], str(tmp_path / "b")], "parent")
