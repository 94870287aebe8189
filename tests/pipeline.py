"""Things the pruning tests share: a text, a tokenizer, checkpoints on disk, naive references. Made once, never changed."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import signal
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from prunus import api, checkpoint, hf
from prunus.anatomy import Anatomy
from prunus.builders import make_plan
from prunus.cut import slice_plan, slice_tensors
from prunus.data.windows import Windows
from prunus.keep import Keep
from prunus.planning import Plan, Request

VOCAB = 300
SEQ_LEN = 16
_WORDS = (
    "the cat dog house river sings under a blue moon and nobody knows why 12 345 stones fall from old trees "
    "while naïve café owners über straße count Δημοκρατία 猫 🐈 letters"
).split()


@functools.cache
def corpus() -> tuple[str, ...]:
    """Sixty documents of some forty words, multi-byte ones among them."""
    generator = np.random.default_rng(0)
    return tuple(" ".join(generator.choice(_WORDS, size=40)) + "." for _ in range(60))


@functools.cache
def tokenizer(vocab_size: int = VOCAB, *, trim_offsets: bool | None = None) -> Any:
    """A byte-level BPE with the whole byte alphabet: any text has tokens, and a piece has one character a byte.

    `trim_offsets` adds the post-processor of Llama 3 and its like, whose offsets leave out a word's leading space.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    made.train_from_iterator(corpus(), trainer)
    if trim_offsets is not None:
        made.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@functools.cache
def _scratch() -> Any:
    return tempfile.TemporaryDirectory(prefix="prunus-tests-")


def scratch() -> Path:
    """A folder that goes when the process ends."""
    return Path(_scratch().name)


@functools.cache
def text_file() -> Path:
    """The corpus as JSONL."""
    path = scratch() / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": doc}) + "\n" for doc in corpus()), encoding="utf-8")
    return path


# -- models -------------------------------------------------------------------------------------------------------------


def config(case: str, **changes: Any) -> Any:
    """A tiny config with the tokenizer's vocabulary."""
    return tiny.tiny_config(case, **({"vocab_size": VOCAB} | changes))


@functools.cache
def _model(case: str, dtype: torch.dtype, seed: int, changes: tuple[tuple[str, Any], ...]) -> Any:
    return tiny.grown(config(case, **dict(changes)), dtype=dtype, seed=seed)


def model(case: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A fresh tiny model, the caller's own to change."""
    return tiny.clone(_model(case, dtype, seed, tuple(changes.items())))


@functools.cache
def folder(case: str = "llama", positions: int = 64) -> Path:
    """A complete float32 checkpoint folder."""
    made = model(case, dtype=torch.float32, max_position_embeddings=positions)
    made.generation_config.max_length = 77
    return checkpoints.save_folder(scratch() / f"dense-{case}-{positions}", made, tokenizer())


@functools.cache
def without(sublayer: str) -> Path:
    """A complete float32 checkpoint folder of a llama that lacks one sub-layer, as `layers.1.mlp`."""
    dense = model("llama_tied", dtype=torch.float32)
    anatomy = Anatomy.of(dense.config)
    keep = Keep({sublayer: ()}).validated(anatomy)
    tensors = slice_tensors(hf.weights(dense, anatomy), slice_plan(anatomy, keep))
    cut = hf.build(hf.target_for(dense.config, anatomy, keep).config, tensors)
    out = scratch() / f"without-{sublayer}"
    out.mkdir()
    checkpoint.write_folder(cut, tokenizer(), out, lambda made, folder: made.save_pretrained(folder))
    return out


def windows(count: int = 5, seq_len: int = SEQ_LEN, seed: int = 0) -> Windows:
    """Random windows, all tokens ordinary."""
    ids = tiny.tokens(count, seq_len, seed=seed, vocab=VOCAB)
    return Windows(ids, "random", None, seed, "0" * 64, None, ids.numel())


def shared(case: str) -> Any:
    """The float64 model of a case, the same one for all: never change it."""
    return _model(case, torch.float64, 0, ())


def plan_for(of: Any, **request: Any) -> Plan:
    """The plan of a request for a model or a config."""
    config = getattr(of, "config", of)
    return make_plan(config, Anatomy.of(config), Request(**request))


# -- naive references ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def inputs_of(model: Any, ids: Tensor, modules: Iterable[str]) -> dict[str, Tensor]:
    """What the named modules read in one plain forward of the whole model, float64 [N, T, C]."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(name, args[0].double().clone())

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def lowest(values: Iterable[float], count: int) -> list[int]:
    """Indices of the `count` lowest values, ties by index: Python's own stable sort."""
    listed = list(values)
    return sorted(range(len(listed)), key=lambda i: listed[i])[:count]


def state(model: Any) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- the command line ---------------------------------------------------------------------------------------------------


def cli(*arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line run in this process."""
    from prunus.cli import run

    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([str(a) for a in arguments])
    finally:
        signal.signal(signal.SIGTERM, handler)
    return code, out.getvalue(), err.getvalue()


def verify_here(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any] = lambda probe: probe) -> None:
    """Reload in this process instead of a clean one (which costs seconds); `change` may lie about what came back."""
    from prunus import verification
    from prunus.source import Source

    def reload_probe(
        folder: Path, ids: list[list[int]], dtype: str, *, new_tokens: int, on_disk: Any
    ) -> tuple[Any, dict[str, Any]]:
        loaded = Source.open(str(folder), quantized=True).load(dtype)
        return change(verification.probe(loaded, new_tokens)), {
            "problems": {},
            "class": type(loaded).__name__,
            "ours": False,
        }

    monkeypatch.setattr(verification, "reload_probe", reload_probe)


SAVED: Mapping[str, tuple[object, ...]] = {  # name -> (case, options); each costs one reload in a clean process
    "per-layer": ("llama", "-m", "flap", "-r", "0.3", "--seq-len", 16, "--windows", 6),
    "uniform": ("llama_tied", "-m", "minitron-width", "-r", "0.3", "--seq-len", 16, "--windows", 6),
    "sparse": ("gemma2", "-m", "wanda", "--pattern", "2:4", "--seq-len", 16, "--windows", 6),
}


def result(source: object = None, **request: Any) -> api.Result:
    """A cheap cut in memory."""
    return api.prune(str(source or folder()), **({"method": "magnitude", "ratio": 0.5} | request))


@functools.cache
def saved(name: str) -> tuple[Path, dict[str, Any], str]:
    """(folder, what --json said, stderr) of a checkpoint that the command line wrote and verified."""
    case, *options = SAVED[name]
    out = scratch() / f"saved-{name}"
    code, said, err = cli("prune", folder(str(case)), *options, "-c", text_file(), "-o", out, "--json")
    assert code == 0, err
    return out, json.loads(said), err
