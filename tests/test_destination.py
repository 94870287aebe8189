"""Where a checkpoint goes: whole or not at all, and never in the place of what prunus did not write."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pipeline
import pytest
from pipeline import result

from prunus import checkpoint, place
from prunus.errors import UserError, VerificationError
from prunus.headers import sha256


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_folder_is_refused(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out: already exists; give another --out, or --overwrite to replace it"):
        result().save(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="already exists"):
        result().save(tmp_path / "link")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"]


def test_overwriting_replaces_only_what_prunus_wrote(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    for name in ("thesis", "file"):
        with pytest.raises(
            UserError, match=rf"{name}: is not a folder that prunus wrote, so --overwrite will not replace it"
        ):
            result().save(tmp_path / name, overwrite=True)
    assert (other / "chapter.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    result().save(tmp_path / "empty", overwrite=True)
    first = checkpoint.read_manifest(tmp_path / "empty")
    (tmp_path / "empty" / "old.txt").write_text("of the first")
    result(ratio=0.3).save(tmp_path / "empty", overwrite=True)
    second = checkpoint.read_manifest(tmp_path / "empty")
    assert second.ratios != first.ratios and not (tmp_path / "empty" / "old.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "thesis"]


def test_a_source_can_be_replaced_by_its_own_cut(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    result().save(tmp_path / "out")
    cut = result(tmp_path / "out", ratio=0.7)
    before = sha256([tmp_path / "out" / "model.safetensors"])
    manifest = cut.save(tmp_path / "out", overwrite=True)
    assert manifest.source["sha256"] == before != manifest.weights_sha256


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match=rf"out: no right to write in {tmp_path}"):
        checkpoint.check_destination(tmp_path / "deep" / "out", overwrite=False, needed_bytes=0)


def test_a_place_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no right to write in"):
        checkpoint.check_destination(tmp_path / "file" / "out", overwrite=False, needed_bytes=0)


def test_a_place_that_is_too_small(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(3e9)))
    checkpoint.check_destination(tmp_path / "out", overwrite=False, needed_bytes=int(2.8e9))
    with pytest.raises(
        UserError, match=r"out: needs 3,073 MB, some of them to spare, but 3,000 MB are free there; make room"
    ):
        checkpoint.check_destination(tmp_path / "out", overwrite=False, needed_bytes=int(2.95e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="out: needs 64 MB, some of them to spare, but 0 MB are free there"):
        result().save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def lie(found):
    return replace(found, logits_BTV=found.logits_BTV + 0.5)


def other_tokens(found):
    return replace(found, generated=[*found.generated[:-1], 1 - found.generated[-1]])


def not_a_number(found):
    logits = found.logits_BTV.clone()
    logits[0, 0, 0] = float("nan")
    return replace(found, logits_BTV=logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lie, r"logits of the reloaded model differ by 0\.5"),
        (other_tokens, "the reloaded model generates other tokens through its cache"),
        (not_a_number, "the reloaded model gives NaN or infinite logits"),
    ],
)
def test_a_model_that_comes_back_different_is_not_left_behind(tmp_path, monkeypatch, change, message):
    pipeline.verify_here(monkeypatch, change)
    with pytest.raises(VerificationError, match=message):
        result().save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_keys_left_over_are_a_failure(tmp_path, monkeypatch):
    from prunus import verification

    pipeline.verify_here(monkeypatch)
    honest = verification.reload_probe
    monkeypatch.setattr(
        verification,
        "reload_probe",
        lambda *a, **k: (honest(*a, **k)[0], {"problems": {"missing_keys": ["model.norm.weight"]}}),
    )
    with pytest.raises(VerificationError, match=r"loading left keys over: .*missing_keys.*model\.norm\.weight"):
        result().save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(143), OSError(28, "No space left on device")])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_half_is_left(tmp_path, monkeypatch, error, exists):
    """Stopped or failing while the folder is written: the place is as it was, an old checkpoint included."""
    pipeline.verify_here(monkeypatch)
    out = tmp_path / "out"
    if exists:
        result().save(out)
    before = contents(tmp_path)
    cut = result(ratio=0.3)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(type(cut.tokenizer), "save_pretrained", fail)  # the weights are there by now
    with pytest.raises(UserError if isinstance(error, OSError) else BaseException) as caught:
        cut.save(out, overwrite=True)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if exists else [])


def test_an_old_checkpoint_survives_a_failing_swap(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    out = tmp_path / "out"
    result().save(out)
    before = contents(tmp_path)
    cut = result(ratio=0.3)
    rename = Path.rename

    def fail(self, target):
        if "partial" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(place, "exchange", lambda *_: False)  # as on a disk that cannot
    with pytest.raises(UserError, match=r"out: cannot be .*Input/output error"):
        cut.save(out, overwrite=True)
    assert contents(tmp_path) == before


def test_a_folder_that_appears_meanwhile_is_not_touched(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(UserError, match="out: appeared while prunus was working; nothing was written"),
        checkpoint.staged(out, overwrite=False) as stage,
    ):
        (stage / "new.txt").write_text("new")
        out.mkdir()
        (out / "theirs.txt").write_text("theirs")
    assert contents(tmp_path) == {"out/theirs.txt": b"theirs"}
