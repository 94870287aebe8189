"""Sizes that fit a budget, against every choice there is."""

from __future__ import annotations

import math

import pipeline
import pytest
import torch

from prunus.anatomy import Anatomy
from prunus.errors import UserError
from prunus.hf import target_for
from prunus.keep import Keep
from prunus.sizes import Sizes, adaptive_counts, adaptive_onward, alike_counts

CASES = ["llama", "llama_bias", "llama_mqa", "llama_gqa4", "qwen2", "olmo2", "phi3", "phi_qk", "gpt_neox"]


def anatomy_of(case, **changes):
    return Anatomy.of(pipeline.config(case, **changes))


def after(anatomy, counts):
    return Keep({name: tuple(range(count)) for name, count in counts.items()}).anatomy_after(anatomy)


def of_layer(anatomy, layer):
    return sum(t.numel for t in anatomy.tensors.values() if t.layer == layer)


@pytest.mark.parametrize("case", CASES)
def test_sizes_count_what_a_cut_leaves(case):
    anatomy = anatomy_of(case)
    sizes = Sizes.of(anatomy, [1], 5)
    for groups, channels in (sizes.whole, sizes.fewest, (sizes.groups[-1], 7)):
        counts = {"layers.1.kv_heads": groups, "layers.1.intermediate": channels}
        cut = after(anatomy, {name: count for name, count in counts.items() if name in anatomy.axes})
        assert sizes.params(groups, channels) == of_layer(cut, 1)
    assert sizes.fewest == (min(1, sizes.whole[0]), 5) and sizes.whole[1] == 24
    two = Sizes.of(anatomy, [0, 2], 5)
    assert two.params(*two.fewest) == 2 * sizes.params(*sizes.fewest)


@pytest.mark.parametrize("multiple_of", [1, 5, 40])
@pytest.mark.parametrize("near", [0.3, 1.5, 2.2, 4.0])
def test_the_budget_is_filled_with_groups_as_near_as_they_can_be(multiple_of, near):
    sizes = Sizes.of(anatomy_of("llama"), [0], multiple_of)
    lawful = [(g, c) for g in range(1, 5) for c in range(1, 25) if c % multiple_of == 0 or c == 24]
    for budget in range(0, sizes.params(*sizes.whole) + 200, 37):
        found = sizes.within(budget, near)
        fits = [pair for pair in lawful if sizes.params(*pair) <= budget]
        assert (found is None) == (not fits)
        if found is not None:
            assert found in fits
            fill = max(c for g, c in fits if g == found[0])
            assert found[1] == fill
            step = multiple_of * sizes.channel
            nearer = [g for g, _ in fits if abs(g - near) < abs(found[0] - near)]
            for g in nearer:  # it could not fill the budget
                assert budget - sizes.params(g, 24) >= 0 and sizes.params(*found) > sizes.params(g, 24)
            if found[1] < 24:
                assert budget - sizes.params(*found) < step


def test_alike_counts_leave_other_layers_whole():
    anatomy = anatomy_of("llama", num_hidden_layers=5)
    budget = math.floor(0.8 * anatomy.block_params)
    counts = alike_counts(anatomy, budget, 2.0, 1, [1, 3])
    assert {int(name.split(".")[1]) for name in counts} == {1, 3}
    assert counts["layers.1.kv_heads"] == counts["layers.3.kv_heads"] == 2
    channel = 2 * 3 * 32
    assert budget - channel < after(anatomy, counts).block_params <= budget
    with pytest.raises(
        UserError, match=r"ratio: 1,000 block parameters leave no room for one FFN channel in each of 5 layers"
    ):
        alike_counts(anatomy, 1000, 2.0, 1)


# -- every layer by itself --------------------------------------------------------------------------------------------------


def shares(anatomy, ratio, generator):
    """Random shares that sum to the budget: layers take from each other."""
    sizes = torch.tensor([float(of_layer(anatomy, i)) for i in range(anatomy.shape.num_hidden_layers)], dtype=torch.float64)
    drawn = torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    drawn = drawn - (drawn * sizes).sum() / sizes.sum()
    return (ratio + 0.7 * ratio * drawn / drawn.abs().max()).tolist()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_adaptive_counts_meet_the_budget_and_every_layer_its_share(case, multiple_of):
    anatomy = anatomy_of(case, num_hidden_layers=6, **({"layer_types": None} if case == "qwen2" else {}))
    alone = case in ("llama_mqa", "phi_qk", "gpt_neox")  # channels alone give less
    generator = torch.Generator().manual_seed(0)
    for ratio in (0.05, 0.1) if alone else (0.05, 0.2, 0.4, 0.55):
        ratios = shares(anatomy, ratio, generator)
        fewest = Sizes.of(anatomy, [0], multiple_of)
        if (1 - max(ratios)) * of_layer(anatomy, 0) < fewest.params(*fewest.fewest):
            assert ratio >= 0.4
            continue
        budget = math.floor((1 - ratio) * anatomy.block_params)
        counts = adaptive_counts(anatomy, ratios, budget, multiple_of)
        cut = after(anatomy, counts)
        chunk = anatomy.unit_params("layers.0.intermediate") * multiple_of
        assert budget - chunk < cut.block_params <= budget
        for layer, share in enumerate(ratios):
            assert abs(of_layer(cut, layer) - (1 - share) * of_layer(anatomy, layer)) < 2 * chunk
            width = counts[f"layers.{layer}.intermediate"]
            assert width % multiple_of == 0 or width == 24


@pytest.mark.parametrize("case", ["llama_mha", "llama", "llama_gqa4"])
@pytest.mark.parametrize("cuts", [2, 20])
def test_many_small_cuts_take_groups_and_channels_alike(case, cuts):
    """Each cut is less than half a group: from the present alone every one of them would take channels (algorithms.md B16)."""
    now = source = anatomy_of(case, num_hidden_layers=4, intermediate_size=128)
    importance = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    removed = [0.0] * 4
    for cut in range(1, cuts + 1):
        budget = round(source.block_params * (1 - 0.5 * cut / cuts))
        taken = 0.5 / cuts
        shares_, counts = adaptive_onward(now, source, importance, budget, 0.5 * taken)
        now = after(now, counts)
        # of two groups one is a quarter of a layer: not every cut has channels left to make up for it
        least = source.unit_params("layers.0.kv_heads" if case == "llama_gqa4" else "layers.0.intermediate")
        assert budget - least < now.block_params <= budget
        removed = [a + b for a, b in zip(removed, shares_, strict=True)]
    whole, channels = source.axes["layers.0.kv_heads"].size, source.axes["layers.0.intermediate"].size
    assert now.axes["layers.3.kv_heads"].size < whole  # the layer that gives most
    for layer in range(4):
        share = 1 - of_layer(now, layer) / of_layer(source, layer)
        groups, width = (now.axes[f"layers.{layer}.{kind}"].size for kind in ("kv_heads", "intermediate"))
        assert abs(groups - (1 - share) * whole) <= 1  # as near as whole groups come, and one more that others made up for
        assert 1 <= width < channels or share < 0.3


def test_adaptive_counts_where_a_layer_has_no_mlp_or_no_attention():
    source = anatomy_of("llama", num_hidden_layers=4)
    config = pipeline.config("llama", num_hidden_layers=4)
    pruned = target_for(config, source, Keep({"layers.1.mlp": (), "layers.2.attention": ()})).config
    anatomy = Anatomy.of(pruned)
    budget = math.floor(0.7 * anatomy.block_params)
    counts = adaptive_counts(anatomy, [0.3] * 4, budget, 1)
    assert "layers.1.intermediate" not in counts and "layers.2.kv_heads" not in counts
    assert budget - 3 * 32 < after(anatomy, counts).block_params <= budget
