"""Freed memory stays, or goes."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from heaped import PAGE, SIZE

from prunus import heap


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap can be told")
def test_freed_pages_are_there_again_and_go_back_at_the_end():
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "heaped.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    usual, kept = said["faults"]
    # pages of 4 KiB are not all that a system may hand out: huge ones fault once for 512 of them
    assert usual > SIZE // PAGE // 1024 and kept < usual // 10
    before, during, end = said["resident"]
    assert during > before + SIZE // 2 > end


@pytest.mark.parametrize("error", [OSError, TypeError, None])
def test_other_systems_go_without(monkeypatch, error):
    """No C library that can be opened, as on Windows, or one of another make: nothing is asked of it, and work goes on."""
    asked = []

    class Library:
        def mallopt(self, option, value):
            asked.append(option)

    def opened(name):
        if error is not None:
            raise error
        return Library()

    monkeypatch.setattr(heap.ctypes, "CDLL", opened)
    heap._glibc.cache_clear()
    try:
        heap.give_back()
        with heap.kept():
            worked = True
        assert worked and not asked
    finally:
        heap._glibc.cache_clear()
