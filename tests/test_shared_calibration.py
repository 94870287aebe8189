"""Calibration windows shared out over two processes, against one that sees them all: real ones, by torchrun and gloo."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import cutter
import pipeline
import pytest
import torch

from prunus import checkpoint
from prunus.distributed import World
from prunus.statistics import Moments

CUTTER = Path(cutter.__file__)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@functools.cache
def by_two() -> list[dict]:
    """What each of two processes came to, in every case."""
    folder = pipeline.scratch() / "cut-by-two"
    folder.mkdir()
    done = torchrun(CUTTER, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", cutter.cases())
def test_two_cut_as_one(name):
    """The same decision; refitted weights and losses to the rounding of float32 sums taken in another order."""
    alone, (first, second) = cutter.cut(cutter.cases()[name]), (found[name] for found in by_two())
    for found in (first, second):
        assert found["keep"] == alone["keep"]
        assert (found["mask"] is None) == (alone["mask"] is None)
        rows = {}  # where two weights are worth the same to the last bits, rounding decides between them: one exchange a matrix
        for matrix, kept in (alone["mask"] or {}).items():
            assert (kept != found["mask"][matrix]).sum() <= 2 and kept.sum() == found["mask"][matrix].sum(), matrix
            rows[matrix] = kept.eq(found["mask"][matrix]).all(1)
        assert list(found["weights"]) == list(alone["weights"])
        for tensor, value in alone["weights"].items():
            same = rows.get(tensor, slice(None))
            # updates by the inverse of a Gram matrix raise the rounding of its sums by its condition, some 1e4 with damping
            rtol, atol = (1e-4, 1e-5) if alone["mask"] is None else (1e-3, 1e-3)
            torch.testing.assert_close(found["weights"][tensor][same], value[same], rtol=rtol, atol=atol)
        if alone["losses"] is not None:
            assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for tensor, value in first["weights"].items():
        assert value.equal(second["weights"][tensor]), tensor  # bit for bit: both decide on the same sums


def test_moments_of_parts_are_those_of_all():
    """Each part's sums are around a shift of its own; by hand, without processes."""
    want = frozenset({"mean", "var", "sumsq", "abs", "window_abs", "gram"})
    x_BTC = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0)) + 100
    whole = Moments(want)
    whole.update(x_BTC)
    parts = [Moments(want), Moments(want)]
    parts[0].update(x_BTC[:2])
    parts[1].update(x_BTC[2:])
    shift_C, sums = parts[0].shift_C, [dict[str, torch.Tensor](), dict[str, torch.Tensor]()]

    class Here(World):
        """One of the two, whose sums are noted instead of added."""

        def agree(self, value):
            return shift_C

        def total(self, value):
            return 35.0

        def sum_(self, tensor):
            sums[self.rank][str(len(sums[self.rank]))] = tensor
            return tensor

    for rank, part in enumerate(parts):
        part.settle(Here(rank, 2))
    for name, tensor in sums[0].items():
        tensor += sums[1][name]
    assert parts[0].count == whole.count == 35
    for found, expected in (
        (parts[0].mean_C, x_BTC.double().flatten(0, 1).mean(0)),
        (parts[0].var_C, x_BTC.double().flatten(0, 1).var(0)),
        (parts[0].gram_CC, whole.gram_CC),
        (parts[0].norm_C(), whole.norm_C()),
        (parts[0].sums["window_abs"], whole.sums["window_abs"]),
    ):
        # sums within a window are float32 of numbers around 100 and around 1
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_command_line_writes_once(tmp_path):
    out, statistics = tmp_path / "cut", tmp_path / "found.safetensors"
    arguments = ["prune", pipeline.folder(), "-m", "flap", "-r", "0.3", "--multiple-of", "1", "-c", pipeline.text_file()]
    arguments += ["--windows", "5", "--seq-len", "16"]
    done = torchrun("-m", "prunus.cli", *arguments, "-o", out, "--statistics", statistics, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["out"] == str(out)  # one object: the other process says nothing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "found.safetensors"]
    code, _, said = pipeline.cli(*arguments, "-o", tmp_path / "alone")
    assert code == 0, said
    assert checkpoint.read_keep(out) == checkpoint.read_keep(tmp_path / "alone")


def test_more_processes_than_windows_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(World, "joined", lambda: contextlib.nullcontext(World(0, 8)))
    code, _, said = pipeline.cli(
        "prune", pipeline.folder(), "-m", "flap", "-r", "0.3", "-c", pipeline.text_file(), "--windows", 4, "--seq-len", 16,
        "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and "8 processes cannot share 4 windows of calibration text; give at least 8, or start fewer" in said


@pytest.mark.parametrize("command", ["methods", "teach"])
def test_what_cannot_be_shared_is_refused(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, said = pipeline.cli(command)
    assert code == 2 and f"{command}: torchrun started 2 processes, but only train and prune share their work" in said
