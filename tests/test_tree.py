"""Token trees: what sequences share is read once, and what is said of each is what it would be by itself."""

import numpy as np
import pipeline
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.tasks.tree import LONGEST, Sequence_, answers, batches, common, trees
from prunus.train.learner import Learner

TOKENS = st.lists(st.integers(0, 2), min_size=2, max_size=9)


@st.composite
def sequences(draw):
    found = []
    for tokens in draw(st.lists(TOKENS, min_size=1, max_size=12)):
        found.append(Sequence_(tuple(tokens), draw(st.integers(1, len(tokens) - 1))))
    return found


@given(sequences())
@settings(max_examples=150, deadline=None)
def test_a_tree_holds_its_sequences(asked):
    """Every sequence is a path from a root; a node sees its path and nothing else; a beginning that is shared is there once."""
    found = trees(asked)
    assert sorted(i for tree in found for i in tree.paths) == list(range(len(asked)))
    for tree in found:
        assert sum(b.stop - b.start for b in tree.branches) == len(tree.tokens) == len(tree)
        depths, sees = tree.depths(), tree.sees()
        seen = set()
        for index, path in tree.paths.items():
            assert [tree.tokens[n] for n in path] == list(asked[index].read)
            assert depths[path].tolist() == list(range(len(path)))
            for place, node in enumerate(path):
                assert np.flatnonzero(sees[node]).tolist() == sorted(path[: place + 1].tolist())
            seen |= set(path.tolist())
        assert seen == set(range(len(tree)))
        beginnings = {asked[i].read[: k + 1] for i in tree.paths for k in range(len(asked[i].read))}
        assert len(tree) == len(beginnings) or len({asked[i].read[0] for i in tree.paths}) > 1


def test_answers_to_one_question_share_it():
    question, replies = (5, 6, 7, 8, 9, 10), [(1, 2, 3), (1, 4), (2,), (3,)]
    asked = [Sequence_(question + reply, len(reply)) for reply in replies]
    (tree,) = trees(asked)
    assert len(tree) == 6 + 2  # behind the question only 1 and then 2 are read: last tokens are predicted
    assert common((1, 2, 3), (1, 2)) == 2 and common((), (1,)) == 0


def test_strangers_keep_apart_and_trees_stay_short():
    asked = [Sequence_(tuple(range(100 * k, 100 * k + 20)), 3) for k in range(4)]
    assert len(trees(asked)) == 4
    long = tuple(range(LONGEST - 10))
    found = trees([Sequence_((*long, *range(1000 + 20 * k, 1020 + 20 * k)), 4) for k in range(3)])
    assert len(found) == 3 and max(map(len, found)) <= LONGEST + 10


def test_batches_keep_to_their_tokens():
    sizes = [3, 50, 7, 7, 8, 20, 21, 90]
    found = trees([Sequence_(tuple(range(1000 * k, 1000 * k + size + 1)), 1) for k, size in enumerate(sizes)])
    batched = list(batches(found, 60))
    assert sorted(len(t) for batch in batched for t in batch) == sorted(sizes)
    assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= 60 for batch in batched)
    assert len(batched[0]) == 1 and len(batched[0][0]) == 90  # the longest first: what does not fit shows at once


FAMILIES = ["llama", "llama_tied", "llama_mqa", "gemma", "olmo", "phi", "gpt_neox", "smollm3", "seed_oss_bias"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_says_what_sequences_say_by_themselves(family):
    """A float64 model, but transformers takes rotary angles and norms in float32: 1e-5 of some tens of nats."""
    model = pipeline.shared(family)
    generator = np.random.default_rng(3)
    asked = []
    for _ in range(5):
        question = generator.integers(3, pipeline.VOCAB, generator.integers(2, 12)).tolist()
        for _ in range(3):
            reply = generator.integers(3, pipeline.VOCAB, generator.integers(1, 6)).tolist()
            asked.append(Sequence_((*question, *reply), len(reply)))
    best = naive(model, asked[0])[2]  # a continuation that greedy decoding would take
    asked.append(Sequence_((*asked[0].tokens[: -asked[0].continuation], best), 1))
    found = {}
    for batch in batches(trees(asked), 64):
        found |= answers(Learner(model), batch, asked)
    for index, sequence in enumerate(asked):
        log_prob, greedy, _ = naive(model, sequence)
        assert found[index].log_prob == pytest.approx(log_prob, abs=1e-5)
        assert found[index].greedy == greedy
    assert found[len(asked) - 1].greedy


def naive(model, sequence):
    """(log-probability, whether greedy decoding says so, the token that greedy decoding would begin with)"""
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([sequence.read])).logits[0].log_softmax(-1)[-sequence.continuation :]
    targets = torch.tensor(sequence.tokens[-sequence.continuation :])
    likeliest = logs.argmax(-1)
    return float(logs.gather(1, targets[:, None]).sum()), bool((likeliest == targets).all()), int(likeliest[0])
