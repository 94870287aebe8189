"""A run's log in parts: no line is lost, whatever is full, killed or gone on with."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.train import log


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(log, "PART_BYTES", 100)


def write(run, steps):
    for step in steps:
        log.append(run, {"step": step, "loss": 1 / step})
        log.append(run, {"step": step, "validation": step % 3})


def told(run):
    return [(line["step"], "loss" in line) for line in map(json.loads, log.lines(run))]


def whole(steps):
    return [(step, kind) for step in steps for kind in (True, False)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=5), st.booleans())
def test_what_goes_on_from_before_its_end_tells_each_step_once(tmp_path_factory, kills, half):
    """As a run that is killed again and again: it is at `last`, its checkpoint at `back`."""
    run, at = tmp_path_factory.mktemp("run"), 0
    for more, back in kills:
        write(run, range(at + 1, at + more + 1))
        if half:
            with (run / log.LOG).open("a") as file:
                file.write('{"step": 1, "lo')
        at = max(0, at + more - back)
        log.cut(run, at)
        assert told(run) == whole(range(1, at + 1))
        sizes = [(run / name).stat().st_size for name in map(str, log.parts(run)[:-1])]
        assert all(0 < size < 200 for size in sizes)


def test_full_parts_are_set_aside_in_order(tmp_path):
    write(tmp_path, range(1, 13))
    *older, last = log.parts(tmp_path)
    assert [*older, last] == [*(f"{tmp_path}/log.{n}.jsonl" for n in range(1, len(older) + 1)), f"{tmp_path}/log.jsonl"]
    assert len(older) > 4 and {path.name for path in tmp_path.iterdir()} <= {
        path.rpartition("/")[2] for path in (*older, last)
    }
    assert told(tmp_path) == whole(range(1, 13))


def test_a_line_that_is_half_there_is_none(tmp_path):
    assert log.lines(tmp_path) == []
    (tmp_path / log.LOG).write_text('{"step": 1}\n{"step"')
    assert log.lines(tmp_path) == [b'{"step": 1}']
