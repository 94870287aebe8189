"""Tiny training runs for tests: data, recipes, and what is left of them. Made once, never changed."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pipeline
import torch

from prunus.data.prepare import Text, prepare
from prunus.train import recipe as recipes
from prunus.train.loop import Hook
from prunus.train.opening import prepare as opened
from prunus.train.run import execute

SEQ = 16


@functools.cache
def data() -> Path:
    """The corpus as shards of the test tokenizer, half for each of two ranges."""
    out = pipeline.scratch() / "tokens"
    source = [Text(str(pipeline.text_file()))]
    prepare(source, pipeline.tokenizer(), out, splits={"validation": 0.2, "parent": 0.3, "retrain": None})
    return out


@functools.cache
def tokenizer() -> Path:
    out = pipeline.scratch() / "tokenizer"
    pipeline.tokenizer().save_pretrained(out)
    return out


def tiny_shape(**more):
    config = pipeline.config("llama", **more)
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size"
    return {"model_type": "llama", **{n: getattr(config, n) for n in names.split()}, "max_position_embeddings": 64}


def asked(**changes):
    """A tiny run of eight updates from fresh weights."""
    base = {
        "model": {"shape": tiny_shape(), "tokenizer": str(tokenizer())},
        "data": {"domains": [{"folder": str(data())}], "seq_len": SEQ},
        "tokens": 8 * 4 * SEQ, "batch_tokens": 4 * SEQ, "micro_batch": 2, "log_every": 1,
        "optimizer": {"lr": 0.01}, "save": {"every": 2, "keep": 2}, "validate": {"every": 4, "sequences": 4},
    }  # fmt: skip
    for name, value in changes.items():
        at = base
        *parents, last = name.split("__")
        for part in parents:
            at = at.setdefault(part, {})
        at[last] = value
    return recipes.parse(base, "test")


def weights(out):
    from safetensors.torch import load_file

    return load_file(out / "model" / "model.safetensors")


def run(out, recipe=None, **more):
    return execute(opened(recipe or asked(), out), **more)


@functools.cache
def finished() -> Path:
    out = pipeline.scratch() / "finished-run"
    run(out)
    return out


@torch.no_grad()
def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


class Killed(BaseException):
    """As hard as a signal: nothing may catch it."""


class KilledAt(Hook):
    """Dies behind an update, when all that belongs to it is done."""

    def __init__(self, step):
        self.step = step

    def after_step(self, training):
        if training.step == self.step:
            raise Killed


def killed_saying(step):
    """What a run says its lines to, which dies of the one of an update."""

    def say(line):
        if line["step"] == step:
            raise Killed

    return say


@functools.cache
def other_data() -> Path:
    """The corpus backwards: another domain."""
    text = pipeline.scratch() / "backwards.jsonl"
    text.write_text("".join(json.dumps({"text": doc[::-1]}) + "\n" for doc in pipeline.corpus()), encoding="utf-8")
    out = pipeline.scratch() / "backwards"
    prepare([Text(str(text))], pipeline.tokenizer(), out, splits={"validation": 0.2, "parent": 0.3, "retrain": None})
    return out


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
