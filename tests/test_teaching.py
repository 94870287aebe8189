"""What a teacher said, on disk: against the teacher on-line, and killed while it is written."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pipeline
import pytest
import torch
from lessons import NUMBERS, K, copied, taught_by, teach, written
from pipeline import cli
from test_distributed import assert_same_run, lines, work
from training import SEQ, Killed, killed_saying, run, same, weights

from prunus.errors import UserError
from prunus.ledger import Ledger
from prunus.source import Source
from prunus.train import cache as cache_module
from prunus.train import estimate, teaching
from prunus.train import recipe as recipes
from prunus.train.cache import MANIFEST, Cache, Manifest, bytes_of, files, ids_dtype
from prunus.train.opening import prepare as opened

pytestmark = pytest.mark.usefixtures("short_lessons")


# -- what is written ------------------------------------------------------------------------------------------------------


def test_every_position_of_the_stream_holds_what_the_teacher_says_there():
    """Against the model's own logits in float64, sequence by sequence. float32 gives the order of likeliest tokens up to ties."""
    manifest = Manifest.read(written())
    assert [shard.sequences for shard in manifest.shards] == [5, 5, 5, 5, 5, 5, 2] and manifest.sequences == NUMBERS
    run_ = opened(taught_by(), pipeline.scratch() / "nowhere")
    model = Source.open(str(pipeline.folder())).load("float32")
    cache = Cache(written(), manifest)
    for position in range(NUMBERS):
        ids = run_.feeds.training.take(position, 1).ids[:, :-1]
        want = torch.log_softmax(model(input_ids=ids).logits[0].detach().double() / 2.0, 1)
        found = cache[position : position + 1]
        assert found.ids.shape == found.logs.shape == (SEQ, K) and found.ids.dtype == torch.int64
        assert (found.logs.diff() <= 0).all() and all(len(set(row)) == K for row in found.ids.tolist())
        # float16 has 11 bits: a logarithm below 8 is within 2^-9; a likelier token left out would lie above the last by no more
        assert (want.gather(1, found.ids) - found.logs).abs().max() < 2**-9
        assert (want.topk(K).values[:, -1] - found.logs[:, -1]).abs().max() < 2**-9


def test_disk_use_by_hand():
    """64 tokens of two bytes for the id and two for the logarithm; four for the id of a larger vocabulary."""
    assert bytes_of(1000, 64, 49_152) == 1000 * 64 * 4 and bytes_of(1000, 64, 128_256) == 1000 * 64 * 6
    assert (ids_dtype(65_536), ids_dtype(65_537)) == (np.uint16, np.int32)
    arrays = [np.load(path) for number in range(7) for path in files(written(), number)]
    assert sum(array.nbytes for array in arrays) == bytes_of(NUMBERS * SEQ, K, pipeline.VOCAB)
    plan = teaching.prepare(taught_by(), pipeline.scratch() / "not-there").describe()
    assert (plan["bytes"], plan["bytes_left"], plan["tokens"]) == (16_384, 16_384, NUMBERS * SEQ)
    plan = teaching.prepare(taught_by(), written()).describe()
    assert (plan["bytes"], plan["bytes_left"], plan["flops_left"]) == (16_384, 0, 0)


def test_killed_anywhere_it_goes_on_behind_the_last_shard(tmp_path, monkeypatch):
    """At once, inside a shard, between its files and the manifest: what is complete stays, byte for byte."""
    out = tmp_path / "cache"

    def dies_at(sequences):
        def dies(stage, done, total):
            if done > sequences:
                raise Killed

        return dies

    out.mkdir()
    (out / ".lock").touch()
    with pytest.raises(Killed):
        teach(out, progress=dies_at(2))
    assert Manifest.read(out).shards == []
    with pytest.raises(UserError, match=r"was written for something else \(temperature differs\)"):
        teach(out, taught_by(teacher__temperature=1.0))
    with pytest.raises(Killed):
        teach(out, progress=dies_at(12))
    assert [shard.sequences for shard in Manifest.read(out).shards] == [5, 5]
    before = {path: path.stat().st_mtime_ns for number in range(2) for path in files(out, number)}
    (out / ".ids-00002.partial-1.npy").write_bytes(b"half")
    real, calls = Manifest.write, []

    def write(manifest, folder):
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        real(manifest, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", write)
        with pytest.raises(Killed):
            teach(out)
    assert files(out, 3)[0].is_file() and len(Manifest.read(out).shards) == 3
    teach(out)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in written().iterdir()} and not any(".partial" in name for name in names)
    assert all((out / name).read_bytes() == (written() / name).read_bytes() for name in names)


def test_nothing_is_asked_twice_and_a_larger_budget_adds(tmp_path, monkeypatch):
    out = copied(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Source, "load", lambda *a: pytest.fail("nothing is left to ask"))
        assert teach(out).sequences == NUMBERS
    assert teach(out, taught_by(tokens=9 * 4 * SEQ)).sequences == NUMBERS + 4
    Cache.open(out, {}, NUMBERS + 4)


# -- a run from it --------------------------------------------------------------------------------------------------------


@functools.cache
def from_cache() -> Path:
    out = pipeline.scratch() / "run-from-cache"
    run(out, taught_by(written()))
    return out


def test_a_run_from_the_cache_is_the_run_on_line_but_for_rounding(tmp_path):
    """Rounding moves a logarithm by 2^-11 of it, so probabilities by 2^-11 p |log p| each: in all by 2^-11 of the entropy,
    which is below log 300. By that much gradients at the logits, sums of q - p, differ, times mix and temperature: 0.4 %.

    The first step's norm is of the same weights. AdamW divides by the gradient's size, so a step differs by that share of the
    rate, 0.01, and eight by 8 * 0.01 * 0.4 % = 3e-4 in the mean; elements whose gradient is next to nothing, by more."""
    run(tmp_path / "on-line", taught_by())
    mine, theirs = lines(from_cache()), lines(tmp_path / "on-line")
    bound = 2**-11 * math.log(pipeline.VOCAB) * 0.7 * 2
    assert len(mine) == 8 and mine[0]["loss"] != theirs[0]["loss"]
    assert mine[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=bound)
    assert [line["loss"] for line in mine] == pytest.approx([line["loss"] for line in theirs], rel=bound)
    a, b = weights(from_cache()), weights(tmp_path / "on-line")
    differences = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert float(differences.mean()) < 3e-4 and float(differences.quantile(0.99)) < 3e-3


def test_unrounded_it_is_the_run_on_line(tmp_path, monkeypatch):
    """With logarithms as they were nothing is left: bit for bit, where micro-batches are the same sequences as well."""
    monkeypatch.setattr(cache_module, "LOGS", np.float32)
    monkeypatch.setattr(teaching, "LOGS", np.float32)
    monkeypatch.setattr(teaching, "SHARD_BYTES", 6 * bytes_of(SEQ, K, pipeline.VOCAB))
    more = {"data__separate_documents": True, "tokens": 2 * 4 * SEQ}
    teach(tmp_path / "cache", taught_by(**more))
    run(tmp_path / "a", taught_by(tmp_path / "cache", **more))
    run(tmp_path / "b", taught_by(**more))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_no_weight_of_the_teacher_is_read(tmp_path, monkeypatch):
    recipe = taught_by(written())
    without = recipes.parse(recipe.plain() | {"teacher": recipe.plain()["teacher"] | {"source": None}}, "test")
    monkeypatch.setattr(Source, "load", lambda *a: pytest.fail("the teacher's weights are read"))
    run(tmp_path / "run", without)
    assert same(weights(tmp_path / "run"), weights(from_cache()))


def test_stopped_it_goes_on_bit_for_bit(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path / "run", taught_by(written()), say=killed_saying(5))
    run(tmp_path / "run", taught_by(written()))
    assert same(weights(tmp_path / "run"), weights(from_cache()))
    pick = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in lines(out)] for out in (tmp_path / "run", from_cache())
    ]
    assert pick[0] == pick[1]
    assert (tmp_path / "run" / "ledger.json").read_bytes() == (from_cache() / "ledger.json").read_bytes()


def test_the_teachers_flops_are_counted_and_said_to_be_the_caches(tmp_path):
    record = run(from_cache(), taught_by(written()))
    anatomy = Source.open(str(pipeline.folder())).anatomy
    figures, manifest = record["figures"], Manifest.read(written())
    assert figures["flops"]["teacher"] == manifest.flops == NUMBERS * anatomy.flops(SEQ)
    assert figures["teacher_cache"]["digest"] == manifest.digest and figures["teacher_cache"]["bytes"] == 16_384
    stage = Ledger.read(from_cache() / "ledger.json").stages[0]
    assert stage.flops["teacher"] == manifest.flops and stage.teacher_cache == manifest.digest
    assert str(pipeline.scratch()) not in (from_cache() / "record.jsonl").read_text() + (written() / MANIFEST).read_text()
    code, out, err = cli("ledger", from_cache())
    assert code == 0 and f"when its cache {manifest.digest} was written, once for all runs" in " ".join(out.split()), err


def test_a_sweep_reads_again_what_was_paid_for_once(tmp_path):
    run(tmp_path / "run", taught_by(written(), optimizer__lr=[1e-9, 1e-2]))
    stages = Ledger.read(tmp_path / "run" / "ledger.json").stages
    assert [stage.flops.get("teacher", 0) for stage in stages] == [0, Manifest.read(written()).flops]


def test_a_plan_counts_no_teacher(tmp_path):
    on_line, cached = (estimate.planned(recipe, rate=1e9) for recipe in (taught_by(), taught_by("/not-written-yet")))
    anatomy = Source.open(str(pipeline.folder())).anatomy
    assert on_line["weights"] - cached["weights"] == 4 * anatomy.num_params
    assert on_line["flops_per_token"] - cached["flops_per_token"] == pytest.approx(anatomy.flops(SEQ) / SEQ)
    assert (on_line["teacher_cache"], cached["teacher_cache"]) == (None, 16_384)
    two = estimate.planned(taught_by(), devices=2, rate=1e9)
    assert (
        two["weights"] == (on_line["weights"] - 4 * anatomy.num_params) // 2 + 4 * anatomy.num_params
    )  # each holds it whole


@pytest.mark.slow
def test_two_processes_read_their_own_positions(tmp_path):
    """Five sequences an update, three and two: the second micro-batch is empty in one process."""
    recipe = taught_by(written(), batch_tokens=5 * SEQ, tokens=6 * 5 * SEQ)
    done = work(tmp_path, [{"recipe": recipe, "out": tmp_path / "by-two"}])
    assert done.returncode == 0, done.stderr[-3000:]
    run(tmp_path / "alone", recipe)
    assert_same_run(tmp_path / "by-two", tmp_path / "alone")
