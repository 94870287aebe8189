"""Runs that cut their tiny model while it trains, for tests."""

from __future__ import annotations

import functools
import json
from unittest import mock

import pipeline
from training import SEQ, asked, tiny_shape

from prunus.train import export
from prunus.train.opening import prepare as opened
from prunus.train.run import execute
from prunus.train.shapes import config_of

UPDATE = 4 * SEQ


def pruning(more=None, **part):
    part = {"target": {"ratio": 0.5}, "pace": {"start": 0.1, "end": 0.8}} | part
    return asked(**({"prune": part} | (more or {})))


def run(out, recipe, *hooks):
    """A run whose saved models are not looked at in a clean process, which costs seconds; others do."""
    with mock.patch.object(export, "check_saved", return_value={}):
        return execute(opened(recipe, out), hooks=hooks)


def log(out):
    return [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]


def events(out):
    return [line for line in log(out) if "pruned" in line]


def kinds_of(anatomy):
    """Axes that may be cut while training."""
    kinds = [k for k in ("kv_heads", "intermediate", "hidden") if k not in anatomy.refused]
    return [k for k in kinds if k != "hidden" or anatomy.exactness("hidden") != "inexact"]


PARTS = {
    "alike": {},
    "heads": {
        "target": {"ratio": 0.4},
        "axes": ["heads", "intermediate", "hidden"],
        "floor": {"heads": 2, "intermediate": 20, "hidden": 28},
        "saliency": {"metric": "second"},
    },
    "each by itself": {"alike": False, "axes": ["kv_heads", "intermediate"], "target": {"ratio": 0.4}},
    "depth": {"axes": ["layers", "intermediate"], "target": {"ratio": 0.4}},
    "sizes": {"target": {"hidden_size": 24, "intermediate_size": 12}},
    "ordered": {
        "target": {"hidden_size": 24, "intermediate_size": 12, "num_key_value_heads": 2},
        "order": ["hidden", "kv_heads", "intermediate"],
    },
    "params": {"target": {"params": 30_000}, "saliency": {"metric": "second", "average": 0.0}},
    "flops": {"target": {"flops": 70_000}, "per": "flops"},
    "kv bytes": {"target": {"kv_bytes": 200}, "axes": ["kv_heads"]},
    "steps": {"pace": {"kind": "steps", "start": 0.0, "prune": 6, "train": 1}},
    "once": {"pace": {"kind": "once", "samples": 10}, "saliency": {"metric": "hessian", "matrices": "all"}},
    "adaptive": {
        "allocate": "adaptive",
        "alike": False,
        "axes": ["kv_heads", "intermediate"],
        "target": {"ratio": 0.4},
        "pace": {"start": 0.0, "end": 0.75, "rounds": 3},
    },
    "embedding": {"saliency": {"matrices": "output+embedding"}, "slice_at": 0.1},
    "rate": {"pace": {"kind": "rate", "start": 0.1, "end": 0.9, "rounds": 3}},
    "rounds": {"pace": {"start": 0.1, "end": 0.9, "rounds": 2}, "saliency": {"metric": "adam"}},
}


def tied(**part):
    return pruning({"model__shape": tiny_shape() | {"tie_word_embeddings": True}}, **part)


@functools.cache
def done(name):
    out = pipeline.scratch() / f"shrunk-{name.replace(' ', '-')}"
    return run(out, tied(**PARTS[name])), out


def training_config():
    return config_of(tiny_shape() | {"tie_word_embeddings": True}, 0)
