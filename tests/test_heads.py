"""Query heads that go one by one while a model trains: which, what they cost, and what is left of the KV heads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from shrinking import SEQ, done, events, pruning, training_config
from test_train import weights

from prunus import shrink_plots
from prunus.anatomy import Anatomy
from prunus.distributed import ALONE
from prunus.errors import UserError
from prunus.train.opening import prepare as opened
from prunus.train.shapes import config_of
from prunus.train.shrink.activations import points
from prunus.train.shrink.goal import Goal, cut_to, shrunk
from prunus.train.shrink.groups import Chooser, Standing
from prunus.train.shrink.part import PrunePart, SaliencyPart
from prunus.train.shrink.saliency import Saliency

KINDS = ("heads", "intermediate", "hidden")


def scored(anatomy, kinds=KINDS, seed=0):
    """A saliency of random numbers, and what is alive."""
    named = {n: torch.nn.Parameter(torch.zeros(t.shape)) for n, t in anatomy.tensors.items()}
    saliency, generator = Saliency(SaliencyPart(), anatomy, kinds, named, ALONE), torch.Generator().manual_seed(seed)
    for held in saliency.held.values():
        held.mean.copy_(torch.rand(held.mean.shape, generator=generator, dtype=torch.float64))
    return saliency, Standing.of(anatomy)


# -- a run ----------------------------------------------------------------------------------------------------------------


def test_layers_keep_as_many_query_heads_and_each_the_kv_heads_that_these_read():
    record, out = done("heads")
    gone = {layer: set() for layer in range(tiny.LAYERS)}
    for event in events(out):
        for name, units in event["pruned"]["units"].items():
            if name.endswith(".heads"):
                gone[int(name.split(".")[1])] |= set(units)
    counts = {len(units) for units in gone.values()}
    assert len(counts) == 1 and 0 < counts.pop() < tiny.HEADS
    assert len({tuple(sorted(units)) for units in gone.values()}) == tiny.LAYERS  # each layer its own least salient
    anatomy = Anatomy.of(config_of(str(out / "model"), 0))
    kv_heads = []
    for layer, units in gone.items():
        read = [q // 2 for q in range(tiny.HEADS) if q not in units]  # two query heads read each KV head of the source
        left = sorted(set(read))
        assert anatomy.shape.layers[layer].kv_heads_read == tuple(left.index(kv) for kv in read)
        kv_heads.append(len(left))
    told = record["figures"]["pruning"]
    assert told["shape"]["num_key_value_heads"] == kv_heads and len(set(kv_heads)) > 1
    assert told["model_type"] == "pruned_llama" and told["measured"] <= told["target"]
    assert anatomy.num_params == sum(t.numel() for t in weights(out).values())
    source = Anatomy.of(training_config())
    assert anatomy.kv_bytes_per_token() == source.kv_bytes_per_token() * sum(kv_heads) // (3 * tiny.KV_HEADS)


def test_cuts_of_query_heads_are_drawn():
    _, out = done("heads")
    found = shrink_plots.Shrinking.of(json.loads(text) for text in (out / "log.jsonl").read_text().splitlines())
    assert list(found.source.inner) == ["heads", "intermediate"] and set(found.kinds) == set(KINDS)
    assert found.source.inner["heads"] == (tiny.HEADS,) * tiny.LAYERS
    assert found.stages[-1].inner["heads"] == (4, 4, 4) and found.gone("heads")[-1] == 0.5


# -- what they are worth and cost -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama", "llama_mha", "llama_mqa", "phi3"])
def test_a_query_head_is_worth_its_columns(case):
    anatomy = Anatomy.of(tiny.tiny_config(case))
    saliency, standing = scored(anatomy)
    table, head = saliency.table(None, standing.alive), anatomy.shape.head_dim
    for layer in range(tiny.LAYERS):
        matrix = saliency.held[f"model.layers.{layer}.self_attn.o_proj.weight"].mean.double().numpy()
        wanted = [matrix[:, q * head : (q + 1) * head].sum() for q in range(tiny.HEADS)]
        assert table.values[f"layers.{layer}.heads"] == pytest.approx(np.array(wanted), rel=1e-6)  # float32 sums


def test_a_layer_is_worth_its_heads_once():
    anatomy = Anatomy.of(tiny.tiny_config("llama"))
    saliency, standing = scored(anatomy, ("layers", "heads", "intermediate"))
    table = saliency.table(None, standing.alive)
    own = table.values["layers.1.heads"].sum() + table.values["layers.1.intermediate"].sum()
    assert "layers.1.kv_heads" not in table.values and table.values["layers"][1] == pytest.approx(own)
    again, _ = scored(anatomy, ("layers",))
    assert {name.rsplit(".", 1)[-1] for name in again.table(None, standing.alive).values} == {
        "kv_heads",
        "intermediate",
        "layers",
    }


def test_the_last_query_head_takes_its_kv_head_along():
    """2 d e parameters with a query head, and 2 d e more with the last one of a KV head."""
    anatomy = Anatomy.of(tiny.tiny_config("llama"))
    standing, one = Standing.of(anatomy), 2 * tiny.HIDDEN * tiny.HEAD_DIM
    freed = []
    for q in (0, 5, 1, 4):
        before = standing.now
        standing.drop({"layers.1.heads": (q,)})
        freed.append(before.num_params - standing.now.num_params)
    assert freed == [one, one, 2 * one, 2 * one]
    assert standing.now.shape.layers[1].num_key_value_heads == 2
    assert anatomy.unit_params("layers.1.heads") == one
    mha = Anatomy.of(tiny.tiny_config("llama_mha"))
    assert mha.unit_params("layers.1.heads") == mha.unit_params("layers.1.kv_heads") == 2 * one


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("case", ["llama_gqa4", "olmo2"])
def test_any_query_head_may_go_until_the_target_is_met(case, alike):
    anatomy = Anatomy.of(tiny.tiny_config(case))
    saliency, standing = scored(anatomy, ("heads",), seed=5)
    part = PrunePart(target={"ratio": 0.2}, axes=["heads"], alike=alike, floor={"heads": 1})
    goal = Goal.of(part, anatomy, SEQ)
    chooser, table = Chooser(part, goal, SEQ), saliency.table(None, standing.alive)
    while found := chooser.next(standing, table, goal.value):
        for name, units in found[0].units.items():
            assert len(units) == 1 and table.values[name][list(units)] == table.values[name].min()
        assert len(found[0].units) == (tiny.LAYERS if alike else 1)
        standing.drop(found[0].units)
        table.drop(found[0].units)
    assert goal.measure(standing.now) <= goal.value and standing.now.shape.is_ragged
    sizes = [layer.num_attention_heads for layer in standing.now.shape.layers]
    assert (len(set(sizes)) == 1) == alike


def test_a_target_is_lawful_only_if_it_is_met_whichever_heads_go():
    """What is left of six query heads of eight may read three KV heads of four, or all of them."""
    anatomy = Anatomy.of(tiny.tiny_config("llama"))
    assert cut_to(anatomy, {"heads": 6}).units["layers.0.heads"] == (0, 1, 2, 3, 4, 6)
    assert cut_to(anatomy, {"heads": 6}, apart=False).units["layers.0.heads"] == (0, 1, 2, 3, 4, 5)
    most, fewest = (shrunk(anatomy, {"heads": 6}, apart=apart) for apart in (True, False))
    assert [a.shape.layers[0].num_key_value_heads for a in (most, fewest)] == [4, 3]
    part = {"axes": ["heads"], "floor": {"heads": 6}}
    assert Goal.of(PrunePart(target={"params": most.num_params}, **part), anatomy, SEQ).value == most.num_params
    with pytest.raises(UserError, match="below the least shape's"):
        Goal.of(PrunePart(target={"params": fewest.num_params}, **part), anatomy, SEQ)


def test_layers_whose_kv_heads_differ_may_lose_the_same():
    _, out = done("heads")
    anatomy = Anatomy.of(config_of(str(out / "model"), 0))
    assert Goal.of(PrunePart(target={"ratio": 0.1}, axes=["heads", "intermediate"]), anatomy, SEQ).source > 0
    with pytest.raises(UserError, match=r"'kv_heads' cannot be cut: its query heads share KV heads unevenly.*cut heads"):
        Goal.of(PrunePart(target={"ratio": 0.1}), anatomy, SEQ)


def test_what_o_proj_reads_is_looked_at():
    anatomy = Anatomy.of(tiny.tiny_config("llama"))
    assert list(points(anatomy, ("heads",))) == [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(tiny.LAYERS)]
    assert points(anatomy, ("heads", "hidden")) == points(anatomy, ("kv_heads", "hidden"))


# -- wrong inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"axes": ["heads", "kv_heads"]}, "heads and kv_heads both cut query heads"),
        (
            {"masks": {}, "target": {"intermediate_size": 12}, "axes": ["heads", "intermediate"]},
            "learned for whole KV groups",
        ),
        ({"target": {"intermediate_size": 12}, "axes": ["heads", "intermediate"]}, "which KV heads are left is not known"),
        ({"target": {"kv_bytes": 100}}, "which KV heads are left is not known"),
        ({"per": "kv_bytes"}, "per: kv_bytes of a single query head is nothing until its KV head goes"),
        ({"per": "decode_ms"}, "per: decode_ms of a single query head"),
        ({"saliency": {"matrices": "all"}}, "are no single query head's; give output"),
        ({"allocate": "adaptive", "alike": False}, "take heads out of axes"),
        ({"floor": {"heads": 9}}, "heads 9 is above the source's 8"),
    ],
)
def test_wrong_pruning_of_query_heads_is_refused_before_weights(part, said, tmp_path):
    with pytest.raises(UserError, match=said) as refused:
        opened(pruning(**({"axes": ["heads"]} | part)), tmp_path / "refused")
    assert "\n" not in str(refused.value)


def test_a_family_whose_heads_cannot_go_is_refused():
    for case in ("gpt_neox", "phi_qk"):
        with pytest.raises(UserError, match=r"prune\.axes: 'heads' cannot be cut: .* the size of a head"):
            Goal.of(PrunePart(target={"ratio": 0.2}, axes=["heads"]), Anatomy.of(tiny.tiny_config(case)), SEQ)
