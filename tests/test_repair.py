"""Repair at cuts while training: what is seen of activations, and that what is left errs less for it."""

from __future__ import annotations

import functools
from unittest import mock

import pipeline
import pytest
import tiny
import torch
from shrinking import events, log, pruning, run, tied
from training import SEQ, Killed, KilledAt, asked, weights

from prunus.anatomy import Anatomy
from prunus.axes import kind_of
from prunus.distributed import ALONE
from prunus.errors import UserError
from prunus.train.learner import Learner
from prunus.train.loss import IGNORED
from prunus.train.opening import prepare as opened
from prunus.train.shapes import config_of, fresh
from prunus.train.shrink.activations import Activations, points
from prunus.train.shrink.groups import Standing
from prunus.train.shrink.part import ActivationsPart, RepairPart, SaliencyPart
from prunus.train.shrink.repair import joint, repair_
from prunus.train.shrink.saliency import Saliency

ALL = ("kv_heads", "intermediate", "hidden", "norms")


def gram_of(seed, tokens, size):
    x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return x.T @ x


def error(lost, gram):
    """||X (W - W')^T||^2"""
    return float(((lost @ gram) * lost).sum())


# -- least squares --------------------------------------------------------------------------------------------------------


def test_column_after_column_is_all_at_once():
    """EfficientLLM's update, W <- W - W[:, p] x^T / x_p with H x = e_p and H^-1 <- H^-1 - x x^T / x_p. Float64: 1e-9."""
    gram, gone = gram_of(0, 40, 12), torch.tensor([2, 7, 3])
    w = torch.randn(5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    kept = torch.tensor([i for i in range(12) if i not in gone.tolist()])
    by_columns, inverse = w.clone(), torch.linalg.inv(gram)
    for p in gone.tolist():
        x = inverse[:, p].clone()
        by_columns -= torch.outer(by_columns[:, p], x) / x[p]
        inverse -= torch.outer(x, x) / x[p]
        inverse[p] = inverse[:, p] = 0
    at_once = w[:, kept] + w[:, gone] @ joint(gram, gone, kept, damp=0.0)
    assert not bool(by_columns[:, gone].abs().max() > 1e-9)
    torch.testing.assert_close(by_columns[:, kept], at_once, rtol=1e-9, atol=1e-9)
    refitted = torch.linalg.lstsq(torch.linalg.cholesky(gram).T[:, kept], torch.linalg.cholesky(gram).T @ w.T).solution.T
    torch.testing.assert_close(at_once, refitted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [3, 12, 200])
@pytest.mark.parametrize("damp", [1e-4, 1.0])
def test_repair_never_errs_more(tokens, damp):
    """Whatever was seen, be it fewer tokens than inputs, and however it is damped."""
    for seed in range(20):
        gram = gram_of(seed, tokens, 12)
        w = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gone = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[: 1 + seed % 6]
        kept = torch.tensor([i for i in range(12) if i not in gone.tolist()])
        cut, mended = w.clone(), w.clone()
        mended[:, kept] += w[:, gone] @ joint(gram, gone, kept, damp)
        cut[:, gone] = mended[:, gone] = 0
        assert error(w - mended, gram) < error(w - cut, gram)


# -- what is seen ---------------------------------------------------------------------------------------------------------


def seen(name, part=None, updates=2):
    """(Activations that saw some updates of two micro-batches, per update what every hooked module read, the learner)"""
    model = tiny.grown(tiny.tiny_config(name)).train()
    learner, anatomy = Learner(model), Anatomy.of(model.config)
    activations = Activations(part or ActivationsPart(average=0.5, every=3), anatomy, ALL, learner, ALONE)
    ids = torch.randint(0, tiny.VOCAB, (updates, 4, SEQ), generator=torch.Generator().manual_seed(0))
    read = [{name: [] for name in activations.sums} for _ in range(updates)]
    for step in range(updates):
        activations.look(True, step)
        handles = [
            model.get_submodule(n.removesuffix(".weight")).register_forward_pre_hook(
                lambda _, args, kept=kept: kept.append(args[0].detach().double())
            )
            for n, kept in read[step].items()
            if n in anatomy.tensors
        ]
        for part_BT in ids[step].split(2):
            learner(part_BT, part_BT)
        for handle in handles:
            handle.remove()
    return activations, read, learner


@pytest.mark.parametrize("name", ["llama_gqa4", "phi3", "gemma2", "gpt_neox"])
def test_sums_are_those_of_the_sampled_tokens(name):
    """Tokens 0, 3, ... of the first update's sequences count half of tokens 1, 4, ... of the second's. Float32: 1e-5."""
    activations, read, learner = seen(name)
    names = [n for n in read[0] if read[0][n]]
    sampled = [{n: torch.cat(read[step][n])[:, step::3].flatten(0, 1) for n in names} for step in (0, 1)]
    assert set(points(activations.anatomy, ALL)) <= set(names) and activations.norms
    count = 0.5 * len(sampled[0][names[0]]) + len(sampled[1][names[0]])
    for n in names:
        if n in activations.norms:
            one, two = ((x.square() / x.square().sum(1, keepdim=True)).sum(0) for x in (s[n] for s in sampled))
        else:
            one, two = (x.T @ x for x in (s[n] for s in sampled))
        torch.testing.assert_close(activations.mean(n), (0.5 * one + two) / count, rtol=1e-4, atol=1e-5)
    before = {n: t.clone() for n, t in activations.sums.items()}
    ids = torch.ones(2, SEQ, dtype=torch.int64)
    learner(ids, torch.full_like(ids, IGNORED))  # a process that only keeps others company
    learner.nll(ids, ids)  # validation
    activations.look(False, 3)
    learner(ids, ids)
    assert all(t.equal(before[n]) for n, t in activations.sums.items())


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("llama_gqa4", "kv_heads"),
        ("qwen2", "kv_heads"),
        ("phi3", "kv_heads"),
        ("gemma2", "kv_heads"),
        ("llama_gqa4", "heads"),
    ],
)
@torch.no_grad()
def test_what_is_left_errs_less_on_what_was_seen(name, heads):
    activations, _, learner = seen(name, ActivationsPart(average=0.0, every=1), updates=1)
    anatomy, standing = activations.anatomy, Standing.of(activations.anatomy)
    units = {n: (1, a.size - 1) for n, a in anatomy.axes.items() if kind_of(n) == "intermediate"}
    units |= {n: (1,) for n, a in anatomy.axes.items() if kind_of(n) == heads and a.size > 1} | {"hidden": (0, 3, 9)}
    standing.drop(units)
    before = {n: p.detach().double().clone() for n, p in learner.trained.items()}
    means = {n: activations.mean(n) for n in activations.points}
    training = mock.Mock(learner=learner)
    repair_(training, anatomy, activations, RepairPart(kind="least-squares", stem="least-squares"), units, standing.alive)
    checked = 0
    for axis_name, gone in units.items():
        for span in anatomy.axes[axis_name].spans:
            first = next((f for f, all_ in activations.points.items() if span.param in all_), None)
            if span.dim == 1 and first is not None:
                rows = span.rows(gone).reshape(-1)
                cut, mended = before[span.param].clone(), learner.trained[span.param].detach().double().clone()
                cut[:, rows] = mended[:, rows] = 0
                was, now = (error(before[span.param] - w, means[first]) for w in (cut, mended))
                assert now < 0.99 * was, (span.param, now, was)
                checked += 1
    assert checked == sum(len(matrices) for matrices in activations.points.values())


@torch.no_grad()
def test_norms_keep_what_they_divided_by():
    """R2: the gain falls by the root mean square of rms_kept / rms_all over tokens; the mean ratio lies within 2 % here."""
    activations, read, learner = seen("llama_gqa4", ActivationsPart(average=0.0, every=1), updates=1)
    gone = (0, 3, 9, 20)
    standing = Standing.of(activations.anatomy)
    standing.drop({"hidden": gone})
    before = {n: learner.trained[n].detach().clone() for n in activations.norms}
    repair_(
        mock.Mock(learner=learner),
        activations.anatomy,
        activations,
        RepairPart(stem="gain"),
        {"hidden": gone},
        standing.alive,
    )
    kept = [j for j in range(tiny.HIDDEN) if j not in gone]
    for name in activations.norms:
        square = torch.cat(read[0][name]).flatten(0, 1).square()
        ratio = (square[:, kept].sum(1) / square.sum(1)).sqrt()
        factor = (learner.trained[name] / before[name]).double()
        assert factor.std() < 1e-6 and float(factor[0]) == pytest.approx(float(ratio.square().mean().sqrt()), rel=1e-5)
        assert float(factor[0]) == pytest.approx(float(ratio.mean()), rel=0.02) and factor[0] < 0.99
    activations.drop({"hidden": gone})
    for name in activations.norms:
        share = activations.mean(name)
        assert not bool(share[list(gone)].any()) and float(share.sum()) == pytest.approx(1, rel=1e-5)


# -- Optimal Brain Compression --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_gqa4", "phi3"])
@pytest.mark.parametrize("matrices", ["output", "all"])
@torch.no_grad()
def test_units_are_worth_what_their_layers_would_err(name, matrices):
    """Sums of w^2 / [H^-1]_jj in float64, of what is left when some units are zeroed: float32 sums, 1e-4."""
    activations, _, learner = seen(name, ActivationsPart(average=0.5, every=2))
    anatomy, kinds, gone = activations.anatomy, ("kv_heads", "intermediate", "hidden"), {"layers.1.intermediate": (0, 5)}
    part = SaliencyPart(metric="obc", matrices=matrices)
    saliency, standing = Saliency(part, anatomy, kinds, learner.trained, ALONE), Standing.of(anatomy)
    activations.drop(gone)
    standing.drop(gone)
    for span in anatomy.axes["layers.1.intermediate"].spans:
        learner.trained[span.param].index_fill_(span.dim, span.rows(gone["layers.1.intermediate"]).reshape(-1), 0)
    worth = {}
    for first, all_ in activations.points.items():
        mean = activations.mean(first)
        left = [j for j in range(len(mean)) if mean[j, j] > 0]
        hessian = mean[left][:, left]
        inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(left)))
        for matrix in all_:
            if matrices == "all" or matrix.endswith(("o_proj.weight", "down_proj.weight")):
                w = learner.trained[matrix].double()
                worth[matrix] = torch.zeros_like(w)
                worth[matrix][:, left] = w[:, left] ** 2 / inverse.diagonal()
    table = saliency.table(mock.Mock(), standing.alive, activations)
    assert table.values["layers.1.intermediate"][[0, 5]].tolist() == [float("inf")] * 2 and not saliency.saved()
    for axis_name, values in table.values.items():
        axis = anatomy.axes[axis_name]
        for unit in (u for u in range(axis.size) if u not in gone.get(axis_name, ())):
            expected = sum(
                float(worth[s.param].index_select(s.dim, s.rows([unit])[0]).sum()) for s in axis.spans if s.param in worth
            )
            assert values[unit] == pytest.approx(expected, rel=1e-4), (axis_name, unit)


# -- runs -----------------------------------------------------------------------------------------------------------------

MEND = {"repair": {"kind": "least-squares", "stem": "least-squares"}, "activations": {"average": 0.9, "every": 3}}
PARTS = {
    "curve": {"slice_at": 0.1, **MEND},
    "inner": {"slice_at": 0.2, "axes": ["kv_heads", "intermediate"], "repair": {"kind": "least-squares"}, "target": {"ratio": 0.4}},
    "depth": {
        "axes": ["layers", "intermediate"], "target": {"ratio": 0.4}, "repair": {"kind": "least-squares"},
        "saliency": {"metric": "obc"},
    },
}  # fmt: skip


@functools.cache
def done(name):
    out = pipeline.scratch() / f"repaired-{name}"
    return run(out, tied(**PARTS[name])), out


@pytest.mark.parametrize(("name", "at"), [("curve", 5), ("depth", 3)])
def test_stopped_anywhere_it_goes_on_bit_for_bit(name, at):
    record, whole = done(name)
    assert record["figures"]["pruning"]["met"] and record["figures"]["flops"]["scoring"] > 0
    out = pipeline.scratch() / f"repaired-{name}-{at}"

    with pytest.raises(Killed):
        run(out, tied(**PARTS[name]), KilledAt(at))
    run(out, tied(**PARTS[name]))
    one, other = weights(whole), weights(out)
    assert one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one)
    assert (whole / "ledger.json").read_bytes() == (out / "ledger.json").read_bytes()


def test_zeroed_is_sliced_along_the_way():
    """As without repair: the same losses and weights but for rounding (1e-4 after eight updates).

    Of the matrices that were solved for, 1e-3: heads that are nearly collinear raise a rounding of the Gram matrix (1e-7) by its
    condition, which damping holds to some 1e4; the losses hardly see it, as it lies where the inputs are small.
    """
    part = {k: v for k, v in PARTS["inner"].items() if k != "slice_at"}
    outs = [pipeline.scratch() / f"repaired-sliced-at-{at}" for at in (0, 1)]
    for at, out in zip((0.0, 1.0), outs, strict=True):
        run(out, tied(slice_at=at, **part))
    one, other = (weights(out) for out in outs)
    assert [e["pruned"]["units"] for e in events(outs[0])] == [e["pruned"]["units"] for e in events(outs[1])]
    for name in one:
        bound = 1e-3 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1e-4
        assert (one[name] - other[name]).abs().max() < bound, name
    first, second = ([line["loss"] for line in log(out) if "loss" in line] for out in outs)
    assert first == pytest.approx(second, abs=1e-4)


def test_repair_lessens_what_a_cut_costs():
    """Half of the FFN at once from a model that was trained a little: the loss after is lower than without."""
    after = {}
    source = pipeline.scratch() / "repair-parent"
    run(source, asked())
    for kind in ("none", "least-squares"):
        out = pipeline.scratch() / f"repair-{kind}"
        part = {
            "axes": ["intermediate"],
            "target": {"intermediate_size": 12},
            "repair": {"kind": kind},
            "activations": {"every": 1},
        }
        part["pace"] = {"kind": "once", "samples": 32}
        part = part if kind != "none" else {k: v for k, v in part.items() if k != "activations"}
        run(out, pruning({"model": {"source": str(source / "model")}, "optimizer__lr": 1e-12}, **part))
        after[kind] = next(line["loss"] for line in log(out) if "loss" in line)
    assert after["least-squares"] < after["none"]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"axes": ["intermediate"], "repair": {"stem": "gain"}}, "mends cuts of hidden, which axes leaves out"),
        ({"axes": ["hidden"], "repair": {"kind": "least-squares"}}, "mends cuts of kv_heads, heads and intermediate"),
        ({"activations": {"every": 2}}, "activations are looked at for"),
        ({"activations": {"every": SEQ + 1}, "repair": {"stem": "gain"}}, f"more than the {SEQ} tokens"),
        ({"repair": {"kind": "ridge"}}, r"prune\.repair\.kind"),
    ],
)
def test_wrong_repair_is_refused(part, said):
    with pytest.raises(UserError, match=said):
        opened(pruning(**part), pipeline.scratch() / "refused")


def test_compiled_blocks_show_nothing():
    with pytest.raises(UserError, match=r"repair or saliency\.metric: obc looks at what blocks give and read"):
        pruning({"compile": True}, repair={"stem": "gain"})


def test_looking_costs_little():
    """FLOPs of looking at a sixteenth of the tokens: below 5 % of an update of a layer of SmolLM2-135M's sizes."""
    shape = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 576, "num_hidden_layers": 1, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536, "tie_word_embeddings": True,
    }  # fmt: skip
    config = config_of(shape, 0)
    learner = Learner(fresh(config, init="standard", seed=0, dtype=torch.float32))
    activations = Activations(ActivationsPart(), Anatomy.of(config), ALL, learner, ALONE)
    assert 0 < activations.flops(8, 512) < 0.05 * 3 * Anatomy.of(config).flops(512) * 8
