"""What a teacher said, on disk: against the teacher on-line, killed while it is written, refused where it does not fit."""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pipeline
import pytest
import torch
from pipeline import cli
from test_distributed import assert_same_run, lines, work
from test_train import SEQ, Killed, _same, asked, data, other_data, run, tiny_shape, weights

from prunus.cli import run as command_line
from prunus.distributed import World
from prunus.errors import UserError
from prunus.ledger import Ledger
from prunus.source import Source
from prunus.train import cache as cache_module
from prunus.train import estimate, export, sweep, teaching
from prunus.train import recipe as recipes
from prunus.train.cache import MANIFEST, Cache, Manifest, bytes_of, files, ids_dtype
from prunus.train.opening import prepare as opened

K = 8
NUMBERS = 8 * 4  # sequences that the tiny run reads


def taught_by(cache: Path | str | None = None, **changes):
    """The tiny run with a teacher, a small student, no validation; `teacher__x` changes the teacher."""
    base = {"teacher": {"source": str(pipeline.folder()), "mix": 0.7, "temperature": 2.0, "top_k": K}}
    base |= {"model__shape": tiny_shape(intermediate_size=8), "validate__every": 0}
    made = {**base, **changes}
    if cache is not None:
        made["teacher"] = made["teacher"] | {"cache": str(cache)}
    return asked(**made)


def teach(out: Path, recipe=None, **more) -> Manifest:
    return teaching.write(teaching.prepare(recipe or taught_by(), out), **more)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    """Shards of five sequences, in micro-batches of two: neither divides the other, nor the run."""
    monkeypatch.setattr(teaching, "SHARD_BYTES", 5 * bytes_of(SEQ, K, pipeline.VOCAB))


@pytest.fixture(autouse=True)
def _no_clean_process(monkeypatch):
    """It costs seconds; tests/test_train.py has it."""
    monkeypatch.setattr(export, "check_saved", lambda stage, expected: {})


@functools.cache
def another_teacher() -> Path:
    import checkpoints

    made = pipeline.model("llama", dtype=torch.float32, seed=1)
    return checkpoints.save_folder(pipeline.scratch() / "another-teacher", made, pipeline.tokenizer())


@functools.cache
def written() -> Path:
    out = pipeline.scratch() / "what-the-teacher-says"
    teach(out)
    return out


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(written(), tmp_path / "cache"))


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
    assert _same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_no_weight_of_the_teacher_is_read(tmp_path, monkeypatch):
    recipe = taught_by(written())
    without = recipes.parse(recipe.plain() | {"teacher": recipe.plain()["teacher"] | {"source": None}}, "test")
    monkeypatch.setattr(Source, "load", lambda *a: pytest.fail("the teacher's weights are read"))
    run(tmp_path / "run", without)
    assert _same(weights(tmp_path / "run"), weights(from_cache()))


def test_stopped_it_goes_on_bit_for_bit(tmp_path):
    def say(line):
        if line["step"] == 5:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "run", taught_by(written()), say=say)
    run(tmp_path / "run", taught_by(written()))
    assert _same(weights(tmp_path / "run"), weights(from_cache()))
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


def test_a_sweep_reads_again_what_was_paid_for_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "RATES", (1e-9, 1e-2))
    run(tmp_path / "run", taught_by(written(), optimizer__lr="sweep"))
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


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__seed": 1}, r"written for another recipe \(data.seed differs: 0 there, 1 here\); run prunus teach"),
        ({"data__range": "parent", "tokens": 64}, r"\(data.domains or data.range differs\)"),
        ({"data__domains": "BOTH"}, r"\(data.domains or data.range differs\)"),
        ({"data__domains": "OTHER"}, r"\(data.domains or data.range differs\)"),
        ({"data__seq_len": 8}, r"\(data.seq_len differs: 16 there, 8 here\)"),
        ({"data__separate_documents": True}, r"\(data.separate_documents differs: False there, True here\)"),
        ({"teacher__temperature": 1.0}, r"\(teacher.temperature differs: 2.0 there, 1.0 here\)"),
        ({"teacher__top_k": 7}, r"\(teacher.top_k differs: 8 there, 7 here\)"),
        (
            {"teacher__source": "ANOTHER"},
            r"holds the words of dense-llama-64, whose weights are not those of teacher.source",
        ),
        ({"tokens": 9 * 4 * SEQ}, "holds 32 of the 36 sequences that the run reads; run prunus teach with this recipe"),
        ({"teacher__cache": "/nowhere"}, "/nowhere: no such file or folder; prunus teach writes what a teacher says"),
        ({"teacher__top_k": 301}, "teacher.top_k: 301 are more than the vocabulary's 300"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, changes, message):
    domains = {"BOTH": [data(), other_data()], "OTHER": [other_data()]}
    changes = {"teacher__source": str(pipeline.folder()), "teacher__cache": str(written())} | changes
    if changes["teacher__source"] == "ANOTHER":
        changes["teacher__source"] = str(another_teacher())
    if changes.get("data__domains") in domains:
        changes["data__domains"] = [{"folder": str(folder)} for folder in domains[changes["data__domains"]]]
    base = {"teacher__mix": 0.7, "teacher__temperature": 2.0, "teacher__top_k": K, "validate__every": 0}
    recipe = asked(**{**base, "model__shape": tiny_shape(intermediate_size=8), **changes})
    with pytest.raises(UserError, match=message) as caught:
        opened(recipe, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def _edit(folder: Path, **changes) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _wider(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: _flip(files(folder, 1)[0]), "ids-00001.npy: changed since it was written; remove the folder and"),
        (lambda folder: _flip(files(folder, 6)[1]), "logs-00006.npy: changed since it was written"),
        (lambda folder: files(folder, 2)[1].write_bytes(b"x"), "logs-00002.npy: changed since it was written"),
        (lambda folder: _wider(files(folder, 2)[1]), "logs-00002.npy: changed since it was written"),
        (lambda folder: files(folder, 2)[1].unlink(), "logs-00002.npy: is missing; copy the folder again"),
        (lambda folder: (folder / MANIFEST).unlink(), "there is no manifest.json in it; prunus teach writes"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json: is nothing that prunus teach wrote"),
        (lambda folder: _edit(folder, format=2), "manifest.json: is nothing that prunus teach wrote"),
        (lambda folder: _edit(folder, tokenizer_sha256="0" * 64), r"another recipe \(the tokenizer differs\)"),
        (lambda folder: _edit(folder, vocab_size=301), r"\(the vocabulary's size differs: 301 there, 300 here\)"),
    ],
)
def test_a_damaged_cache_is_refused(tmp_path, damage, message):
    folder = copied(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message):
        opened(taught_by(folder), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"changed since|is missing|manifest\.json|differs|holds nothing that prunus teach wrote"
    ):
        teach(folder)


@pytest.mark.parametrize(
    ("teacher", "more", "message"),
    [
        ({}, {}, "teacher: give source, the parent that teaches, cache, .* or else snapshot"),
        ({"source": "a", "cache": "b"}, {}, "teacher: a cache holds likeliest tokens only; give top_k"),
        ({"source": "a", "top_k": 0}, {}, "field 'teacher.top_k': 0 is wrong"),
        (
            {"cache": "b", "top_k": 4}, {"data__mixing": {"references": {"tokens": 1.0}}, "validate__every": 2},
            "teacher.cache is of an order of the data that is known beforehand, which data.mixing settles as it goes",
        ),
    ],
)  # fmt: skip
def test_recipes_that_make_no_sense(teacher, more, message):
    with pytest.raises(UserError, match=message):
        asked(teacher=teacher, **more)


def test_what_cannot_be_taught_is_refused(tmp_path, monkeypatch):
    mixing = {"data__mixing": {"references": {"tokens": 1.0}}, "validate__every": 2}
    source = {"source": str(pipeline.folder())}
    for recipe, message in (
        (asked(), r"run: the recipe has no teacher.source, so there is nothing to write down"),
        (asked(teacher=source), "the recipe has no teacher.top_k"),
        (asked(teacher={"cache": "x", "top_k": 4}), "the recipe has no teacher.source"),
        (taught_by(**mixing), "data.mixing: the order of the data is settled while the run goes"),
        (taught_by(tokens=10**6), "budget: 1,000,000 tokens are asked for"),
    ):
        with pytest.raises(UserError, match=message):
            teaching.prepare(recipe, tmp_path / "cache")
    with pytest.raises(UserError, match=r"--out: where to\? give it, or teacher.cache in the recipe"):
        teaching.prepare(taught_by())
    with pytest.raises(UserError, match=r"was written for something else \(seed differs\); give another --out"):
        teaching.prepare(taught_by(data__seed=1), written())
    with pytest.raises(UserError, match="is there already and holds nothing that prunus teach wrote"):
        teaching.prepare(taught_by(), another_teacher())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("D", (), {"free": 16_383})())
        with pytest.raises(UserError, match=r"needs 0.00 GB, but 0.00 GB are free there; lower tokens or teacher.top_k"):
            teaching.prepare(taught_by(), tmp_path / "cache")
        assert teaching.prepare(taught_by(), written()).bytes == 0
    assert not (tmp_path / "cache").exists()


def test_only_the_first_process_hashes(tmp_path, monkeypatch):
    folder = copied(tmp_path)
    _flip(files(folder, 1)[0])
    monkeypatch.setenv("RANK", "1")
    assert opened(taught_by(folder), tmp_path / "run").cache is not None


# -- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path):
    """The same recipe writes and reads; what it takes on disk is said before."""
    recipe = taught_by(tmp_path / "cache", tokens=2 * 4 * SEQ)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.plain()))
    code, out, err = cli("teach", tmp_path / "r.yaml")
    assert code == 0 and "128 tokens x 32 bytes (top 8) = 4.096 kB; " in err and "train with --set teacher.cache=" in out, (
        err
    )
    code, out, err = cli("teach", tmp_path / "r.yaml", "--json")
    assert code == 0 and json.loads(out)["bytes_left"] == 0 and "4.096 kB of it there already" in err, err
    code, out, err = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["figures"]["teacher_cache"]["tokens"] == 128, err
    code, out, err = cli("plan", tmp_path / "r.yaml", "--train", "--rate", "1e9")
    assert code == 0 and "disk: 4.096 kB of what the teacher says" in out, err
    code, _, err = cli("teach", "scratch", "--out", tmp_path / "other")
    assert code == 2 and "scratch" in err


def test_ctrl_c_leaves_something_to_go_on_with(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(json.dumps(taught_by().plain()))

    def write(work, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(teaching, "write", write)
    with pytest.raises(SystemExit) as stop:
        command_line(["teach", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "cache")])
    assert stop.value.code == 130 and "the same command goes on behind the last shard" in capsys.readouterr().err


def test_an_idle_process_asks_for_a_position_that_is_there():
    """With as many processes as sequences every share has one, so the sequence that an idle one repeats exists."""
    for size in range(1, 6):
        for rank in range(size):
            assert World(rank, size).share(5).start < 5
