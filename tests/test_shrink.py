"""Pruning inside training: what goes, when, and that nothing else changes."""

from __future__ import annotations

import itertools
import json
import math
from unittest import mock

import pipeline
import pytest
import tiny
import torch
from shrinking import PARTS, SEQ, UPDATE, done, events, kinds_of, log, pruning, run, tied, training_config
from training import Killed, KilledAt, asked, tiny_shape, weights

from prunus import show_train
from prunus.anatomy import Anatomy
from prunus.distributed import ALONE
from prunus.errors import UserError
from prunus.keep import Keep
from prunus.ledger import Ledger
from prunus.train import estimate, export, searched
from prunus.train import recipe as recipes
from prunus.train.learner import Learner
from prunus.train.loop import Hook, Training, train_
from prunus.train.loss import IGNORED
from prunus.train.opening import cutting_of
from prunus.train.opening import prepare as opened
from prunus.train.optim import adamw, start_slots_
from prunus.train.run import execute
from prunus.train.schedule import Schedule
from prunus.train.shapes import config_of, fresh
from prunus.train.shrink.adaptive import Cosines, shares
from prunus.train.shrink.cutting import Cutting
from prunus.train.shrink.forecast import Forecast
from prunus.train.shrink.goal import Goal
from prunus.train.shrink.groups import Standing
from prunus.train.shrink.part import PrunePart, SaliencyPart
from prunus.train.shrink.pruner import Pruner
from prunus.train.shrink.saliency import Saliency
from prunus.train_plots import Curve

# -- runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_the_target_is_met_exactly(name):
    """Within the smallest group, and from above where sizes are asked for; the saved model is what the record says."""
    record, out = done(name)
    told, part = record["figures"]["pruning"], PARTS[name]
    anatomy = Anatomy.of(config_of(str(out / "model"), 0))
    assert told["met"] and told["measured"] <= told["target"] and anatomy.num_params == record["figures"]["params"]
    sizes = part.get("target", {})
    for field, size in sizes.items():
        if field in told["shape"]:
            assert told["shape"][field] == size
    goal = Goal.of(PrunePart(**({"target": {"ratio": 0.5}} | part)), Anatomy.of(training_config()), SEQ)
    assert goal.measure(anatomy) == told["measured"] and goal.value == told["target"]
    if "num_attention_heads" in told["shape"] and part.get("alike", True):
        uneven = {k for k, v in told["shape"].items() if isinstance(v, list)}
        assert uneven <= ({"num_key_value_heads"} if name == "heads" else set()), told["shape"]  # layers alike


@pytest.mark.parametrize("name", PARTS)
def test_every_event_is_told(name):
    _, out = done(name)
    found = events(out)
    assert all(e["step"] == min(e["pruned"]["step"] + 1, 8) for e in found)  # told when its effect is known
    effects = [e["loss_after"] for e in found if e["pruned"]["step"] < 8]  # of a cut at the last update none is known
    assert found and all(math.isfinite(effect) for effect in effects)
    assert found[0]["pruned"]["gone"] >= 1
    assert [e["tokens"] for e in found] == sorted(e["tokens"] for e in found)
    gone: dict[str, set[int]] = {}
    for event in found:
        for axis, units in event["pruned"]["units"].items():
            assert not gone.setdefault(axis, set()) & set(units), "a unit goes once"
            gone[axis] |= set(units)
    source = Anatomy.of(training_config())
    left = {n: tuple(u for u in range(source.axes[n].size) if u not in units) for n, units in gone.items()}
    assert Keep(left).anatomy_after(source).num_params == found[-1]["pruned"]["params"]
    told = [line["params"] for line in log(out) if "lr" in line]
    assert told == sorted(told, reverse=True)


@pytest.mark.parametrize("name", PARTS)
def test_the_next_cut_is_told_beforehand(name, capsys):
    """What every logged update says of the next cut is what then happens; a run that cuts nothing says nothing of it."""
    _, out = done(name)
    updates = [line for line in log(out) if "lr" in line]
    steps = sorted({e["pruned"]["step"] for e in events(out)})
    for line in updates:
        later = [step for step in steps if step > line["step"]]
        assert line["next_cut"] == (later[0] - line["step"] if later else None), line["step"]
        show_train.line(line)
        said = capsys.readouterr().err
        assert "params alive" in said and ("next cut in" in said) == bool(later)
    show_train.line({name: value for name, value in updates[-1].items() if name != "next_cut"})
    said = capsys.readouterr().err
    assert "next cut" not in said and "alive" not in said


def test_an_order_is_an_order():
    _, out = done("ordered")
    kinds = [kind for event in events(out) for kind in event["pruned"]["groups"]]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["hidden", "kv_heads", "intermediate"]


def test_once_is_before_the_first_update_and_scored_on_the_ledger():
    record, out = done("once")
    (event,) = events(out)
    assert event["pruned"]["tokens"] == 0 and event["loss_before"] is None
    source = Anatomy.of(training_config())
    assert record["figures"]["flops"]["scoring"] == 3 * source.flops(SEQ) * 10
    assert record["figures"]["flops"]["train"] == 3 * Anatomy.of(config_of(str(out / "model"), 0)).flops(SEQ) * 32
    assert Ledger.read(out).flops == sum(record["figures"]["flops"].values())


def test_zeroed_is_sliced_along_the_way():
    """Sliced at every cut, or not before the target is met: the same losses and weights but for rounding (1e-4 after eight).

    Heads and channels alone: a cut stem folds its norms' gains, whose updates AdamW makes in another scale.
    """
    part = {"axes": ["kv_heads", "intermediate"], "target": {"ratio": 0.4}}
    outs = [pipeline.scratch() / f"sliced-at-{at}" for at in (0, 1)]
    for at, out in zip((0.0, 1.0), outs, strict=True):
        run(out, tied(slice_at=at, **part))
    one, other = (weights(out) for out in outs)
    assert [e["pruned"]["units"] for e in events(outs[0])] == [e["pruned"]["units"] for e in events(outs[1])]
    for a, b in zip(log(outs[0]), log(outs[1]), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)
    assert all((one[name] - other[name]).abs().max() < 1e-4 for name in one)


def test_a_cut_stem_changes_no_loss_at_the_slice():
    """The fold makes the sliced model the zeroed one: without updates (rate 0) losses are the same wherever it is sliced."""
    part = {"axes": ["hidden"], "target": {"hidden_size": 20}}
    outs = [pipeline.scratch() / f"stem-at-{at}" for at in (0, 1)]
    for at, out in zip((0.0, 1.0), outs, strict=True):
        run(out, pruning({"optimizer__lr": 1e-12, "model__shape": tiny_shape()}, slice_at=at, **part))
    for a, b in zip(log(outs[0]), log(outs[1]), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)


@torch.no_grad()
def test_importance_is_what_blocks_turn_the_stream():
    """One minus the mean cosine over tokens of what enters and leaves a block, in training alone and while it looks."""
    model = tiny.grown(tiny.tiny_config("llama"))
    anatomy, ids = Anatomy.of(model.config), torch.arange(24).view(2, 12)
    learner = Learner(model)
    cosines = Cosines(learner, anatomy)
    streams = model.eval()(ids, output_hidden_states=True).hidden_states  # the last one is normed: its block is left out
    cosines.look(True)
    learner.nll(ids + 1, ids)  # validation
    learner(ids + 1, torch.full_like(ids, IGNORED))  # a process without a share of these
    learner(ids, ids)
    cosines.look(False)
    learner(ids + 1, ids)
    found = cosines.importance(ALONE)
    for layer in range(anatomy.shape.num_hidden_layers - 1):
        pairs = zip(streams[layer].flatten(0, 1).double(), streams[layer + 1].flatten(0, 1).double(), strict=True)
        mean = sum(float(a @ b / a.norm() / b.norm()) for a, b in pairs) / 24
        assert float(found[layer]) == pytest.approx(1 - mean, abs=1e-5)
    later = []
    for other in (ids + 1, ids):  # each update by itself, also where every one cuts
        before = cosines.importance(ALONE)
        cosines.look(True)
        assert torch.equal(cosines.importance(ALONE), before)
        learner(other, ids)
        later.append(cosines.importance(ALONE))
    assert not torch.equal(later[0], found) and torch.equal(later[1], found)


def test_a_cut_is_no_spike():
    """What was usual before it is forgotten: else a loss that a cut raised would be skipped for the rest of the run."""
    known = []

    class Watch(Hook):
        def before_clip(self, training):
            known.append(training.usual)

    out = pipeline.scratch() / "no-spike"
    run(out, pruning({"skip_spikes": 3.0}, pace={"start": 0.3, "end": 0.6, "rounds": 2}), Watch())
    cuts = {event["pruned"]["step"] for event in events(out)}
    assert len(cuts) == 2 and {step for step, usual in enumerate(known) if usual is None} == {0} | cuts


def test_adaptive_cuts_at_every_update_and_passes_stops():
    """Importance is that of the last update alone, whether it was sliced or not, stopped or not."""
    part = PARTS["adaptive"] | {"pace": {"start": 0.0, "end": 0.75}, "slice_at": 0.5, "stops": [0.9, 0.8]}
    whole, out = (pipeline.scratch() / f"adaptive-each-{name}" for name in ("whole", "stopped"))

    record = run(whole, tied(**part))
    assert record["figures"]["pruning"]["met"] and sorted(p.name for p in (whole / "stops").iterdir()) == ["0.8", "0.9"]
    with pytest.raises(Killed):
        run(out, tied(**part), KilledAt(3))
    run(out, tied(**part))
    one, other = weights(whole), weights(out)
    assert one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one)


def test_layers_that_turn_the_stream_less_give_more():
    anatomy = Anatomy.of(tiny.tiny_config("llama_mha"))
    named = {n: torch.nn.Parameter(torch.zeros(t.shape)) for n, t in anatomy.tensors.items()}
    saliency, standing = Saliency(SaliencyPart(), anatomy, ("kv_heads", "intermediate"), named, ALONE), Standing.of(anatomy)
    for held in saliency.held.values():
        held.mean.copy_(torch.arange(len(held.mean)).flip(0))  # the last units are worth least
    budget = round(0.7 * anatomy.block_params)
    table = saliency.table(None, standing.alive)
    gone = dict.fromkeys(range(3), 0)
    for group in shares(standing, anatomy, table, torch.tensor([0.9, 0.5, 0.1]).double(), budget, 1.0):
        ((name, units),) = group.units.items()
        axis = anatomy.axes[name]
        assert units == tuple(range(axis.size - len(units), axis.size))
        gone[axis.layer] += len(units) * anatomy.unit_params(name)
        standing.drop(group.units)
    assert gone[0] < gone[1] < gone[2] and 0 <= budget - standing.now.block_params < anatomy.unit_params(
        "layers.0.intermediate"
    )


def test_rounds_of_adaptive_shares():
    _, out = done("adaptive")
    rounds = events(out)
    assert [event["pruned"]["step"] for event in rounds] == [2, 4, 6]
    sizes = rounds[-1]["pruned"]["shape"]["intermediate_size"]
    assert isinstance(sizes, list) and len(set(sizes)) > 1


def test_adaptive_shares_of_channels_alone_meet_the_target():
    out = pipeline.scratch() / "adaptive-channels"
    pruned = run(out, tied(**PARTS["adaptive"] | {"axes": ["intermediate"], "target": {"ratio": 0.2}}))["figures"]["pruning"]
    assert pruned["met"] and pruned["target"] - 3 * 32 < pruned["measured"]  # within a channel
    assert pruned["shape"]["num_key_value_heads"] == 4 and len(set(pruned["shape"]["intermediate_size"])) > 1


def test_what_is_dead_at_the_end_of_a_missed_target_is_sliced():
    """Slices wait for half of all to be dead; the record counts what is alive, and the model has no more."""
    out = pipeline.scratch() / "missed"
    part = {"axes": ["intermediate", "kv_heads"], "pace": {"kind": "steps", "start": 0.0, "prune": 2}, "per": "none"}
    found = run(out, tied(target={"ratio": 0.3}, slice_at=0.5, **part))["figures"]
    pruned, left = found["pruning"], Anatomy.of(config_of(str(out / "model"), 0))
    assert not pruned["met"] and pruned["measured"] == left.block_params and found["params"] == left.num_params
    assert left.shape.describe() == pruned["shape"] == events(out)[-1]["pruned"]["shape"]
    assert all(rows.any(1).all() for name, rows in weights(out).items() if name.endswith("up_proj.weight"))


def test_a_group_may_pass_two_stops_and_the_last_update_may_cut():
    out = pipeline.scratch() / "close-stops"
    pace = {"start": 0.5, "end": 1.0, "rounds": 1}
    run(out, tied(target={"params": 25_000}, stops=[0.8, 0.799], axes=["intermediate", "hidden"], pace=pace))
    sizes = [Anatomy.of(config_of(str(out / "stops" / share / "model"), 0)).num_params for share in ("0.8", "0.799")]
    assert sizes[0] >= sizes[1] and max(sizes) <= 0.8 * Anatomy.of(training_config()).num_params
    (event,) = events(out)[-1:]
    assert event["pruned"]["step"] == 8 and event["loss_after"] is None
    curve = Curve.read(out)
    assert [f for *_, f in curve.updates] == [line["flops"] for line in log(out) if "lr" in line]


def test_every_cut_of_an_update_is_told():
    """Two stops passed in one round: three cuts, which share their effect; no group goes untold."""
    out = pipeline.scratch() / "stops-in-a-round"
    record = run(out, tied(target={"params": 20_000}, stops=[0.8, 0.7], pace={"start": 0.1, "end": 0.8, "rounds": 1}))
    told = [e["pruned"] for e in events(out)]
    assert len(told) == 3 and len({e["step"] for e in told}) == 1
    assert sum(sum(e["groups"].values()) for e in told) == told[-1]["gone"] == record["figures"]["pruning"]["groups"]


def test_layers_of_different_sizes_cannot_lose_the_same():
    config = config_of(str(done("each by itself")[1] / "model"), 0)
    with pytest.raises(UserError, match="set it to false"):
        Goal.of(PrunePart(target={"ratio": 0.1}), Anatomy.of(config), SEQ)


def test_an_enlarged_shape_comes_back():
    recipe = asked(
        model__enlarge=2.0,
        prune={"axes": ["intermediate"], "pace": {"start": 0.25, "end": 0.75, "power": 3.0, "rounds": 2},
               "saliency": {"matrices": "all"}},
    )  # fmt: skip
    out = pipeline.scratch() / "enlarged"
    told = run(out, recipe)["figures"]["pruning"]
    assert told["shape"]["intermediate_size"] == tiny.INTERMEDIATE and told["source_params"] > told["measured"]
    plain = run(pipeline.scratch() / "not-enlarged", asked())
    assert plain["figures"]["params"] == told["measured"]
    with pytest.raises(UserError, match=r"prune\.target is missing"):
        asked(prune={})
    with pytest.raises(UserError, match="enlarge widens a shape"):
        asked(model={"source": "x", "enlarge": 2.0})


@pytest.mark.parametrize("name", ["alike", "heads", "each by itself", "once", "steps", "params", "adaptive"])
def test_stopped_anywhere_it_goes_on_bit_for_bit(name):
    _, whole = done(name)
    for at in (2, 5):
        out = pipeline.scratch() / f"stopped-{name.replace(' ', '-')}-{at}"
        recipe = tied(**PARTS[name])

        with pytest.raises(Killed):
            run(out, recipe, KilledAt(at))
        run(out, recipe)
        one, other = weights(whole), weights(out)
        assert one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one)
        assert [e["pruned"] for e in events(whole)] == [e["pruned"] for e in events(out)]
        assert (whole / "ledger.json").read_bytes() == (out / "ledger.json").read_bytes()


def test_a_family_of_sizes_from_one_run():
    out = pipeline.scratch() / "family"
    record = execute(opened(tied(target={"params": 20_000}, stops=[0.8, 0.7]), out))  # each loads in a clean process
    source = record["figures"]["pruning"]["source_params"]
    assert sorted(p.name for p in (out / "stops").iterdir()) == ["0.7", "0.8"]
    for share in (0.8, 0.7):
        place = out / "stops" / f"{share:g}"
        anatomy = Anatomy.of(config_of(str(place / "model"), 0))
        assert 0 <= share * source - anatomy.num_params < anatomy.unit_params("hidden")  # the smallest group that is left
        assert 0 < Ledger.read(place).tokens < 8 * UPDATE
    on = asked(model={"source": str(out / "stops" / "0.7" / "model")})
    assert execute(opened(on, pipeline.scratch() / "family-on"))["figures"]["params"] == anatomy.num_params
    assert Ledger.read(pipeline.scratch() / "family-on").parent is not None


ONE_BY_ONE = ("llama_mha", "llama_gqa4", "llama_mqa", "qwen2", "gemma2", "gemma3", "olmo", "olmo2", "phi", "phi3")


@pytest.mark.parametrize(
    ("name", "heads"), [(name, "kv_heads") for name in tiny.CASES] + [(name, "heads") for name in ONE_BY_ONE]
)
def test_every_family_shrinks_to_a_target(name, heads):
    config = tiny.tiny_config(name)
    anatomy = Anatomy.of(config)
    kinds = kinds_of(anatomy) if heads == "kv_heads" else [heads]
    model = fresh(config, init="standard", seed=1, dtype=torch.float32).train()
    ids = torch.randint(0, config.vocab_size, (6, 4, SEQ + 1), generator=torch.Generator().manual_seed(0))

    class Feed:
        def take(self, position, count):
            return type("B", (), {"ids": ids[position // 4]})

    recipe = pruning({"tokens": 6 * UPDATE}, axes=kinds, target={"ratio": 0.3 if len(kinds) > 1 else 0.15}, slice_at=0.1)
    asked_for = Cutting.of(recipe, config)
    assert asked_for is not None
    pruner, losses = Pruner(asked_for, recipe), []
    optimizer = adamw(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    start_slots_(optimizer, 0)
    schedule = Schedule("constant", 1e-3, 10**6, warmup=0)
    training = Training(Learner(model), optimizer, Feed(), schedule, batch=4, micro=4, hooks=(pruner,))
    pruner.begin(training)
    train_(training, 6, lambda t: losses.append(t.last["loss"]))
    after = Anatomy.of(training.learner.model.config)
    assert pruner.done and after.num_params == pruner.target.anatomy.num_params < anatomy.num_params
    assert all(math.isfinite(loss) for loss in losses)
    for name_, p in training.learner.model.named_parameters():
        moments = training.optimizer.state[p]
        assert moments["exp_avg"].shape == p.shape and float(moments["exp_avg_sq"].sum()) > 0, name_


# -- wrong inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"target": {}}, "give one of params"),
        ({"target": {"params": 10, "ratio": 0.5}}, "not several"),
        ({"target": {"params": 10**9}}, "is not below the"),
        ({"target": {"params": 10}}, "below the least shape's"),
        ({"target": {"hidden_size": 64}}, "above the source's 32"),
        ({"target": {"hidden_size": 16}, "axes": ["intermediate"]}, "which axes leaves out"),
        ({"allocate": "adaptive"}, "set alike to false"),
        ({"allocate": "adaptive", "alike": False}, "take hidden out of axes"),
        ({"allocate": "adaptive", "alike": False, "axes": ["kv_heads"]}, "put intermediate into axes"),
        (
            {"allocate": "adaptive", "alike": False, "axes": ["intermediate"], "units": {"intermediate": 2}},
            "drop units and floor",
        ),
        ({"target": {"hidden_size": 16, "intermediate_size": 8}, "order": ["hidden"]}, "must name every axis"),
        ({"target": {"hidden_size": 16}, "floor": {"hidden": 8}}, "target says where every axis ends"),
        ({"stops": [0.8, 0.8]}, "that fall"),
        ({"per": "kv_bytes", "axes": ["intermediate"]}, "that costs anything by per: kv_bytes"),
        ({"order": ["hidden"]}, "order needs a target of sizes"),
        ({"axes": ["hidden", "hidden"]}, "names an axis twice"),
        ({"axes": ["query_heads"]}, "prune.axes.0"),
        ({"stops": [0.5, 0.7]}, "that fall"),
        ({"stops": [0.1]}, "lies below the target"),
        ({"stops": [0.8], "pace": {"kind": "once", "samples": 4}}, "stops are passed on the way"),
        ({"saliency": {"metric": "adam"}, "pace": {"kind": "once", "samples": 4}}, "knows nothing before the first update"),
        ({"pace": {"start": 0.9, "end": 0.5}}, "lies before start"),
        ({"pace": {"kind": "once", "samples": 4, "rounds": 2}}, "rounds 2 says nothing to kind once"),
        ({"pace": {"kind": "steps", "end": 0.5}}, "end 0.5 says nothing to kind steps"),
        ({"amplitude": 0.5}, "amplitude 0.5 is of allocate: adaptive alone"),
        ({"floor": {"intermediate": 999}}, "intermediate 999 is above the source's 24; give at most that"),
        ({"pace": {"kind": "rate", "start": 0.9, "end": 0.5}}, "lies before start"),
        ({"pace": {"kind": "steps", "prune": 1, "train": 4}}, "at best, not to"),
        ({"pace": {"kind": "once", "samples": 1000}}, "are more than the 32"),
        ({"units": {"hidden": 0}}, "counts of at least 1"),
        ({"saliency": {"matrices": "output+embedding"}, "axes": ["intermediate"]}, "counts for hidden alone"),
        ({"saliency": {"matrices": "output+embedding", "metric": "obc"}}, "the embedding reads none"),
        ({"saliency": {"metric": "third"}}, "prune.saliency.metric"),
        ({"sallency": {}}, "did you mean 'saliency'"),
    ],
)
def test_wrong_pruning_is_refused_before_weights(part, said):
    with pytest.raises(UserError, match=said):
        opened(pruning(**part), pipeline.scratch() / "refused")


def test_target_params_means_the_cut_model_where_a_recipe_prunes():
    assert recipes.read("efficientllm", (), {"target_params": 10**8}).prune.target.params == 10**8
    assert recipes.read("scratch", (), {"target_params": 10**7}).model.target_params == 10**7


def test_what_cannot_go_with_pruning_is_refused():
    for more, said in (
        ({"optimizer__lr": "sweep"}, "sweep"),
        ({"lora": {}, "model": {"source": "x"}}, "exclude each other"),
    ):
        with pytest.raises(UserError, match=said):
            pruning(more)


def test_an_axis_that_cannot_be_cut_exactly_is_refused():
    for name, axes in (("gpt_neox", ["kv_heads"]), ("phi", ["hidden"])):
        part = PrunePart(target={"ratio": 0.2}, axes=axes)
        with pytest.raises(UserError, match=f"'{axes[0]}'"):
            Goal.of(part, Anatomy.of(tiny.tiny_config(name)), SEQ)


# -- what cuts will save --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_what_cuts_save_is_about_what_they_saved(name):
    """Against the FLOPs of the run. What differs is which axis gave way: 15 % at most here, and nothing where sizes are named
    and all goes at once, or where one axis alone goes.
    """
    recipe = tied(**PARTS[name])
    found = Forecast(cutting_of(recipe, training_config()), recipe)
    record, _ = done(name)
    spent = sum(record["figures"]["flops"].values())
    assert found.flops == pytest.approx(spent, rel=0.15)
    assert found.cutting.goal.measure(found.end) <= found.cutting.goal.value


@pytest.mark.parametrize("pace", [{"kind": "once", "samples": 8}, {"start": 0.25, "end": 0.75, "rounds": 2}])
def test_what_a_cut_to_sizes_saves_is_known(pace):
    """One axis, two rounds or one: the very FLOPs of the run, what is dead and not yet sliced included."""
    recipe = tied(axes=["intermediate"], target={"intermediate_size": 12}, pace=pace)
    record = run(pipeline.scratch() / f"forecast-{pace.get('rounds', 0)}", recipe)
    found = Forecast(cutting_of(recipe, training_config()), recipe)
    assert found.flops == sum(record["figures"]["flops"].values())
    assert found.groups == record["figures"]["pruning"]["groups"] == 12
    said = estimate.planned(recipe, rate=1e9)
    assert said["flops"] == pytest.approx(found.flops)
    whole = estimate.planned(asked(**{"model__shape": tiny_shape() | {"tie_word_embeddings": True}}), rate=1e9)
    assert said["pruning"]["saved"] == pytest.approx(1 - found.flops / whole["flops"]) and whole["pruning"] is None
    assert said["hours"] == pytest.approx(found.flops / 1e9 / 3600)


def test_a_plan_says_about_where_it_cuts(capsys):
    show_train.plan(estimate.planned(tied(), rate=1e9))
    said = capsys.readouterr().out
    assert said.count("about ") == 6 and "less work than without" in said and "gave way alike" in said
    show_train.plan(estimate.planned(tied(pace={"kind": "once", "samples": 20}), rate=1e9))
    assert "more, scoring included, work than without" in capsys.readouterr().out
    show_train.plan(estimate.planned(asked(), rate=1e9))
    assert "about" not in capsys.readouterr().out


# -- the searched shape from scratch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heads", "each by itself"])
def test_the_searched_shape_is_trained_on_the_same_tokens(name, tmp_path):
    """Fresh weights, all else as in the run that cut: order, batches, rates, seed; no cut, source or teacher."""
    record, found = done(name)
    recipe = searched.recipe_of(found)
    its = recipes.parse(json.loads((found / "recipe.json").read_text()), "its")
    assert recipe.prune is None and recipe.teacher is None and recipe.model.source is None
    own = {"name", "model", "prune", "teacher", "lora"}
    assert {n: v for n, v in recipe.plain().items() if n not in own} == {
        n: v for n, v in its.plain().items() if n not in own
    }
    scratch = run(tmp_path / "scratch", recipe)
    one, other = (opened(r, tmp_path / "looked-at").feeds.training.take(0, 32).ids for r in (recipe, its))
    assert one.equal(other)
    rates = [[line["lr"] for line in log(out) if "lr" in line] for out in (tmp_path / "scratch", found)]
    assert rates[0] == rates[1] and len(rates[0]) == 8
    assert scratch["figures"]["params"] == record["figures"]["params"]
    assert Anatomy.of(config_of(str(tmp_path / "scratch"), 0)).shape == Anatomy.of(config_of(str(found), 0)).shape
    ledger = Ledger.read(tmp_path / "scratch")
    assert ledger.parent is None and ledger.tokens == Ledger.read(found).tokens


def test_where_no_shape_was_searched(tmp_path):
    _, found = done("alike")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "recipe.json").write_text(json.dumps(asked().plain()))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.json").write_text((found / "recipe.json").read_text())
    option = "--from-scratch-at-searched-shape"
    for words, said in (
        ((option, tmp_path / "none"), "none: no such file or folder"),
        ((option, tmp_path), "holds no run of prunus; give the folder of one that pruned"),
        ((option, tmp_path / "plain"), "plain cut nothing"),
        ((option, tmp_path / "begun"), "this run is not finished, so it has no model yet"),
        (("scratch", option, found), "give either RECIPE or --from-scratch-at-searched-shape RUN"),
        ((), "give either RECIPE or"),
        ((option, found, "--source", "x"), "give either source"),
    ):
        code, _, err = pipeline.cli("train", *words, "--out", tmp_path / "out")
        assert code == 2 and said in err, err
    with mock.patch.object(export, "check_saved", return_value={"class": "x"}):
        code, out, err = pipeline.cli("train", option, found, "--tokens", "128", "--out", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["figures"]["tokens"] == 128, err
