"""Models that several processes share out from the start: a process's rows, without the whole, are those of the whole."""

from __future__ import annotations

import json

import pipeline
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from prunus import hf
from prunus.anatomy import Anatomy
from prunus.distributed import World
from prunus.errors import UserError
from prunus.keep import Keep
from prunus.source import Source
from prunus.train.drawn import drawn
from prunus.train.shapes import fresh

WORLDS = [World(rank, size) for size in (2, 3, 7) for rank in range(size)]


def filled(fill):
    rows = {}
    fill(lambda name, values: rows.__setitem__(name, values.clone()))
    return rows


def assert_same(config, **known):
    """Every value bit for bit, the same draws behind them, no memory for a parameter, and the same buffers."""
    whole = fresh(config, **known)
    state = torch.get_rng_state()
    model, fill = drawn(config, **known, part=lambda values: values)
    rows = filled(fill)
    assert torch.get_rng_state().equal(state)
    named = dict(whole.named_parameters())
    assert rows.keys() == named.keys() == dict(model.named_parameters()).keys()
    assert all(rows[name].dtype == p.dtype and rows[name].equal(p) for name, p in named.items())
    assert all(p.is_meta and p.dtype == named[name].dtype for name, p in model.named_parameters())
    buffers = dict(whole.named_buffers())
    assert all(b.equal(buffers[name]) for name, b in model.named_buffers())
    assert model.config.to_dict() == whole.config.to_dict()


@pytest.mark.parametrize("name", sorted(tiny.CASES))
def test_what_is_drawn_tensor_by_tensor_is_what_is_drawn_at_once(name):
    assert_same(tiny.tiny_config(name), init="depth-scaled", seed=3, dtype=torch.float32)


def test_of_layers_that_differ_too_and_in_bfloat16():
    dense = tiny.tiny_config("llama")
    keep = Keep({"layers.0.mlp": (), "layers.1.intermediate": (0, 1, 2)})
    config = hf.target_for(dense, Anatomy.of(dense), keep).config
    assert_same(config, init="standard", seed=1, dtype=torch.bfloat16)


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_a_process_keeps_its_rows(world):
    known = {"init": "standard", "seed": 0, "dtype": torch.float32}
    whole = fresh(tiny.tiny_config("llama_tied"), **known)
    _, fill = drawn(tiny.tiny_config("llama_tied"), **known, part=world.part)
    rows = filled(fill)
    assert all(rows[name].equal(world.part(p)) for name, p in whole.named_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_a_process_reads_its_rows(world, dtype):
    source = Source.open(str(pipeline.folder("llama_tied")))
    stored = source.stored(dtype)
    for name, p in hf.weights(source.load(dtype), source.anatomy).items():
        found = stored.rows(name, world.rows)
        assert found.dtype == p.dtype and found.equal(world.part(p)), name
        assert world.rows(len(p)).start == world.first_row(len(p))


def test_what_is_damaged_is_found_by_the_process_that_reads_it(tmp_path):
    whole = pipeline.folder("llama_tied")
    tensors = load_file(whole / "model.safetensors")
    tensors["model.norm.weight"][-1] = torch.inf
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(json.loads((whole / "config.json").read_text())))
    stored = Source.open(str(tmp_path)).stored()
    assert torch.isfinite(stored.rows("model.norm.weight", World(0, 2).rows)).all()
    with pytest.raises(UserError, match=r"'model\.norm\.weight' holds NaN or infinite weights"):
        stored.rows("model.norm.weight", World(1, 2).rows)
