"""Files and folders that take their places whole, and what a process leaves that is killed while they do."""

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from prunus import checkpoint, place, record


def test_a_folder_is_replaced_at_one_stroke(tmp_path):
    """A kill between two renames would leave nothing where the old folder was."""
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    assert place.exchange(one, other) and (one / "name").read_text() == "other"
    assert not place.exchange(one, tmp_path / "none")


def left_by(path: Path, kind: str = "partial") -> Path:
    """The name that a process has, or had, which was this process's child."""
    reads, writes = os.pipe()
    if not (pid := os.fork()):
        os.write(writes, str(place.beside(path, kind)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        return Path(pipe.read())


def test_what_a_killed_process_left_goes(tmp_path):
    out = tmp_path / "out"
    left_by(out).mkdir()
    (left_by(out) / "half").mkdir(parents=True)
    place.beside(out).mkdir()  # of a process that had our number
    alive = tmp_path / f".out.partial-{place._machine()}-{os.getppid()}"
    elsewhere = tmp_path / f".out.partial-00000000-{2**22}"
    for folder in (alive, elsewhere):
        folder.mkdir()
    with checkpoint.staged(out, overwrite=False) as stage:
        (stage / "whole").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, elsewhere.name}
    file = tmp_path / "page.sqlite"
    left_by(file).touch()
    Path(f"{left_by(file)}-journal").touch()
    with place.staged_files(file) as (stage,):
        stage.touch()
    assert [path.name for path in tmp_path.glob("*page*")] == ["page.sqlite"]


def test_a_process_that_nobody_asked_about_is_at_work_no_more(tmp_path):
    """In containers the first process may ask late, or never, how others ended: until then their numbers are taken."""
    out = tmp_path / "out"
    if not (ended := os.fork()):
        place.beside(out).mkdir()
        os._exit(0)
    os.waitid(os.P_PID, ended, os.WEXITED | os.WNOWAIT)
    try:
        os.kill(ended, 0)
        assert [path.name.endswith(f"-{ended}") for path in tmp_path.iterdir()] == [True]
        place.clear_left(out)
        assert not [*tmp_path.iterdir()]
    finally:
        os.waitpid(ended, 0)


def test_what_was_set_aside_comes_back(tmp_path):
    """Where two folders cannot change places at one stroke, a kill may come between."""
    out = tmp_path / "out"
    left_by(out, "replaced").mkdir()
    place.clear_left(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    left_by(out, "replaced").mkdir()
    place.clear_left(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with place.locked(tmp_path / "run"):
        record.append(tmp_path / "run" / "records.jsonl", "eval", {}, {})
    assert len(record.read(tmp_path / "run" / "records.jsonl")) == 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_who_asks_while_files_take_their_places_waits(tmp_path, monkeypatch, signum):
    """All of them or none; the first comes last, so that it does not stand without the others."""
    replaced, told, real = [], [], Path.replace

    def replace(stage, path):
        replaced.append(path.name)
        os.kill(os.getpid(), signum)
        return real(stage, path)

    monkeypatch.setattr(Path, "replace", replace)
    before = signal.signal(signum, lambda *_: told.append(sorted(path.name for path in tmp_path.iterdir())))
    try:
        with place.staged_files(tmp_path / "main", tmp_path / "more") as stages:
            for stage in stages:
                stage.touch()
        assert replaced == ["more", "main"] and told == [["main", "more"]]
        assert signal.getsignal(signum) is not signal.SIG_DFL
    finally:
        signal.signal(signum, before)
