"""Fixtures shared by the suite: tiny models by name, and a tiny byte-level tokenizer."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported: no test may reach the network

import functools
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import warm
from hypothesis import settings

from prunus import reload, verification

OFFLINE = Path(__file__).with_name("offline")
if os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] != str(OFFLINE):  # unless this process was started by the suite
    runpy.run_path(str(OFFLINE / "sitecustomize.py"))  # no socket leaves this machine, nor that of a process of ours
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # what Python writes beside sources for a newcomer, it writes here
sys.dont_write_bytecode = False
torch.set_num_threads(1)
settings.register_profile("prunus", deadline=None)  # a machine with other work is slow by chance
settings.load_profile("prunus")
_cache = tempfile.TemporaryDirectory(prefix="prunus-cache-")
os.environ["PRUNUS_CACHE"] = _cache.name  # the user's latency table is none of a test's business


@pytest.fixture(scope="session", autouse=True)
def _warm():
    """Checkpoints are reloaded in forks of a clean process; `cold` goes back to fresh interpreters."""
    forks = warm.Forks(reload.__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "clean_process", forks)
        yield
    forks.close()


COLD = verification.clean_process


@pytest.fixture
def cold(monkeypatch):
    monkeypatch.setattr(verification, "clean_process", COLD)


CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "in 12 years 12 cats and 12 dogs met 12 12 12 times",
    "a cat  12  a dog   12   the mat    12",
    "one more line so that there are more merges than tokens to spare",
] * 20


@functools.cache
def _grown(name: str) -> Any:
    return tiny.grown(tiny.tiny_config(name))


@pytest.fixture
def dense_of():
    """`dense_of("llama")`: the tiny random model of that case; made once and shared, so never change it."""
    return _grown


@functools.cache
def _byte_level_tokenizer(vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # SmolLM's
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture
def byte_level_tokenizer():
    """`byte_level_tokenizer(61)`: a `tokenizers` byte-level BPE trained on `CORPUS`; made once, so never change it."""
    return _byte_level_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A transformers tokenizer with as many tokens as the tiny models have: 0 pads, 1 begins, 2 ends."""
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
    backend = _byte_level_tokenizer(tiny.VOCAB)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos)


@pytest.fixture
def short_lessons(monkeypatch):
    """What a teacher says in shards of five sequences, in micro-batches of two: neither divides the other, nor the run.

    Models are not looked at in a clean process, which costs seconds; tests/test_train_results.py has it.
    """
    import lessons
    import pipeline
    import training

    from prunus.train import cache, export, teaching

    monkeypatch.setattr(teaching, "SHARD_BYTES", 5 * cache.bytes_of(training.SEQ, lessons.K, pipeline.VOCAB))
    monkeypatch.setattr(export, "check_saved", lambda stage, expected: {})
