"""Too little room, and no right to write: one sentence, nothing half-written, and with enough the same command ends as ever."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import faults
import pytest
from faults import COMMANDS, SLOW, Ended, fresh, outcome, reference, refusal, start

NO_ROOM = ("File too large", "os error 27", "is there room", "No space left", "are free there")


def largest(name: str) -> int:
    """Bytes of the largest file that a command leaves."""
    folder = reference(name).folder
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def starved(name: str, share: float) -> Ended:
    """The same command again, with room enough, behind one that had room for a share of its largest file and said so."""
    whole, at = reference(name), fresh(name)
    older, size = outcome(at), int(share * largest(name))

    def first() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    ended = start(name, at, first=first)
    assert ended.code in (1, 2), ended.said[-3000:]
    assert name == "study" or any(word in refusal(ended.said) for word in NO_ROOM)
    assert not faults.half(at, whole.outcome, older)
    again = start(name, at)
    assert outcome(at) == whole.outcome, again.said[-3000:]
    return again


@pytest.mark.parametrize(("name", "share"), [("prepare", 0.5), ("prune", 0.5), ("train", 0.9), ("export to gguf", 0.5)])
def test_no_room(name, share):
    assert starved(name, share).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in SLOW])
@pytest.mark.parametrize("share", [0.1, 0.95])
def test_no_room_anywhere(name, share):
    assert starved(name, share).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "prune", "train", "study", "export to gguf", "report"])
def test_a_full_disk(name, tmp_path):
    """A small file system; skipped where mounting is refused."""
    whole = reference(name)
    need = sum(path.stat().st_size for path in whole.folder.rglob("*"))
    at = fresh(name)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={max(need // 2, 4096)}", "tmpfs", str(at)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting is refused: {mounted.stderr.decode().strip()}")
    try:
        COMMANDS[name].before(at)
        ended = start(name, at)
        assert ended.code in (1, 2), ended.said[-3000:]
        assert name == "study" or any(word in refusal(ended.said) for word in NO_ROOM)
        assert not faults.half(at, whole.outcome, {})
        subprocess.run(["mount", "-o", f"remount,size={16 * need + 2**27}", str(at)], check=True)
        again = start(name, at)
        assert again.code == 0 and outcome(at) == whole.outcome, again.said[-3000:]
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a process that is not root cannot become another user, and need not")
@pytest.mark.parametrize("name", ["prepare", "prune", "train"])
def test_a_folder_that_may_not_be_written(name):
    """As a user without rights there."""
    reference(name)
    at = fresh(name)
    aside = at.with_name(f"{at.name}.aside")
    aside.mkdir(exist_ok=True)
    aside.chmod(0o777)
    for parent in at.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o755)
    ended = start(name, at, first=lambda: os.setuid(65534))
    assert ended.code == 2 and not outcome(at), ended.said[-3000:]
    assert any(word in refusal(ended.said) for word in ("no right to write", "cannot be written", "Permission denied"))
    again = start(name, at)
    assert again.code == 0 and outcome(at) == reference(name).outcome
