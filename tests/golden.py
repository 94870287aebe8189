"""Figures of every method and every shipped recipe on tiny models, frozen in golden.json; `python tests/golden.py` writes them.

A change that moves them is a change of results, and says why in its commit.

Curves of some recipes are frozen to the last bit. For that their process computes as any x86 processor does: torch's plain kernels,
MKL's compatible ones, one thread. Where even these differ, another C library's exponential for instance, `arithmetic` says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pipeline
import pytest
import shrinking
import torch
import training
from test_every_method import WINDOWS, outcome_of

from prunus.methods import ONE_SHOT
from prunus.train import export
from prunus.train import recipe as recipes
from prunus.train.opening import prepare as opened
from prunus.train.run import execute

FROZEN = Path(__file__).with_name("golden.json")
CASE = "llama"
UPDATES = 12
SMALL = {  # what makes a shipped recipe one for the tiny model and its text
    "data.domains": [], "data.seq_len": training.SEQ, "tokens": UPDATES * shrinking.UPDATE, "batch_tokens": shrinking.UPDATE,
    "micro_batch": 2, "precision": "float32", "log_every": 1, "validate.every": 0, "save.every": 0, "optimizer.lr": 3e-3,
    "data.epochs": 8, "data.range": "retrain",
}  # fmt: skip
OWN = {
    "idea-prune": {
        "model.shape": training.tiny_shape(),
        "model.tokenizer": "",
        "model.enlarge": 2.0,
        "prune.pace.rounds": 3,
    },
    "scratch": {"model.shape": training.tiny_shape(), "model.tokenizer": ""},
    "sheared-llama": {"prune.target": {"hidden_size": 24, "intermediate_size": 24}},
    "sparse-retrain": {},
    **{name: {"prune.target": {"ratio": 0.4}} for name in ("adapt-pruner", "efficientllm")},
    **{name: {"prune.target": {"ratio": 0.4}, "prune.pace.samples": 16} for name in ("few-shot", "prunus")},
}


def of_method(name: str) -> dict[str, object]:
    """What it decides, what is left, and the loss of that."""
    outcome = outcome_of(name, CASE)
    decided = hashlib.sha256()
    if outcome.mask is not None:
        for key, kept in sorted(outcome.mask.kept.items()):
            decided.update(key.encode() + kept.to(torch.uint8).numpy().tobytes())
    else:
        decided.update(json.dumps(outcome.keep.to_json(), sort_keys=True).encode())
    ids = WINDOWS.ids_NT
    with torch.no_grad():
        logits = outcome.model(input_ids=ids, use_cache=False).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    params = sum(p.numel() for p in outcome.model.parameters())
    return {"decided": decided.hexdigest()[:16], "params": params, "loss": float(loss)}


def of_recipe(name: str) -> dict[str, object]:
    """The loss of every update, and what is left."""
    source = pipeline.folder(CASE)
    fields = SMALL | OWN.get(name, {}) | {"data.domains": [{"folder": str(training.data())}]}
    if "model.tokenizer" in fields:
        fields["model.tokenizer"] = str(training.tokenizer())
    else:
        fields["model.source"] = str(source)
    if name == "distill":
        fields["teacher.source"] = str(pipeline.folder("llama_mha"))  # another model than its pupil, whose loss would be 0
    if name == "sparse-retrain":
        fields |= {"model.source": str(masked()), "model.mask": str(masked())}
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(export, "check_saved", return_value={}):
        out = Path(scratch) / "run"
        figures = execute(opened(recipes.read(name, (), fields), out))["figures"]
        losses = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {"params": figures["params"], "losses": [line["loss"] for line in losses if "loss" in line]}


def masked() -> Path:
    """The tiny model, half of it zeros."""
    out = pipeline.scratch() / "golden-sparse"
    if not out.exists():
        with pytest.MonkeyPatch.context() as patch:
            pipeline.verify_here(patch)
            code, _, err = pipeline.cli("prune", pipeline.folder(CASE), "-m", "magnitude", "-r", "0.5", "-o", out)
        assert code == 0, err
    return out


PLAIN = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TO_THE_BIT = ("scratch", "distill", "efficientllm", "prunus")


def arithmetic() -> str:
    """What this process makes of the same few numbers: kernels that a run's losses hang on."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 4, 33, 48, generator=generator, requires_grad=True) for _ in range(2))
    out = torch.nn.functional.scaled_dot_product_attention(a, b, a, is_causal=True)
    out = torch.nn.functional.silu(out @ b.transpose(-1, -2)) + a.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    out = torch.log_softmax(out, -1) * out.sin() * out.cos() + out.tanh().exp().log1p()
    out.sum().backward()
    assert a.grad is not None and b.grad is not None
    found = hashlib.sha256()
    for tensor in (out, a.grad, b.grad, a.detach().flatten(0, 2).T @ b.detach().flatten(0, 2)):
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def bits() -> dict[str, object]:
    """In a process of its own, as `PLAIN` says: its arithmetic, and every loss as a number that loses nothing in text."""
    asked = [sys.executable, __file__, "--bits"]
    done = subprocess.run(asked, env=os.environ | PLAIN, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


METHODS, RECIPES = list(ONE_SHOT), list(recipes.shipped())


def main() -> None:
    """Write all of them; with --bits, say what `bits` asks for."""
    if "--bits" in sys.argv:
        curves = {name: [loss.hex() for loss in of_recipe(name)["losses"]] for name in TO_THE_BIT}
        print(json.dumps({"arithmetic": arithmetic(), "curves": curves}))
        return
    found = {"methods": {n: of_method(n) for n in METHODS}, "recipes": {n: of_recipe(n) for n in RECIPES}, "bits": bits()}
    FROZEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{FROZEN}: {len(METHODS)} methods, {len(RECIPES)} recipes", file=sys.stderr)


if __name__ == "__main__":
    main()
