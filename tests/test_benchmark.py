"""The benchmark asks for every method what it should, and its bare work runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pipeline
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from prunus.anatomy import Anatomy
from prunus.builders import make_plan
from prunus.methods import ONE_SHOT
from prunus.planning import Plan


def script(name: str):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(
        f"bench_{name}", Path(__file__).parent.parent / "benchmarks" / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


bench = script("oneshot")


def plan(name: str, config) -> Plan:
    return make_plan(config, Anatomy.of(config), bench.REQUESTS[name])


@pytest.mark.parametrize("name", ONE_SHOT)
def test_every_method_has_a_request_and_a_floor(name):
    """SmolLM2's depth, so that the ratio removes whole layers and protected layers leave some."""
    config = tiny.tiny_config("llama", num_hidden_layers=30, intermediate_size=128)
    made = plan(name, config)
    floor = bench.Floor.of(made)
    if floor is None:
        assert made.method.criterion == "loss-without" and bench.windows_of(made) * made.method.sweeps <= bench.TRIES
        return
    assert bench.windows_of(made) == 32
    assert (floor.limit(10.0, 40.0, 5.0) > 0) == made.needs_text
    gradients = bool(made.graded_tensors | made.graded_outputs)
    assert (floor.backs > 0) == gradients  # a row that needs them and is not known to would be held to a forward pass


def test_limits_are_those_of_the_protocol():
    config = tiny.tiny_config("llama", num_hidden_layers=30, intermediate_size=128)
    limits = {n: bench.Floor.of(plan(n, config)).limit(20.0, 70.0, 10.0) for n in ("flap", "wanda", "llm-pruner", "ziplm")}
    assert limits == {"flap": 25.0, "wanda": 50.0, "llm-pruner": 87.5, "ziplm": 52.5}
    sparsegpt = bench.Floor.of(plan("sparsegpt", config))
    assert sparsegpt.limit(20.0, 0.0, 10.0) == 60.0 and sparsegpt.limit(20.0, 0.0, 100.0) == pytest.approx(66.0)


@pytest.mark.parametrize("name", ONE_SHOT)
def test_bare_algebra_runs_at_the_sizes_of_a_block(name):
    made = plan(name, tiny.tiny_config("llama", num_hidden_layers=30, intermediate_size=128))
    floor = bench.Floor.of(made)
    if floor is None or floor.solve is None:
        return
    calls = list(bench.algebra(floor, made, seq_len=160, windows=2))
    assert len(calls) == len(floor.points)
    for call in calls:
        call()


def test_bare_gradients_are_of_block_matrices_alone():
    model = pipeline.model("llama", dtype=torch.float32)
    before = [p.requires_grad for p in model.parameters()]
    anatomy = Anatomy.of(model.config)
    seen = []
    model.model.layers[0].mlp.down_proj.weight.register_hook(lambda g: seen.append(float(g.abs().sum())))
    bench.back(model, anatomy, tiny.tokens(3, 8), 2)
    assert len(seen) == 2 and all(value > 0 for value in seen)
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    assert wanted == {n for n, t in anatomy.tensors.items() if t.is_matrix and t.layer is not None}
    for parameter, flag in zip(model.parameters(), before, strict=True):
        parameter.requires_grad_(flag)


def test_a_prompt_s_floor_is_of_the_products_that_run():
    """Counted as they run: a floor that held the head of every token came out above the time itself."""
    model = pipeline.model("llama")
    anatomy = Anatomy.of(model.config)
    ids = torch.randint(3, 200, (1, 16))
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
    assert script("measure").products(anatomy, 16)[0] == counted.get_total_flops() < anatomy.flops(16)
