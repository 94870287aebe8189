"""What holds for every method: each row of the table on every family of the conformance suite, on tiny models.

A new row is covered without a change here; one that trains is looked at by test_shearing and test_masks. What is particular to a
method, its formula above all, stands in a file of its own.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys

import pipeline
import pytest
import tiny
import torch

from prunus import api, checkpoint, curves
from prunus.anatomy import Anatomy
from prunus.axes import kind_of
from prunus.combination import planned
from prunus.cut import slice_plan, slice_tensors, zero_
from prunus.errors import UserError
from prunus.hf import SUBLAYERS
from prunus.methods import ONE_SHOT
from prunus.oneshot import one_shot_
from prunus.planning import Request
from prunus.source import Source
from prunus.taylor import following

WINDOWS = pipeline.windows(3, 8)
# Weights are float64 and attention is eager in both models, so what is left is the float32 softmax and norms of transformers
# (0.0 or 1e-16 measured), and the biases of flap and prunus, which are added up in float32 (1e-7).
EXACT = 1e-6
GROUPED = ["llama_mha", "llama", "llama_gqa4"]  # 1, 2 and 4 query heads a group
CHOSEN = [
    name for name, row in ONE_SHOT.items() if "rotation" not in row.allocators
]  # these choose among what the model has


def request_for(name, config, **more):
    """Two fifths of what the method could cut, no layer protected, widths in steps of one."""
    row, anatomy = ONE_SHOT[name], Anatomy.of(config)
    kinds = {n: kind_of(n) for n in anatomy.axes}
    reach = sum(
        anatomy.unit_params(n) * anatomy.axes[n].size
        for n, kind in kinds.items()
        if kind in row.axes and (anatomy.axes[n].size > 1 or kind in SUBLAYERS)
    )
    share = 1.25 if row.is_sparse else min(1.0, reach / anatomy.block_params)
    options = {"protect": "0,0"} if "protect" in row.options else {}
    finest = {"multiple_of": 1} if row.multiple_of > 1 else {}
    return {"method": name, "ratio": 0.4 * share, "options": options} | finest | more


def run(name, model, windows=WINDOWS, batch_size=2, **more):
    """Consumes the model."""
    plan = planned(model.config, Anatomy.of(model.config), Request(**request_for(name, model.config, **more)))
    return one_shot_(plan, model, windows, batch_size=batch_size)


@functools.cache
def outcome_of(name, case):
    """Shared, so never changed."""
    return run(name, pipeline.model(case))


def same_decision(one, other):
    if one.mask is not None:
        return all(torch.equal(kept, other.mask.kept[name]) for name, kept in one.mask.kept.items())
    return one.keep == other.keep


# -- every family ---------------------------------------------------------------------------------------------------------


def declared_refusals(row, anatomy):
    """Why the family has nothing for the method, in the family's own words. Without heads, channels alone will do."""
    refused = [anatomy.refused[axis] for axis in row.axes if axis in anatomy.refused]
    if "rotation" in row.allocators and anatomy.family.unrotatable:
        return [*refused, anatomy.family.unrotatable]
    return refused if "hidden" in row.axes or len(refused) == len(row.axes) else []


@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize("case", tiny.CASES)
def test_every_family_is_cut_as_promised_or_refuses_for_a_declared_reason(name, case):
    """Sizes, finite logits, weights of the source at what stays; and the small model is the source with zeros."""
    row, config = ONE_SHOT[name], pipeline.config(case)
    anatomy = Anatomy.of(config)
    if reasons := declared_refusals(row, anatomy):
        with pytest.raises(UserError) as caught:
            run(name, pipeline.model(case))
        assert any(reason in str(caught.value) for reason in reasons) and "\n" not in str(caught.value)
        return
    outcome, dense = outcome_of(name, case), pipeline.shared(case)
    assert torch.isfinite(tiny.logits_of(outcome.model, WINDOWS.ids_NT)).all()
    counted = {n: p.numel() for n, p in outcome.model.named_parameters()}
    assert sum(counted.values()) == outcome.target.anatomy.num_params
    if row.is_sparse:
        check_zeros(outcome, dense)
    else:
        check_size(outcome, anatomy)
        if "rotation" not in row.allocators:  # a turned stream has no weight of the source left: test_rotation
            check_slices(outcome, dense)


def check_size(outcome, anatomy):
    """At most the budget and short of it by less than a step; whole layers are rounded to the nearest number."""
    plan, after = outcome.plan, outcome.target.anatomy.block_params
    budget = (1 - plan.request.ratio) * anatomy.block_params
    if plan.target is not None:
        assert after == plan.target.anatomy.block_params
    if plan.run is not None:
        assert abs(after - budget) <= plan.step / 2
    else:
        assert budget - plan.step < after <= budget


def check_zeros(outcome, dense):
    """Short of the sparsity by less than a weight a row; outside of the mask's matrices nothing moves."""
    before, after = pipeline.state(dense), pipeline.state(outcome.model)
    tensors = Anatomy.of(dense.config).tensors
    assert set(outcome.mask.kept) == {n for n, t in tensors.items() if t.layer is not None and len(t.shape) == 2}
    for name, weight in after.items():
        if name not in outcome.mask.kept:
            assert torch.equal(weight, before[name]), name
            continue
        kept = outcome.mask.kept[name]
        assert not weight[~kept].any()
        assert abs(int((~kept).sum()) - outcome.plan.sparsity * kept.numel()) < len(kept)
        if outcome.plan.compensator == "none":
            assert torch.equal(weight[kept], before[name][kept])


@torch.no_grad()
def check_slices(outcome, dense):
    """All but the readers that a compensator refits is the source's; the source with zeros, so refitted, is the same model."""
    anatomy, after = Anatomy.of(dense.config), pipeline.state(outcome.model)
    cuts_stem = "hidden" in outcome.keep.units
    recipe = slice_plan(anatomy, outcome.keep, fold=not cuts_stem)
    expected = slice_tensors(pipeline.state(dense), recipe)
    readers = {anatomy.reader(n).param for n, axis in anatomy.axes.items() if kind_of(n) in ("kv_heads", "intermediate")}
    readers = {name for name in readers if name in recipe.names and outcome.plan.compensator != "none"}
    repaired = readers | {name.removesuffix("weight") + "bias" for name in readers}
    for name, new_name in recipe.names.items():
        assert name in repaired or torch.equal(after[new_name], expected[new_name]), name
    if cuts_stem:  # a norm over fewer channels sees another mean, so zeros are another model: test_zero_slice_save
        return
    zeroed = tiny.clone(dense)
    zero_(dict(zeroed.named_parameters()), anatomy, outcome.keep)
    for name in readers:
        refitted = outcome.model.get_submodule(recipe.names[name].removesuffix(".weight"))
        reader = zeroed.get_submodule(name.removesuffix(".weight"))
        reader.weight[:, recipe.rows.get(name, {}).get(1, slice(None))] = refitted.weight
        reader.bias = copy.deepcopy(refitted.bias)
    outcome.model.set_attn_implementation("eager")
    # olmo2's norms run over all heads, and their epsilon stays where the number of heads does not
    near = 1e-4 if dense.config.model_type == "olmo2" else EXACT
    assert tiny.relative(tiny.logits_of(outcome.model, WINDOWS.ids_NT), tiny.logits_of(zeroed, WINDOWS.ids_NT)) < near


# -- what must not matter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize("case", ["llama_gqa4", "gemma"])
def test_neither_the_batch_nor_another_run_changes_the_decision(name, case):
    once, again, split = (
        outcome_of(name, case),
        run(name, pipeline.model(case)),
        run(name, pipeline.model(case), batch_size=1),
    )
    assert same_decision(once, again) and same_decision(once, split)
    first, *others = (pipeline.state(outcome.model) for outcome in (once, again, split))
    for key, weight in first.items():
        assert torch.equal(weight, others[0][key]), key
        torch.testing.assert_close(others[1][key], weight, rtol=0, atol=1e-5 * float(weight.abs().max()))


def agreement(one, other):
    """The share of units (of weights) on whose fate two decisions agree."""
    if one.mask is not None:
        pairs = [(kept, other.mask.kept[name]) for name, kept in one.mask.kept.items()]
        return float(torch.cat([(a == b).flatten() for a, b in pairs]).float().mean())
    same = total = 0
    for name in {*one.keep.units, *other.keep.units}:
        size = one.plan.anatomy.axes[name].size
        a, b = (set(outcome.keep.units.get(name, range(size))) for outcome in (one, other))
        same, total = same + size - len(a ^ b), total + size
    return same / total


@pytest.mark.parametrize("name", ONE_SHOT)
def test_bfloat16_decides_nearly_as_float32(name, monkeypatch):
    """The same weights, but activations are rounded to eight bits: 0.2 % each, some 1 % of a score after a few blocks.

    Statistics, gradients and losses are float32 or wider, so only what lies within that of the threshold may tip: of scores
    spread over a decade about one in fifty, and a weight or unit that tips counts twice, for it and for what goes instead.
    Tokens that a model draws may differ, one in some hundred, which so little text does not bear: the text's own take their place.
    """
    monkeypatch.setattr(curves, "drawn", following)
    rounded = pipeline.model("llama_tied", dtype=torch.bfloat16)
    exact = copy.deepcopy(rounded).to(torch.float32)
    one, two = run(name, exact), run(name, rounded)
    assert {p.dtype for p in two.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(tiny.logits_of(two.model, WINDOWS.ids_NT)).all()
    assert one.target.anatomy.block_params == two.target.anatomy.block_params or not ONE_SHOT[name].uniform
    assert agreement(one, two) > 0.95


# -- dead and equal units -------------------------------------------------------------------------------------------------

DEAD = {"hidden": [3, 20], "intermediate": [5, 17], "kv_heads": [0], "layers": [1], "attention": [0], "mlp": []}


@functools.cache
def with_dead(case, axes):
    """(model, windows, dead units): layer 1 has units of each kind that do nothing. It is sure of the windows' tokens, which
    are its own, so that whatever else goes costs loss.
    """
    model = pipeline.model(case)
    anatomy, tensors = Anatomy.of(model.config), dict(model.named_parameters())
    dead = {}
    with torch.no_grad():
        for name, axis in anatomy.axes.items():
            if kind_of(name) in axes and axis.layer in (None, 1) and (axis.size > 1 or kind_of(name) in SUBLAYERS):
                dead[name] = DEAD[kind_of(name)]
                for span in axis.spans:
                    tensors[span.param].index_fill_(span.dim, torch.tensor(tiny.spans_rows(span, dead[name])).long(), 0)
        model.lm_head.weight.mul_(20)
    ids = tiny.greedy_by_hand(model, tiny.tokens(3, 2, vocab=pipeline.VOCAB), 6)
    base = pipeline.windows(3)
    return model, type(base)(ids, "greedy", None, None, "1" * 64, None, ids.numel()), dead


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("case", GROUPED)
def test_dead_units_go_first(name, case):
    """Of single weights: those that read a channel which is always zero and leads nowhere."""
    row = ONE_SHOT[name]
    model, windows, dead = with_dead(case, ("intermediate",) if row.is_sparse else row.axes)
    outcome = run(name, copy.deepcopy(model), windows)
    for axis, units in dead.items():
        if row.is_sparse:
            assert not outcome.mask.kept["model.layers.1.mlp.down_proj.weight"][:, units].any()
        elif 1 in outcome.keep.units.get("layers", (1,)) or axis == "layers":
            assert not set(units) & set(outcome.keep.units.get(axis, units)), axis


@pytest.mark.parametrize("name", [n for n in CHOSEN if {"weights", "intermediate"} & set(ONE_SHOT[n].axes)])
def test_equal_units_are_worth_the_same(name):
    """Channel 9 is channel 4 again, each with half of what it wrote. Scores are equal; least squares needs only one of them.

    Of single weights the two channels' rows are looked at. Where a threshold falls between equal ones, some stay and some go:
    one of the row's 32, and a few where the mask grows in steps.
    """
    model = pipeline.model("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
            matrix[9] = matrix[4]
        mlp.down_proj.weight[:, 4] /= 2
        mlp.down_proj.weight[:, 9] = mlp.down_proj.weight[:, 4]
    outcome = run(name, model)
    if outcome.mask is not None:
        kept = outcome.mask.kept["model.layers.1.mlp.up_proj.weight"]
        assert int((kept[4] != kept[9]).sum()) <= 3
    elif outcome.scores is not None:
        values = outcome.scores.values["layers.1.intermediate"]
        assert float(values[4]) == pytest.approx(float(values[9]), rel=1e-6)
    else:
        assert len({4, 9} & set(outcome.keep.units["layers.1.intermediate"])) < 2


# -- on disk --------------------------------------------------------------------------------------------------------------


def uniform_too(name):
    """Whether the method leaves layers that differ, and on request layers that do not."""
    config = pipeline.config("llama_tied")
    try:
        planned(config, Anatomy.of(config), Request(**request_for(name, config, uniform=True)))
    except UserError:
        return False
    return True


SAVED = [(name, alike) for name in ONE_SHOT for alike in (False, True) if not alike or uniform_too(name)]


@functools.cache
def saved(name, alike):
    """(folder, manifest, logits before it was saved)."""
    out = pipeline.scratch() / f"every-{name}{'-uniform' * alike}"
    ask = request_for(name, pipeline.config("llama_tied")) | ({"uniform": True} if alike else {})
    if ONE_SHOT[name].needs_text:
        ask |= {"calibration": str(pipeline.text_file()), "text": api.TextOptions(3, 16)}
    result = api.prune(str(pipeline.folder("llama_tied")), **ask)
    with pytest.MonkeyPatch.context() as patch:
        pipeline.verify_here(patch)
        manifest = result.save(out)
    return out, manifest, tiny.logits_of(result.model, WINDOWS.ids_NT)


@pytest.mark.parametrize(("name", "alike"), SAVED)
def test_what_is_saved_is_what_was_cut(name, alike):
    out, manifest, logits = saved(name, alike)
    source = Source.open(str(out))
    assert torch.equal(tiny.logits_of(source.load(), WINDOWS.ids_NT), logits)
    assert source.anatomy.num_params == manifest.after["params"]
    assert checkpoint.read_manifest(out).method["name"] == name
    if alike:
        assert len(set(source.anatomy.shape.layers)) == 1 and not source.config.model_type.startswith("pruned_")


RELOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        print(json.dumps(model(input_ids=ids, use_cache=False).logits.tolist()))
assert "prunus" not in sys.modules
"""


def test_stock_transformers_computes_the_same_from_every_folder(tmp_path):
    """One clean process for all, which never imports prunus."""
    folders = [saved(*which) for which in SAVED]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", RELOAD, json.dumps(WINDOWS.ids_NT.tolist()), *(str(out) for out, *_ in folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    for line, (_, _, logits) in zip(done.stdout.splitlines(), folders, strict=True):
        torch.testing.assert_close(torch.tensor(json.loads(line)), logits, rtol=1e-4, atol=1e-4)
