"""What goes while a model trains: the pace, what units are worth, and which group is next; by formulas and worked examples."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
import torch
from shrinking import SEQ, UPDATE, kinds_of

from prunus.anatomy import Anatomy
from prunus.axes import kind_of
from prunus.distributed import ALONE
from prunus.train.learner import Learner
from prunus.train.loop import Hook, Training, train_
from prunus.train.optim import adamw, start_slots_
from prunus.train.schedule import Schedule
from prunus.train.shapes import config_of, fresh
from prunus.train.shrink import goal as goals
from prunus.train.shrink.goal import Goal
from prunus.train.shrink.groups import Chooser, Standing
from prunus.train.shrink.pace import Pace
from prunus.train.shrink.part import PacePart, PrunePart, SaliencyPart
from prunus.train.shrink.saliency import Saliency, _placed

# -- the pace: closed forms -----------------------------------------------------------------------------------------------


def test_the_share_follows_the_curve_it_names():
    line = Pace(PacePart(start=0.2, end=0.6), 1000, 10)
    assert [line.share(t) for t in (0, 199, 200, 400, 600, 1000)] == pytest.approx([0, 0, 0, 0.5, 1, 1])
    cubic = Pace(PacePart(start=0, end=1, power=3), 1000, 10)
    assert cubic.share(500) == pytest.approx(1 - 0.5**3)
    rounds = Pace(PacePart(start=0, end=1, rounds=4), 1000, 10)
    assert [rounds.share(t) for t in (249, 250, 499, 500, 999, 1000)] == pytest.approx([0, 0.25, 0.25, 0.5, 0.75, 1])
    one = Pace(PacePart(start=0.3, end=0.3, rounds=1), 1000, 10)
    assert [one.share(t) for t in (299, 300)] == [0, 1]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_what_goes_is_in_proportion_to_the_learning_rate(power):
    """Under a cosine to zero it is the integral of (1 + cos(pi t)) / 2 from start to end, to 1e-3 with 2,000 updates."""
    rate = Schedule("cosine", 3.0, 20_000, warmup=0, floor=0)
    pace = Pace(PacePart(kind="rate", start=0.1, end=0.9, power=power), 20_000, 10, rate)
    each = [pace.share(t) - pace.share(t - 10) for t in range(10, 20_001, 10)]
    assert sum(each) == pytest.approx(1) and pace.share(18_000) == 1 and pace.share(2000) == 0 and min(each) >= 0
    inside = [(gone, rate(t)) for t, gone in zip(range(10, 20_001, 10), each, strict=True) if 2000 < t <= 18_000]
    assert all(gone * inside[0][1] ** power == pytest.approx(inside[0][0] * r**power) for gone, r in inside)
    if power == 1:
        area = lambda t: (t + math.sin(math.pi * t) / math.pi) / 2  # noqa: E731
        for t in (0.3, 0.5, 0.8):
            assert pace.share(int(20_000 * t)) == pytest.approx((area(t) - area(0.1)) / (area(0.9) - area(0.1)), abs=1e-3)
    rounds = Pace(PacePart(kind="rate", start=0, end=1, rounds=2), 1000, 100, Schedule("constant", 1.0, 1000, warmup=0))
    assert [t for t in range(100, 1001, 100) if rounds.cuts(t - 100, t)] == [500, 1000]
    nothing = Pace(PacePart(kind="rate", start=0.42, end=0.45), 1000, 100)
    assert [nothing.share(t) for t in (400, 500)] == [0, 1]


@pytest.mark.parametrize("alike", [True, False])
def test_a_coarse_look_lets_no_pace_pass_that_a_fine_one_refuses(alike):
    anatomy = Anatomy.of(config_of("nano", 0))
    part = PrunePart(target={"params": 1_000_000}, alike=alike)
    goal = Goal.of(part, anatomy, SEQ)
    left = {n: goals._largest_first(part, anatomy, goal, n) for n in (60, 90, 120, 140, 200)}
    assert min(left.values()) <= goal.value < max(left.values())  # some arrive
    for groups, fine in left.items():
        coarse = goals._largest_first(part, anatomy, goal, groups, 8)
        assert coarse > goal.value or fine <= goal.value
        assert coarse == pytest.approx(fine, rel=0.05)


def test_groups_go_after_whole_updates():
    """Two groups after every three updates, behind a beginning of 0.1 of 1,000 tokens in updates of 30 (so 120)."""
    pace = Pace(PacePart(kind="steps", start=0.1, prune=2, train=3), 1000, 30)
    assert [pace.groups(t) for t in (0, 120, 209, 210, 299, 300)] == [0, 0, 0, 2, 2, 4]
    assert pace.cuts(180, 210) and not pace.cuts(210, 240) and pace.most_groups == 2 * ((1000 - 120) // 90)


def test_once_is_before_the_first_update():
    pace = Pace(PacePart(kind="once"), 1000, 100)
    assert pace.share(0) == 1.0 and not pace.cuts(0, 100) and pace.groups(500) is pace.most_groups is None


def test_what_updates_leave_over():
    """1,050 tokens are ten updates of 100 and a half: the last cut by the rate is at the tenth, and nothing comes behind it."""
    pace = Pace(PacePart(kind="rate", start=0, end=1), 1050, 100, Schedule("constant", 1.0, 1050, warmup=0))
    assert [pace.share(t) for t in (0, 100, 550, 1000, 1050, 1150)] == pytest.approx([0, 0.1, 0.5, 1, 1, 1])
    assert pace.updates_until(0, lambda t: t >= 1000) == 10 and pace.updates_until(0, lambda t: t > 1000) is None
    thirds = Pace(PacePart(start=0, end=1, rounds=3), 30, 1)
    assert [thirds.share(t) for t in (9, 10, 20)] == pytest.approx([0, 1 / 3, 2 / 3])  # 10 / 30 * 3 is a little less than 1


def test_updates_until_something_is_due():
    pace = Pace(PacePart(), 1000, 100)
    assert [pace.updates_until(tokens, lambda t: t >= 450) for tokens in (0, 300, 400, 500)] == [5, 2, 1, 1]
    assert pace.updates_until(0, lambda t: False) is None and pace.updates_until(1000, lambda t: True) is None


def test_a_curve_cuts_only_where_it_falls():
    pace = Pace(PacePart(start=0.2, end=0.6, rounds=2), 1000, 100)
    assert [t for t in range(100, 1001, 100) if pace.cuts(t - 100, t)] == [400, 600]


# -- saliency: against the naive formula ----------------------------------------------------------------------------------


class Watch(Hook):
    """Keeps every micro-batch's own gradients in float64, as backward passes bring them, and every update's, their sum."""

    def __init__(self, parameters):
        self.updates, self.parts = [], [[]]
        for name, p in parameters.items():
            p.register_hook(lambda g, name=name: self._came(name, g.double()))

    def _came(self, name, gradient):
        parts = self.parts[-1]
        if not parts or name in parts[-1]:
            parts.append({})
        parts[-1][name] = gradient

    def before_clip(self, run):
        weights = {n: p.detach().double().clone() for n, p in run.learner.trained.items()}
        parts = self.parts[-1]
        self.updates.append((weights, {n: sum(part[n] for part in parts) for n in parts[0]}))
        self.parts.append([])


def watched(metric, matrices, average, axes, micro=2, updates=3, name="llama"):
    """(a Saliency that saw some updates with clipping on, what a Watch kept, the run)"""
    config = tiny.tiny_config(name)
    model = fresh(config, init="standard", seed=1, dtype=torch.float32).train()
    ids = torch.randint(0, config.vocab_size, (updates, 4, SEQ + 1), generator=torch.Generator().manual_seed(0))

    class Feed:
        def take(self, position, count):
            return type("B", (), {"ids": ids[position // 4]})

    optimizer = adamw(model.named_parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    start_slots_(optimizer, 0)
    learner = Learner(model)
    watch = Watch(learner.trained)
    anatomy = Anatomy.of(config)
    saliency = Saliency(
        SaliencyPart(metric=metric, matrices=matrices, average=average), anatomy, axes, learner.trained, ALONE
    )

    class See(Hook):
        def after_backward(self, run):
            saliency.see_part()

        def before_clip(self, run):
            saliency.see(run, UPDATE)

    schedule = Schedule("constant", 1e-2, 10**6, warmup=0)
    run = Training(learner, optimizer, Feed(), schedule, batch=4, micro=micro, clip=1e-4, hooks=(watch, See()))
    train_(run, updates)
    return saliency, watch, run


def naive(metric, w, g, fisher):
    if metric == "first":
        return (w * g).abs()
    return (w * g - 0.5 * w * w * fisher).abs() if metric == "second" else 0.5 * w * w * fisher


@pytest.mark.parametrize("metric", ["first", "second", "hessian"])
@pytest.mark.parametrize("matrices", ["output", "output+embedding", "all"])
@pytest.mark.parametrize("axes", [("kv_heads", "intermediate", "hidden"), ("intermediate",), ("kv_heads", "layers")])
@pytest.mark.parametrize("micro", [2, 4])
def test_units_are_worth_what_the_formula_says(metric, matrices, axes, micro):
    """Element by element in float64, from gradients before a clip that leaves a ten-thousandth of them. Float32 sums: 1e-5."""
    average = 0.8
    saliency, watch, run = watched(metric, matrices, average, axes, micro)
    anatomy = saliency.anatomy
    running = {}
    for k, (weight, gradient) in enumerate(watch.updates):
        parts = watch.parts[k]
        assert len(parts) == 4 // micro
        for name, tensor in anatomy.tensors.items():
            reads = name.endswith(("o_proj.weight", "down_proj.weight"))
            embeds = matrices == "output+embedding" and name == "model.embed_tokens.weight"
            if embeds or (tensor.is_matrix and (matrices == "all" or reads)):
                fisher = UPDATE * sum(part[name] ** 2 for part in parts)
                now = naive(metric, weight[name], gradient[name], fisher)
                running[name] = now if k == 0 else average * running[name] + (1 - average) * now
    table = saliency.table(run, Standing.of(anatomy).alive)
    for name, values in table.values.items():
        axis = anatomy.axes[name]
        for unit in range(axis.size):
            if name == "layers":
                own = [n for n in running if anatomy.tensors[n].layer == unit]
                counted = [n for n in own if any(kind_of(a.name) in ("kv_heads", "intermediate") and s.param == n
                                                for a in anatomy.axes.values() for s in a.spans)]  # fmt: skip
                expected = sum(float(running[n].sum()) for n in counted)
            else:
                spans = [s for s in axis.spans if s.param in running]
                expected = sum(float(running[s.param].index_select(s.dim, s.rows([unit])[0]).sum()) for s in spans)
            assert values[unit] == pytest.approx(expected, rel=1e-5), (name, unit)


@pytest.mark.parametrize("metric", ["first", "second"])
def test_watching_changes_no_gradient(metric):
    """Micro-batches' gradients are taken apart and given back: the run is that of `adam`, where nothing is, bit for bit."""
    runs = [watched(name, "all", 0.8, ("intermediate", "hidden"), micro=1)[2] for name in (metric, "adam")]
    weights, plain = (run.learner.trained for run in runs)
    assert all(torch.equal(weights[name], plain[name]) for name in plain) and runs[0].last == runs[1].last


def test_adams_own_moment_needs_no_gathering():
    saliency, watch, run = watched("adam", "output", 0.0, ("intermediate",), updates=4)
    name = "model.layers.1.mlp.down_proj.weight"
    second = torch.zeros_like(watch.updates[0][0][name])
    for _, gradients in watch.updates:
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        second = (
            0.95 * second + 0.05 * (gradients[name] * min(1.0, 1e-4 / (norm + 1e-6))) ** 2
        )  # clipped, as AdamW sees them
    w = run.learner.trained[name].detach().double()
    values = saliency.table(run, Standing.of(saliency.anatomy).alive).values["layers.1.intermediate"]
    assert values == pytest.approx((0.5 * w * w * second).sum(0).numpy(), rel=1e-4) and not saliency.saved()


# -- what goes: the worked example of the notes ---------------------------------------------------------------------------


def worked_example():
    """One layer, stem of two, two heads of one, FFN of three, vocabulary of four, tied: S^o and S^d as in the notes."""
    config = config_of(
        {
            "model_type": "llama", "vocab_size": 4, "hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 1, "intermediate_size": 3, "tie_word_embeddings": True,
        },
        0,
    )  # fmt: skip
    anatomy = Anatomy.of(config)
    out, down = torch.tensor([[0.4, 0.5], [4.0, 1.0]]), torch.tensor([[0.1, 0.4, 0.1], [3.0, 0.9, 2.0]])
    named = {n: torch.nn.Parameter(torch.zeros(t.shape)) for n, t in anatomy.tensors.items()}
    saliency = Saliency(SaliencyPart(average=0.0), anatomy, ("kv_heads", "intermediate", "hidden"), named, ALONE)
    saliency.held["model.layers.0.self_attn.o_proj.weight"].mean.copy_(out)
    saliency.held["model.layers.0.mlp.down_proj.weight"].mean.copy_(down)
    return anatomy, saliency


def test_units_of_the_worked_example():
    anatomy, saliency = worked_example()
    table = saliency.table(None, Standing.of(anatomy).alive)
    assert table.values["layers.0.kv_heads"] == pytest.approx([4.4, 1.5])
    assert table.values["layers.0.intermediate"] == pytest.approx([3.1, 1.3, 2.1])
    assert table.values["hidden"] == pytest.approx([1.5, 10.9])
    inner = table.values["layers.0.kv_heads"].sum() + table.values["layers.0.intermediate"].sum()
    assert inner == pytest.approx(table.values["hidden"].sum()) == pytest.approx(12.4)  # conservation


@pytest.mark.parametrize(
    ("per", "kind", "units"),
    [("none", "intermediate", {"layers.0.intermediate": (1,)}), ("params", "hidden", {"hidden": (0,)}),
     ("elements", "hidden", {"hidden": (0,)})],
)  # fmt: skip
def test_how_kinds_compare_decides(per, kind, units):
    """Plain sums take the channel (1.3 of 1.3, 1.5, 1.5); by parameters it is 1.5 / 25 against 1.5 / 8 and 1.3 / 6: with the norms'
    gains the stem channel owns 8 + 9 + 3 + 4 + ... = 24 + 1. By elements 1.5 / 5, 1.5 / 2, 1.3 / 2.
    """
    anatomy, saliency = worked_example()
    part = PrunePart(target={"params": 30}, per=per, floor={"kv_heads": 1, "intermediate": 1, "hidden": 1})
    goal = Goal.of(part, anatomy, 4)
    standing = Standing.of(anatomy)
    found = Chooser(part, goal, 4).next(standing, saliency.table(None, standing.alive), 0)
    assert found is not None and (found[0].kind, dict(found[0].units)) == (kind, units)


def test_a_layer_has_the_elements_of_its_counted_matrices():
    """Its o_proj and down_proj; and where a layer before it is dead, the last one is still there."""
    anatomy = Anatomy.of(tiny.tiny_config("llama"))
    named = {n: torch.nn.Parameter(torch.zeros(t.shape)) for n, t in anatomy.tensors.items()}
    saliency, standing = Saliency(SaliencyPart(), anatomy, ("layers", "intermediate"), named, ALONE), Standing.of(anatomy)
    table = saliency.table(None, standing.alive)
    own = sum(anatomy.tensors[n].numel for n in saliency.held if anatomy.tensors[n].layer == 1)
    assert table.elements({"layers": (1,)}, anatomy) == own > 0
    last = anatomy.shape.num_hidden_layers - 1
    standing.drop({"layers": (0,), f"layers.{last}.intermediate": (3, 5)})
    now = standing.with_layers
    assert table.elements({f"layers.{last}.intermediate": (0,)}, now) == anatomy.shape.hidden_size
    assert table.elements({"layers": (last,)}, now) == own - 2 * anatomy.shape.hidden_size


def test_what_goes_with_one_axis_leaves_the_others_sums():
    anatomy, saliency = worked_example()
    standing = Standing.of(anatomy)
    table = saliency.table(None, standing.alive)
    table.drop({"layers.0.intermediate": (1,)})
    assert table.values["hidden"] == pytest.approx([1.1, 10.0]) and table.values["layers.0.intermediate"][1] == np.inf
    table.drop({"hidden": (0,)})
    assert table.values["layers.0.kv_heads"] == pytest.approx([4.0, 1.0])
    assert table.values["layers.0.intermediate"][[0, 2]] == pytest.approx([3.0, 2.0])
    assert float(table.matrices["model.layers.0.mlp.down_proj.weight"].sum()) == pytest.approx(5.0)


@pytest.mark.parametrize("name", ["llama_mha", "llama_gqa4", "qwen2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("depth", [False, True])
def test_sums_kept_up_are_sums_made_anew(name, alike, depth):
    """A hundred groups, one after another: every unit's number is that of the matrices with all that went struck out."""
    config = tiny.tiny_config(name)
    anatomy = Anatomy.of(config)
    kinds = kinds_of(anatomy) + (["layers"] if depth else [])
    named = {n: torch.nn.Parameter(torch.zeros(t.shape)) for n, t in anatomy.tensors.items()}
    saliency = Saliency(SaliencyPart(), anatomy, kinds, named, ALONE)
    generator = torch.Generator().manual_seed(3)
    for held in saliency.held.values():
        held.mean.copy_(torch.rand(held.mean.shape, generator=generator, dtype=torch.float64))
    part = PrunePart(
        target={"ratio": 0.6 if len(kinds) > 1 else 0.15}, axes=kinds, alike=alike, floor=dict.fromkeys(kinds, 1)
    )
    goal = Goal.of(part, anatomy, SEQ)
    standing, chooser = Standing.of(anatomy), Chooser(part, goal, SEQ)
    table = saliency.table(None, standing.alive)
    seen = set()
    for _ in range(100):
        found = chooser.next(standing, table, goal.value)
        if found is None:
            break
        seen.add(found[0].kind)
        standing.drop(found[0].units)
        table.drop(found[0].units)
    anew = saliency.table(None, standing.alive)
    assert seen <= set(kinds) and (len(seen) > 1 or len(kinds) == 1)
    for axis, values in table.values.items():
        assert values == pytest.approx(anew.values[axis], rel=1e-4, abs=1e-4), axis


class Beside:
    """One of two processes, each a thread, that hold the upper and the lower rows: sums wait for the other's part."""

    alone = False

    def __init__(self, rank, board, both):
        self.rank, self.board, self.both, self.first = rank, board, both, rank == 0

    def first_row(self, total):
        return (total + 1) // 2 * self.rank

    def rows(self, tensor):
        half = self.first_row(len(tensor)) or (len(tensor) + 1) // 2
        return tensor[half:] if self.rank else tensor[:half]

    def sum_(self, tensor):
        self.board[self.rank] = tensor.clone()
        self.both.wait()
        total = self.board[0] + self.board[1]
        self.both.wait()
        return tensor.copy_(total)


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize(
    ("metric", "matrices", "kinds"),
    [
        ("first", "output", ("kv_heads", "intermediate")),  # sums over rows, of which each holds some
        ("second", "all", ("kv_heads", "intermediate")),  # and rows that each holds for itself
        ("first", "all", ("kv_heads", "intermediate", "hidden")),
        ("hessian", "output+embedding", ("kv_heads", "hidden", "layers")),
    ],
)
def test_two_that_hold_half_the_rows_know_what_one_knows(name, metric, matrices, kinds):
    """After two updates, and after layers, channels and parts of the stem went. Sums of float32 in another order: 1e-5."""
    config = tiny.tiny_config(name)
    anatomy, updates, generator = Anatomy.of(config), 2, torch.Generator().manual_seed(0)
    weights = {n: torch.randn(t.shape, generator=generator) for n, t in anatomy.tensors.items()}
    gradients = [{n: torch.randn(t.shape, generator=generator) for n, t in anatomy.tensors.items()} for _ in range(updates)]
    going = [
        {f"layers.1.{kinds[0]}": (1,)},
        {kinds[1]: (0, 3)} if kinds[1] == "hidden" else {"layers.0.intermediate": (2, 5)},
    ]
    going += [{"hidden": (7,)}] * ("hidden" in kinds) + [{"layers": (0,)}] * ("layers" in kinds)

    def known(world, rows):
        named = {n: torch.nn.Parameter(rows(w).clone()) for n, w in weights.items()}
        saliency = Saliency(SaliencyPart(metric=metric, matrices=matrices, average=0.8), anatomy, kinds, named, world)
        for gradient in gradients:
            for n, p in named.items():
                p.grad = rows(gradient[n]).clone()
            saliency.see(None, UPDATE)
        saved = {n: t.clone() for n, t in saliency.saved().items()}
        for held in saliency.held.values():
            held.mean.fill_(-1.0)
        saliency.restore(saved)
        table = saliency.table(None, Standing.of(anatomy).alive)
        values = [{n: v.copy() for n, v in table.values.items()}]
        for units in going:
            table.drop(units)
            values.append({n: v.copy() for n, v in table.values.items()})
        return saved, values

    board, both = [None, None], threading.Barrier(2, timeout=60)
    worlds = [Beside(rank, board, both) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        halves = [pool.submit(known, world, world.rows) for world in worlds]
        halves = [half.result() for half in halves]
    saved, values = known(ALONE, lambda tensor: tensor)
    for half_saved, half_values in halves:
        assert half_saved.keys() == saved.keys()
        assert all(torch.allclose(half_saved[n].double(), saved[n].double(), rtol=1e-5) for n in saved)
        for one, other in zip(values, half_values, strict=True):
            assert one.keys() == other.keys()
            assert all(other[n] == pytest.approx(one[n], rel=1e-5, abs=1e-5) for n in one)
    assert any(not np.array_equal(values[0][n], values[-1][n]) for n in values[0])


def test_sums_are_kept_as_small_as_can_be():
    """One number a unit where one axis cuts a matrix; the matrix where two do."""
    for axes, dims in ((("kv_heads", "intermediate"), {1}), (("kv_heads", "intermediate", "hidden"), {2})):
        saliency, _, _ = watched("first", "output", 0.5, axes)
        assert {held.mean.dim() for held in saliency.held.values()} == dims


# -- what tests of whole runs cannot tell apart ------------------------------------------------------------------------------


def test_a_channel_of_the_stem_has_its_rows_in_every_counted_matrix():
    anatomy, saliency = worked_example()
    table = saliency.table(None, Standing.of(anatomy).alive)
    assert table.elements({"hidden": (0,)}, anatomy) == 2 + 3  # a row of o_proj and one of down_proj
    assert table.elements({"layers.0.kv_heads": (0, 1), "layers.0.intermediate": (2,)}, anatomy) == 2 * 2 + 2


class Inputs:
    """Stands where running sums of what matrices read stand."""

    def __init__(self, anatomy):
        generator = torch.Generator().manual_seed(5)
        self.of = {
            n: 1 + torch.rand(t.shape[1], generator=generator).double() for n, t in anatomy.tensors.items() if t.is_matrix
        }

    def inverse_diagonal(self, name):
        return self.of[name]


@pytest.mark.parametrize("metric", ["obc", "first"])
def test_what_matrices_read_counts_for_obc_alone(metric):
    """w^2 / [H^-1]_jj summed over a unit's weights; every other metric knows nothing of H."""
    anatomy = Anatomy.of(tiny.tiny_config("llama_mha"))
    generator = torch.Generator().manual_seed(0)
    named = {n: torch.nn.Parameter(torch.randn(t.shape, generator=generator)) for n, t in anatomy.tensors.items()}
    kinds = ("kv_heads", "intermediate", "hidden")
    saliency, alive = Saliency(SaliencyPart(metric=metric), anatomy, kinds, named, ALONE), Standing.of(anatomy).alive
    for held in saliency.held.values():
        held.mean.copy_(torch.rand(held.mean.shape, generator=generator))
    inputs = Inputs(anatomy)
    found = saliency.table(None, alive, inputs).values
    if metric == "first":
        plain = saliency.table(None, alive).values
        assert all(np.array_equal(found[name], plain[name]) for name in plain)
        return
    name = "model.layers.1.mlp.down_proj.weight"
    worth = named[name].detach().double().square() / inputs.of[name]
    assert found["layers.1.intermediate"] == pytest.approx(worth.sum(0).numpy(), rel=1e-5)
    held = [n for n in saliency.held if n.endswith(("o_proj.weight", "down_proj.weight"))]
    stem = sum((named[n].detach().double().square() / inputs.of[n]).sum(1) for n in held)
    assert found["hidden"] == pytest.approx(stem.numpy(), rel=1e-5)
    assert list(saliency.known()) == [] and saliency.saved() == {}
    saliency.restore({})  # nothing is kept of it


def test_what_was_saved_comes_back():
    saliency, _, _ = watched("first", "output", 0.5, ("kv_heads", "intermediate", "hidden"))
    before = {name: held.mean.clone() for name, held in saliency.held.items()}
    saved = {name: mean.clone() for name, mean in saliency.saved().items()}
    assert list(saliency.known()) == list(before) and any(bool(mean.any()) for mean in before.values())
    for held in saliency.held.values():
        held.mean.zero_()
    saliency.restore(saved)
    assert all(torch.equal(saliency.held[name].mean, mean) for name, mean in before.items())


@pytest.mark.parametrize("axes", [("kv_heads", "intermediate"), ("kv_heads", "intermediate", "hidden")])
def test_what_is_known_goes_on_in_the_smaller_model(axes):
    """Rows and columns of matrices, or entries of sums; and that something was seen, so that the next update is averaged."""
    saliency, *_ = watched("first", "output", 0.5, axes)
    after = Saliency(saliency.part, saliency.anatomy, axes, saliency.named, ALONE)
    kept = torch.arange(0, saliency.anatomy.shape.layers[0].intermediate_size, 2)
    stem = torch.arange(1, saliency.anatomy.shape.hidden_size)
    found = {}
    after.restore = found.update
    rows = lambda name: {1: kept, 0: stem} if "down_proj" in name else {}  # noqa: E731
    after.cut_from(saliency, rows, {name: name for name in saliency.held})
    for name, held in saliency.held.items():
        mean = held.mean
        if "down_proj" in name:
            mean = mean[stem][:, kept] if held.whole else mean[kept]
        assert torch.equal(found[f"saliency.{name}"], mean)
    assert after.count == saliency.count > 0
    whole = {0: (0,), 1: (1,)}
    assert all(saliency.follows(n) == (whole if held.whole else {1: (0,)}) for n, held in saliency.held.items())


def test_a_weight_without_a_gradient_is_worth_nothing():
    _, saliency = worked_example()
    for p in saliency.named.values():
        p.data.fill_(2.0)
    first, second = saliency.held
    saliency.named[first].grad = torch.ones_like(saliency.named[first])
    saliency.see(None, UPDATE)
    assert bool((saliency.held[first].mean == 2).all()) and not bool(saliency.held[second].mean.any())


def test_rows_are_placed_as_they_are():
    rows = torch.rand(2, 3, dtype=torch.float64)
    placed = _placed(rows, 1, 4)
    assert placed.dtype == torch.float64 and torch.equal(placed[1:3], rows) and not bool(placed[[0, 3]].any())


def test_without_a_rate_all_goes_at_the_end_itself():
    pace = Pace(PacePart(kind="rate", start=0.1, end=0.5), 1000, 100, lambda tokens: 0.0)
    assert [pace.share(t) for t in (400, 500, 600)] == [0, 1, 1]


def test_a_head_has_as_many_columns_as_it_is_wide():
    anatomy = Anatomy.of(tiny.tiny_config("llama"))
    named = {n: torch.nn.Parameter(torch.zeros(t.shape)) for n, t in anatomy.tensors.items()}
    saliency = Saliency(SaliencyPart(), anatomy, ("kv_heads", "intermediate"), named, ALONE)
    table, shape = saliency.table(None, Standing.of(anatomy).alive), anatomy.shape
    group = shape.layers[0].num_attention_heads // shape.layers[0].num_key_value_heads
    assert table.elements({"layers.0.kv_heads": (0, 1)}, anatomy) == 2 * group * shape.head_dim * shape.hidden_size
