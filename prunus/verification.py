"""Proof that a saved checkpoint is the model it was saved from: reload in a clean process, compare logits and generation."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import products, reload
from .errors import VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS, _TOKENS, _PROMPT, NEW_TOKENS = 2, 32, 8, 16
NEW_TOKENS_STREAMED = 4  # each reads all blocks from disk
_TOP = 4  # logits a position that go into prunus.json, so that `prunus verify` can compare later
# The same weights on the same kernels give the same logits; what is left is a different split of a matmul (float32) or a
# rounding that falls the other way (16 bit), relative to the largest logit.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Probe:
    """What a model computes on fixed tokens: logits [2, 32, V] in float32, and a few greedy tokens through the cache."""

    ids: list[list[int]]
    logits_BTV: Tensor
    generated: list[int]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """A fingerprint small enough for prunus.json: log-sum-exp and best tokens of every position."""
        best = self.logits_BTV.topk(min(_TOP, self.logits_BTV.shape[-1]), dim=-1)
        return {
            "ids": self.ids,
            "generated": self.generated,
            "dtype": self.dtype,
            "logsumexp": [[round(v, 6) for v in row] for row in self.logits_BTV.logsumexp(-1).tolist()],
            "top_ids": best.indices.tolist(),
            "top_logits": [[[round(v, 6) for v in p] for p in row] for row in best.values.tolist()],
        }


@torch.no_grad()
@products.plain()  # as the clean process has it
def probe(model: PreTrainedModel, new_tokens: int = NEW_TOKENS) -> Probe:
    """Run a model in memory on the fixed tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (_ROWS, _TOKENS), generator=generator)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    tokens = reload.greedy(model, ids[:1, :_PROMPT], new_tokens)
    return Probe(ids.tolist(), logits, tokens, str(model.dtype).removeprefix("torch."))


def reload_probe(
    folder: Path, ids: list[list[int]], dtype: str, *, new_tokens: int = NEW_TOKENS, on_disk: Sequence[str] = ()
) -> tuple[Probe, dict[str, Any]]:
    """The same from a folder, in a clean process; VerificationError if it does not load.

    Modules named in `on_disk` are read by accelerate's disk offload when they run, so that no more than one is in memory.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="prunus-verify-") as scratch:
        request, logits = Path(scratch) / "request.json", Path(scratch) / "logits.safetensors"
        data = {
            "folder": str(folder.resolve()),
            "ids": ids,
            "dtype": dtype,
            "prompt": _PROMPT,
            "new_tokens": new_tokens,
            "on_disk": list(on_disk),
            "scratch": scratch,
            "logits": str(logits),
            "threads": torch.get_num_threads(),
        }
        request.write_text(json.dumps(data))
        result = clean_process(request)
        if result.returncode:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerificationError(f"{folder.name}: the saved checkpoint does not load in a clean process: {last[:500]}")
        answer = json.loads(result.stdout.strip().splitlines()[-1])
        return Probe(ids, load_file(logits)["logits"], answer["generated"], dtype), answer


def clean_process(request: Path) -> subprocess.CompletedProcess[str]:
    """`reload.py` in a process that knows nothing of this one."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, "-IB", reload.__file__, str(request)], capture_output=True, text=True, env=environment
    )


def check_saved(folder: Path, expected: Probe, on_disk: Sequence[str] = ()) -> dict[str, Any]:
    """Compare a just-saved folder with the cut model; VerificationError on any difference that is not rounding."""
    new_tokens = len(expected.generated)
    found, answer = reload_probe(folder, expected.ids, expected.dtype, new_tokens=new_tokens, on_disk=on_disk)
    if answer["problems"]:
        raise VerificationError(f"{folder.name}: loading left keys over: {json.dumps(answer['problems'])[:300]}")
    if not bool(torch.isfinite(found.logits_BTV).all()):
        raise VerificationError(f"{folder.name}: the reloaded model gives NaN or infinite logits")
    difference = float((found.logits_BTV - expected.logits_BTV).abs().max())
    scale = float(expected.logits_BTV.abs().max())
    if not difference <= _TOLERANCE[expected.dtype] * max(scale, 1.0):
        raise VerificationError(
            f"{folder.name}: logits of the reloaded model differ by {difference:.3g} (largest logit {scale:.3g})"
        )
    if found.generated != expected.generated:
        raise VerificationError(f"{folder.name}: the reloaded model generates other tokens through its cache")
    return {
        "max_logit_difference": difference,
        "max_logit": scale,
        "generated_equal": True,
        "class": answer["class"],
        "clean_process": not answer["ours"],
    } | ({"streamed": True, "generated_tokens": new_tokens} if on_disk else {})


def check_fingerprint(folder: Path, recorded: dict[str, Any], on_disk: Sequence[str] = ()) -> dict[str, Any]:
    """Compare a folder with the fingerprint in its prunus.json (another machine may round otherwise: same tolerance)."""
    new_tokens = len(recorded["generated"])
    found, answer = reload_probe(folder, recorded["ids"], recorded["dtype"], new_tokens=new_tokens, on_disk=on_disk)
    if answer["problems"]:
        raise VerificationError(f"{folder.name}: loading left keys over: {json.dumps(answer['problems'])[:300]}")
    now = found.to_json()
    values = torch.tensor(recorded["logsumexp"])
    scale = max(float(torch.tensor(recorded["top_logits"]).abs().max()), 1.0)
    difference = float((torch.tensor(now["logsumexp"]) - values).abs().max())
    top_ids = torch.tensor(recorded["top_ids"])
    if int(top_ids.max()) >= found.logits_BTV.shape[-1]:
        raise VerificationError(
            f"{folder.name}: the fingerprint names token {int(top_ids.max())}, which the model does not have"
        )
    picked = found.logits_BTV.gather(-1, top_ids)
    difference = max(difference, float((picked - torch.tensor(recorded["top_logits"])).abs().max()))
    if math.isnan(difference) or difference > _TOLERANCE[recorded["dtype"]] * scale:
        raise VerificationError(f"{folder.name}: logits differ by {difference:.3g} from those recorded when it was saved")
    if now["generated"] != recorded["generated"]:
        raise VerificationError(f"{folder.name}: greedy generation differs from what was recorded when it was saved")
    return {"max_logit_difference": difference, "generated_equal": True, "class": answer["class"]}
