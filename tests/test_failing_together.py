"""One of two processes, or both, meet a user's mistake: it is said once, and both end, with the same exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pipeline
import torch
from safetensors.torch import load_file, save_file
from test_distributed import environment
from training import asked

from prunus.distributed import World, fail_once

# Every process in a folder of its own, which SIGTERM does not end: it is what the process itself makes of it that counts.
ALONE_THERE = 'trap "" TERM; cd "$0/$RANK"; "$@"; code=$?; echo $code > code; exit $code'


def by_two(folder: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], list[str], float]:
    """The real command line in two processes: (what torchrun gave, exit codes, seconds)."""
    since = time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += ["sh", "-c", ALONE_THERE, folder, sys.executable, "-m", "prunus.cli", *arguments]
    done = subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=200, env=environment())
    codes = [(folder / str(rank) / "code").read_text().strip() for rank in range(2)]
    return done, codes, time.monotonic() - since


def test_what_both_find_is_said_once(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    done, codes, seconds = by_two(tmp_path, "train", "nosuch", "--out", "run", "--json")
    said = [line for line in done.stderr.splitlines() if line.startswith("prunus: ")]
    assert len(said) == 1 and said[0].startswith("prunus: recipe 'nosuch' does not exist"), done.stderr
    assert json.loads(done.stdout)["exit_code"] == 2  # one object
    assert codes == ["2", "2"] and seconds < 60


def test_what_one_finds_ends_the_other_in_its_collective(tmp_path):
    """The second process alone has damaged weights; the first has read its own, and waits for the second's part of them."""
    recipe = asked(model={"source": "weights"}, validate__every=0)
    for rank in range(2):
        place = tmp_path / str(rank)
        shutil.copytree(pipeline.folder(), place / "weights")
        (place / "r.yaml").write_text(json.dumps(recipe.plain()))
    path = tmp_path / "1" / "weights" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][-1] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    done, codes, seconds = by_two(tmp_path, "train", "r.yaml", "--out", tmp_path / "run")
    said = [line for line in done.stderr.splitlines() if line.startswith("prunus: ")]
    assert len(said) == 1 and said[0].startswith("prunus: process 1 of 2: weights: 'model.norm.weight' holds NaN"), (
        done.stderr
    )
    assert codes == ["2", "2"] and seconds < 60


def test_one_process_just_says_it(monkeypatch):
    said = []
    for name in ("MASTER_ADDR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert fail_once(3, said.append) == 3 and said == [""]
    with World.joined() as world:
        assert world.alone
