"""Same command, same machine, same bits: every command that computes, twice, in processes that share nothing but the machine.

Their hashes of text differ, so that an order that hangs on a set of names would show; the moments differ, and where they lie in
memory. Only what `faults.TIMES` names may differ: when and how long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import faults
import lessons
import pipeline
import pytest
from faults import Command, calibrated, inputs, outcome, plain


def taught(at):
    recipe = lessons.taught_by().plain()
    (at / "taught.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def a_cut(at):
    """A checkpoint and its evaluation, for cards."""
    faults.shutil.copytree(pipeline.saved("per-layer")[0], at / "cut")


def dense(*words):
    return lambda at: (words[0], inputs() / "dense", *words[1:], "-o", at / "out")


def write(path):
    path.write_text("the old trees fall under a blue moon\n" * 20, encoding="utf-8")


def text():
    return inputs() / "text.jsonl"


def cut(*words):
    return Command(lambda at: ("prune", inputs() / "dense", "-m", *words, "-o", at / "out", *calibrated("--json")))


ADVISED = ("advise", "--target-params", "1B", "--tokens", "50B", "--parent-params", "8B", "--rate", "1e12", "--json")
MORE = {
    "plan": Command(lambda at: ("plan", inputs() / "dense", "-m", "flap", "-r", 0.3, *calibrated("--json"))),
    "plan of training": Command(lambda at: ("plan", "--train", inputs() / "recipe.yaml", "--rate", "1e9", "--json")),
    "prune by several": cut("minitron-depth+flap+wanda", "-r", "0.5", "--sparsity", "0.5"),
    "prune by search": cut("prunus", "-r", "0.3"),
    "prune by gradients": cut("llm-pruner", "-r", "0.3", "--option", "protect=0,0"),
    "prune, streamed": cut("flap", "-r", "0.3", "--stream"),
    "trim": Command(lambda at: (*dense("trim")(at), "-t", at / "few.txt", "--json"), lambda at: write(at / "few.txt")),
    "quantize": Command(lambda at: (*dense("quantize", "-s", "int8")(at), "--json")),
    "tokenizer": Command(lambda at: ("data", "tokenizer", text(), "--vocab-size", 280, "-o", at / "out")),
    "overlap": Command(lambda at: ("data", "overlap", text(), inputs() / "tokens", "--json")),
    "teach": Command(lambda at: ("teach", at / "taught.yaml", "-o", at / "out"), taught),
    "card": Command(lambda at: ("card", at / "cut", "--overwrite"), a_cut),
    "verify": Command(lambda at: ("verify", pipeline.saved("per-layer")[0], "--json")),
    "advise": Command(lambda at: ADVISED),
    "eval": Command(lambda at: ("eval", inputs() / "dense", "-t", text(), "--windows", 20, "--seq-len", 32, "--json")),
    "plot": Command(lambda at: ("plot", faults.reference("train").folder / "run", "-o", at / "plot.png")),
    "slurm": Command(lambda at: ("study", "slurm", inputs() / "study.yaml", "--out", at / "study")),
}
SLOW = [name for name in (*faults.COMMANDS, *MORE) if name != "prune by several"]


def done(name, at, seed):
    """(what it leaves, what it says as JSON) in a process of its own."""
    aside = at.with_name(f"{at.name}.aside")
    aside.mkdir(exist_ok=True)
    words = [str(word) for word in (faults.COMMANDS | MORE)[name].words(at)]
    env = os.environ | {"PYTHONHASHSEED": str(seed), "PRUNUS_CACHE": str(aside / "cache"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-m", "prunus", *words], env=env, capture_output=True, text=True, cwd=at)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return outcome(at), plain(json.loads(ended.stdout)) if "--json" in words else None


def same_twice(name, monkeypatch):
    monkeypatch.setattr(faults, "TIMES", faults.TIMES | {"scoring_seconds", "measured_gemm_flops_per_s"})  # by the clock
    monkeypatch.setattr(faults, "COMMANDS", faults.COMMANDS | MORE)
    first, second = (done(name, faults.fresh(name), seed) for seed in (1, 2))
    assert first == second and any(first)


def test_twice_the_same_bits(monkeypatch):
    """Of training, `test_golden.py` compares the bits with those that are kept."""
    same_twice("prune by several", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_twice_the_same_bits_of_every_command(name, monkeypatch):
    same_twice(name, monkeypatch)
