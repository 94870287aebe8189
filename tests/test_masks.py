"""Learned masks: the gates' closed forms, where they act, and runs that end in exactly the shape that was asked for."""

from __future__ import annotations

import functools
import math

import pipeline
import pytest
import tiny
import torch
from shrinking import SEQ, UPDATE, events, log, pruning, run
from training import Killed, KilledAt, asked, tiny_shape, weights

from prunus import show_train
from prunus.anatomy import Anatomy
from prunus.axes import kind_of
from prunus.cut import slice_plan, slice_tensors
from prunus.distributed import ALONE
from prunus.errors import UserError
from prunus.gates import LIMIT, Gates, Rates, alive, drawn, least_updates, off_target, penalty, settled, top
from prunus.hf import build, target_for
from prunus.keep import Keep
from prunus.scaling import attach_, fold_, places
from prunus.train import recipe as recipes
from prunus.train.estimate import planned
from prunus.train.learner import Learner
from prunus.train.loop import Hook, Training, train_, validate
from prunus.train.opening import prepare as opened
from prunus.train.optim import adamw, start_slots_
from prunus.train.schedule import Schedule
from prunus.train.shapes import config_of, fresh
from prunus.train.shrink.cutting import Cutting
from prunus.train.shrink.masks import Masks, missed

# -- one gate: closed forms ------------------------------------------------------------------------------------------------


def test_open_gates_are_as_likely_as_the_formula_says():
    """sigmoid(a + 1.5986): .832, .998, .047 (algorithms.md 2.13); by chance of 200,000 draws within four deviations."""
    a = torch.tensor([0.0, LIMIT, -LIMIT], dtype=torch.float64)
    assert alive(a).tolist() == pytest.approx([0.832, 0.998, 0.047], abs=5e-4)
    assert alive(a[:1]).item() == pytest.approx(1 / (1 + math.exp(-2 / 3 * math.log(11))))
    n = 200_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for value in (-3.0, -1.0, 0.0, 2.0):
        z = drawn(torch.tensor(value, dtype=torch.float64), u)
        for found, likely in (((z > 0), alive(torch.tensor(value))), ((z < 1), alive(torch.tensor(-value)))):  # by symmetry
            p = float(likely)
            assert float(found.double().mean()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_a_gate_by_hand():
    """u = 1/2 has a logit of 0: s = sigmoid(1.5 a), stretched by 1.2, moved by -0.1; at the ends it is clipped."""
    half = torch.tensor(0.5)
    assert drawn(torch.tensor(0.0), half).item() == pytest.approx(0.5)
    assert drawn(torch.tensor(0.4), half).item() == pytest.approx(1.2 / (1 + math.exp(-0.6)) - 0.1)
    assert drawn(torch.tensor([4.0, -4.0]), half).tolist() == [1.0, 0.0]
    assert drawn(torch.zeros(2), torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]  # noise at its ends is no infinity


def test_settled_gates_are_the_largest():
    a = torch.tensor([[1.0, 3.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    count = torch.tensor([2, 3])
    assert top(a, count).tolist() == [[True, True, False, False], [True, True, True, False]]  # ties: the lower index
    z = settled(a, count)
    assert z[0].tolist() == pytest.approx([1 / (1 + math.exp(-1.2)), 1 / (1 + math.exp(-3.6)), 0, 0])
    assert settled(a, torch.tensor([0, 4]))[0].tolist() == [0, 0, 0, 0]


def test_gradients_of_gates_and_penalty():
    g = torch.Generator().manual_seed(1)
    a = torch.randn(3, 5, generator=g, dtype=torch.float64).requires_grad_(True)
    pair = torch.tensor([0.7, 2.0], dtype=torch.float64, requires_grad=True)
    u = 0.3 + 0.4 * torch.rand(3, 5, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: drawn(x, u), a)
    assert torch.autograd.gradcheck(lambda x, p: penalty(off_target(x, 0.4), p), (a, pair))
    off = off_target(a, 0.4).detach()
    by_hand = sum(0.7 * float(d) + 2.0 * float(d) ** 2 for d in off) / 3
    assert penalty(off, pair).item() == pytest.approx(by_hand)
    ascent = torch.autograd.grad(penalty(off, pair), pair)[0]
    assert ascent.tolist() == pytest.approx([float(off.mean()), float(off.square().mean())])


def test_multipliers_rise_by_how_far_sizes_are_off():
    gates = Gates({"hidden": (1, 8)}, {"hidden": 4}, Rates(0.1, 2.0, 5.0), seed=0)
    assert gates.expected()["hidden"] == pytest.approx(8, rel=0.01)  # nearly all are open at the start
    off = float(off_target(gates.log_alpha["hidden"].detach(), 0.5 * 0.5).mean())
    before = gates.log_alpha["hidden"].detach().clone()
    cost = gates.learn_(0, {"hidden": torch.zeros(1, 8)}, share=0.5)
    assert cost == pytest.approx(5.0 * off**2) and off < 0
    assert gates.multipliers["hidden"].tolist() == pytest.approx([2.0 * off, 5.0 + 2.0 * off**2])
    moved = before - gates.log_alpha["hidden"].detach()  # Adam's first step is its rate, whatever the gradient
    assert moved.tolist()[0] == pytest.approx([0.1] * 8, rel=1e-3)


def test_what_is_undecided_and_what_is_far():
    """By hand: P(z > 0) is 1/2 at -1.6, so half of what is drawn there is otherwise; far is more than 2 % of the axis."""
    gates = Gates({"hidden": (1, 100)}, {"hidden": 98}, Rates(0.1, 1, 1), seed=0)
    level = -2 / 3 * math.log(11)
    a = gates.log_alpha["hidden"].detach()
    a[:] = 1e3
    a[0, :4] = level
    assert gates.expected()["hidden"] == pytest.approx(98) and gates.far() == []
    assert gates.undecided()["hidden"] == pytest.approx(4 * 0.5 / 100)  # two of the four stay
    assert gates.doubt() == pytest.approx(0.02 / (2 * 0.98 * 0.02))
    a[0, :2] = -1e3
    a[0, 2:4] = 1e3
    assert gates.doubt() == 0 and missed(gates) is None
    assert gates.undecided()["hidden"] == 0 and gates.far() == []
    a[:] = math.log(0.98 / 0.02) + level  # all alike, and at the target
    assert gates.far() == [] and gates.doubt() == pytest.approx(1, rel=1e-3)
    assert "did not sort units (gates are 100% as undecided" in missed(gates)
    a[:] = 1e3
    a[0, :2] = -1e3
    a[0, 2:9] = level
    assert gates.expected()["hidden"] == pytest.approx(94.5) and gates.far() == ["hidden"]
    a[:] = 1e3
    assert gates.expected()["hidden"] == 100 and gates.far() == []  # 2 % of it
    gates.targets["hidden"] = 97
    assert gates.far() == ["hidden"]


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_before_so_many_updates_no_gate_can_close(rate):
    """Driven down as hard as it goes. Adam's step is at most 1.17 rates (Cauchy-Schwarz at 0.9, 0.95), and starts differ by 0.3."""
    gates = Gates({"hidden": (1, 64)}, {"hidden": 1}, Rates(rate, 0.0, 1e6), seed=0)
    likely = []
    for update in range(round(1.1 * least_updates(rate))):
        gates.learn_(update, {"hidden": torch.zeros(1, 64)}, share=1.0)
        likely.append(float(alive(gates.log_alpha["hidden"].detach()).median()))
    assert likely[round(least_updates(rate) / 1.17) - 1] > 0.5 > likely[-1]


def test_draws_are_of_the_update_alone():
    one, other = (Gates({"hidden": (1, 9), "kv_heads": (2, 4)}, {}, Rates(0.1, 1, 1), seed=3) for _ in range(2))
    other.draw(6)
    assert all(one.draw(7)[k].equal(other.draw(7)[k]) for k in one.sizes)
    assert not one.draw(7)["hidden"].equal(one.draw(8)["hidden"])


# -- where they act --------------------------------------------------------------------------------------------------------


def gated(name):
    """(a model in float64, its anatomy, gates of all its axes, the units that stay)"""
    config = tiny.tiny_config(name)
    anatomy, g = Anatomy.of(config), torch.Generator().manual_seed(0)
    kinds = [k for k in ("kv_heads", "intermediate", "hidden", "layers") if k not in anatomy.refused]
    z, keep = {}, {}
    for kind in [k for k in kinds if k != "hidden" or anatomy.exactness("hidden") != "inexact"]:
        axes = [axis for axis in anatomy.axes.values() if kind_of(axis.name) == kind]
        value = torch.rand(len(axes), axes[0].size, generator=g)
        stays = top(value, torch.full((len(axes),), max(1, axes[0].size * 2 // 3)))
        z[kind] = (0.3 + 0.7 * value) * stays
        keep |= {axis.name: tuple(row.nonzero().flatten().tolist()) for axis, row in zip(axes, stays, strict=True)}
    return tiny.grown(config), anatomy, z, Keep(keep).validated(anatomy)


@pytest.mark.parametrize("name", tiny.CASES)
def test_gated_is_folded_is_sliced(name):
    """Open gates are of all sizes. Hooks and folded weights differ by rounding in float64; a rebuilt model's rotary table is of
    float32, as are Gemma's norms, and a cut norm's epsilon (1e-6 of a mean square of about 1) is not cut with it: 1e-5.
    """
    model, anatomy, z, keep = gated(name)
    where, ids = places(anatomy, z), tiny.tokens(2, 7)
    with torch.no_grad():
        dense = model(ids).logits
        handles = attach_(model, where, lambda trains: z)
        hooked = model(ids).logits
        for handle in handles:
            handle.remove()
        named = dict(model.named_parameters())
        fold_(named, anatomy, where, z, ALONE)
        folded = model(ids).logits
        target = target_for(model.config, anatomy, keep)
        small = slice_tensors({n: p.detach() for n, p in named.items()}, slice_plan(anatomy, keep))
        cut = build(target.config, small).eval()(ids).logits
    assert (hooked - dense).abs().max() > 0.1 * dense.abs().max()
    assert (hooked - folded).abs().max() < 1e-5 * dense.abs().max() * (1 if "gemma" in name else 1e-8)
    assert (folded - cut).abs().max() < 1e-5 * dense.abs().max()


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "olmo2"])
def test_moments_are_folded_as_gradients_are(name):
    """A weight that takes a factor c in has a gradient of 1 / c of what it was: so the fold treats first moments."""
    model, anatomy, z, _ = gated(name)
    z = {kind: gate.clamp(min=0.2) for kind, gate in z.items()}  # none closed
    where, ids, named = places(anatomy, z), tiny.tokens(2, 7), dict(model.named_parameters())
    handles = attach_(model, where, lambda trains: z)
    model(ids, labels=ids).loss.backward()
    moments = {n: p.grad.clone() for n, p in named.items()}
    squares = {n: p.grad.square() for n, p in named.items()}
    for handle in handles:
        handle.remove()
    model.zero_grad()
    for tensors, power in ((named, 1), (moments, -1), (squares, -2)):
        fold_(tensors, anatomy, where, z, ALONE, power)
    model(ids, labels=ids).loss.backward()
    for n, p in named.items():
        size = p.grad.abs().max()
        assert (moments[n] - p.grad).abs().max() < 1e-4 * size, n  # Gemma's norms are of float32
        assert (squares[n] - p.grad.square()).abs().max() < 1e-4 * size**2, n


def test_gradients_of_gates_through_a_model():
    """Those that backward leaves in the leaves, against differences: norms are of float32, so steps are of 1e-3 (noise 1e-4)."""
    model, anatomy, z, _ = gated("llama_tied")
    z = {kind: (0.2 + 0.6 * gate.double()).requires_grad_(True) for kind, gate in z.items()}
    attach_(model, places(anatomy, z), lambda trains: z)
    ids = tiny.tokens(2, 7)

    def loss():  # transformers' own is of float32
        return torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    for gate in z.values():
        at, step = (0, gate.shape[1] // 2), 3e-3
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                gate[at] += sign * step
                losses.append(float(loss()))
                gate[at] -= sign * step
        assert float(gate.grad[at]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-2, abs=2e-4)


# -- runs ------------------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 20, "intermediate_size": 12, "num_key_value_heads": 2, "num_hidden_layers": 2}
AXES = ["hidden", "intermediate", "kv_heads", "layers"]


def masked(more=None, **masks):
    """Cut after four of eight updates."""
    shape = tiny_shape() | {"tie_word_embeddings": True}
    return pruning({"model__shape": shape} | (more or {}), target=SIZES, axes=AXES, pace={}, masks=masks)


@functools.cache
def done():
    out = pipeline.scratch() / "masked"
    return run(out, masked()), out


def test_the_shape_is_exactly_the_target():
    record, out = done()
    anatomy = Anatomy.of(config_of(str(out / "model"), 0))
    told = record["figures"]["pruning"]
    assert all(told["shape"][name] == size for name, size in SIZES.items()) and told["met"]
    assert anatomy.num_params == record["figures"]["params"] == told["measured"] == told["target"]
    (event,) = events(out)
    assert event["pruned"]["step"] == 4 and event["step"] == 5 and math.isfinite(event["loss_after"])
    assert event["pruned"]["params"] == anatomy.num_params
    layers = event["pruned"]["units"]["layers"]
    assert len(layers) == 1 and not any(name.startswith(f"layers.{layers[0]}.") for name in event["pruned"]["units"])


def test_what_is_told_of_masks_and_what_updates_cost():
    _, out = done()
    lines = [line for line in log(out) if "lr" in line]
    assert [("masks" in line) for line in lines] == [True] * 4 + [False] * 4
    assert lines[3]["masks"]["asked"] == dict(zip(AXES, SIZES.values(), strict=True))
    assert lines[0]["masks"]["asked"]["hidden"] == pytest.approx(
        32 - 12 / 2
    )  # half of what is cut, warmed up in two updates
    assert all(math.isfinite(line["masks"]["penalty"]) for line in lines[:4])
    whole = Anatomy.of(config_of(tiny_shape() | {"tie_word_embeddings": True}, 0))
    small = Anatomy.of(config_of(str(out / "model"), 0))
    spent = [3 * whole.flops(SEQ) * 4] * 4 + [3 * small.flops(SEQ) * 4] * 4  # of the whole model until it is sliced
    assert [line["flops"] for line in lines] == [sum(spent[: i + 1]) for i in range(8)]


def ids_feed(config, updates):
    ids = torch.randint(0, config.vocab_size, (updates, 4, SEQ + 1), generator=torch.Generator().manual_seed(0))

    class Feed:
        def take(self, position, count):
            return type("B", (), {"ids": ids[position // 4][position % 4 : position % 4 + count]})

    return Feed()


def learning(name, updates, sizes, micro=4, **masks):
    """(a run that is to cut a tiny model, its Masks)"""
    config = tiny.tiny_config(name)
    recipe = pruning({"tokens": updates * UPDATE}, target=sizes, axes=AXES, pace={}, masks=masks)
    cutting = Cutting.of(recipe, config)
    assert cutting is not None
    model, masks_ = fresh(config, init="standard", seed=1, dtype=torch.float32).train(), Masks(cutting, recipe)
    optimizer = adamw(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    start_slots_(optimizer, 0)
    schedule = Schedule("constant", 1e-3, 10**6, warmup=0)
    training = Training(
        Learner(model), optimizer, ids_feed(config, updates), schedule, batch=4, micro=micro, hooks=(masks_,)
    )
    masks_.begin(training)
    return training, masks_


def test_the_lagrangian_meets_its_target():
    """Before units are counted out: expected sizes within 1 % of the axis (at most a third of a channel here) of the target."""
    sizes = {"hidden_size": 20, "intermediate_size": 12, "num_key_value_heads": 3, "num_hidden_layers": 2}
    training, masks = learning("llama", 100, sizes, end=1.0)
    train_(training, 100)
    assert masks.ended is not None and masks.done
    for kind, whole in (("hidden", 32), ("intermediate", 24), ("kv_heads", 4), ("layers", 3)):
        assert abs(masks.ended["expected"][kind] - masks.ended["target"][kind]) < 0.01 * whole, kind
    assert all(0 <= share < 0.5 for share in masks.ended["undecided"].values())


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gemma2", "olmo2"])
def test_families_learn_their_shape(name):
    training, _ = learning(name, 4, {"hidden_size": 24, "intermediate_size": 12})
    losses = []
    train_(training, 4, lambda t: losses.append(t.last["loss"]))
    shape = Anatomy.of(training.learner.model.config).shape
    assert shape.hidden_size == 24 and shape.layers[0].intermediate_size == 12 and all(map(math.isfinite, losses))
    for name_, p in training.learner.model.named_parameters():
        assert training.optimizer.state[p]["exp_avg"].shape == p.shape, name_


def test_micro_batches_share_one_draw():
    """Gates' gradients are those of the whole update, however it is cut up: log alphas agree to the order of float32 sums."""
    found = []
    for micro in (1, 4):
        training, masks = learning("llama", 3, {"hidden_size": 24}, micro=micro, end=1.0)
        train_(training, 2)
        found.append(masks.tensors())
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], rtol=1e-3, atol=1e-6), name


def test_a_phase_that_is_too_short_says_so(capsys):
    """Before the run where no gate can close; at its end where they did not come to the target: once, with what to lengthen."""
    record, out = done()  # four updates
    (line,) = [line for line in log(out) if "note" in line]
    assert line["step"] == 4 and record["figures"]["pruning"]["masks"]["note"] == line["note"]
    assert "4 updates did not bring the gates to the target (hidden at 31." in line["note"] and "masks.end" in line["note"]
    show_train.line(line)
    assert capsys.readouterr().err == f"note: {line['note']}\n"
    (note,) = opened(masked(), out).notes
    assert "in 4 updates at lr 0.3 no gate can close (at least 19 are needed" in note
    assert planned(masked(), rate=1e9)["notes"] == [note]
    assert opened(masked(lr=1.4), pipeline.scratch() / "long-enough").notes == ()
    assert opened(pruning(), pipeline.scratch() / "no-masks").notes == ()


def test_validation_draws_nothing():
    training, masks = learning("llama", 8, {"hidden_size": 24})
    train_(training, 2)
    looks = [validate(training.learner, training.feed, 4, 4)["loss"] for _ in range(2)]
    assert looks[0] == looks[1] and masks.settled is not None
    assert bool((masks.settled["hidden"] > 0).sum() == round(masks.gates.expected()["hidden"]))


def test_the_cut_model_is_the_masked_one():
    """The last validation of gates without noise, with the target's number of them open, against the sliced model's first."""
    training, masks = learning("llama", 4, {"hidden_size": 24, "intermediate_size": 16}, end=1.0)
    train_(training, 3)
    seen = {}

    class Look(Hook):
        def after_step(self, run):
            masks.settled = masks.gates.settled(exactly=True)
            seen["masked"] = validate(run.learner, run.feed, 4, 4)["loss"]

    gates = masks.gates
    masks._learn, training.hooks = (lambda run, gates: None), (Look(), masks)
    train_(training, 4)
    assert masks.gates is None and gates is not None
    assert validate(training.learner, training.feed, 4, 4)["loss"] == pytest.approx(seen["masked"], rel=1e-5)


def test_stopped_anywhere_it_goes_on_bit_for_bit():
    """Among masks, at the update that cuts, and behind it."""
    _, whole = done()
    for at in (2, 3, 4, 6):
        out = pipeline.scratch() / f"masked-stopped-{at}"

        with pytest.raises(Killed):
            run(out, masked({"save__every": at}), KilledAt(at + 1))
        run(out, masked({"save__every": at}))
        one, other = weights(whole), weights(out)
        assert one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one), at
        told = [{k: v for k, v in line.items() if k in ("step", "loss", "masks", "pruned")} for line in log(out)]
        assert told == [{k: v for k, v in line.items() if k in ("step", "loss", "masks", "pruned")} for line in log(whole)]


def test_an_enlarged_shape_comes_back_by_masks():
    recipe = asked(model__enlarge=2.0, prune={"axes": ["intermediate"], "masks": {"end": 0.5}})
    told = run(pipeline.scratch() / "masked-enlarged", recipe)["figures"]["pruning"]
    assert told["shape"]["intermediate_size"] == tiny.INTERMEDIATE and told["met"]


# -- wrong inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"target": {"ratio": 0.5}}, "masks are learned to a shape"),
        ({"target": {"hidden_size": 64}}, "above the source's 32"),
        ({"target": {"hidden_size": 32}}, "is not below the"),
        ({"target": {"hidden_size": 24, "num_hidden_layers": 2}}, "which axes leaves out"),
        ({"stops": [0.8]}, "masks and stops exclude each other"),
        ({"alike": False}, "masks and alike exclude each other"),
        ({"per": "flops"}, "masks and per exclude each other"),
        ({"saliency": {"metric": "second"}}, "masks and saliency exclude each other"),
        ({"pace": {"kind": "steps"}}, "masks and pace exclude each other"),
        ({"order": ["hidden"]}, "masks and order exclude each other"),
        ({"units": {"hidden": 2}}, "masks and units exclude each other"),
        ({"slice_at": 0.5}, "masks and slice_at exclude each other"),
        ({"masks": {"lr": 0}}, "prune.masks.lr"),
        ({"masks": {"end": 1.5}}, "prune.masks.end"),
        ({"masks": {"warm": 0.1}}, "did you mean 'warmup'"),
    ],
)
def test_wrong_masks_are_refused_before_weights(part, said):
    with pytest.raises(UserError, match=said):
        opened(pruning(**({"target": {"hidden_size": 24}, "pace": {}, "masks": {}} | part)), pipeline.scratch() / "refused")


def test_what_cannot_go_with_masks_is_refused():
    part = {"prune": {"target": {"hidden_size": 24}, "masks": {}}}
    for more, said in (
        ({"compile": True}, "set compile false"),
        ({"lora": {}, "model": {"source": "x"}}, "prune and lora exclude each other"),
    ):
        with pytest.raises(UserError, match=said):
            asked(**part, **more)
    with pytest.raises(UserError, match="masks are learned to a shape"):
        recipes.read("sheared-llama", (), {"target_params": 10**8})


def test_masks_on_a_stem_that_cannot_be_cut_exactly_are_refused():
    recipe = pruning(target={"hidden_size": 24}, axes=["hidden"], pace={}, masks={})
    with pytest.raises(UserError, match="'hidden' of phi cannot be cut exactly"):
        Cutting.of(recipe, tiny.tiny_config("phi"))
