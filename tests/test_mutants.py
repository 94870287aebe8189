"""The tool that asks whether the tests of the core would notice an error, and what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from prunus.train.schedule import Schedule

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

import mutants  # noqa: E402
import mutations  # noqa: E402

CODE = '''"""A module."""
from functools import cache

LIMIT = 3


class Box:
    """A class."""

    size: int | None = 1

    @property
    def half(self) -> int | None:
        """Half of it."""
        if self.size is None:
            raise ValueError("no " + "size")
        return self.size // 2


@cache
def label(count: int = 7) -> str:
    inner = lambda: count + 1
    return "few boxes" if inner() < 4 else "many"
'''


def test_changes_are_in_bodies_and_say_something():
    found = mutations.sample({"box": CODE}, 100, 0)
    texts = {(m.function, m.operator, m.before, m.after) for m in found}
    assert ("Box.half", "swap_op", "self.size // 2", "self.size / 2") in texts
    assert ("label", "swap_op", "count + 1", "count - 1") in texts and (
        "label",
        "lambda",
        "lambda: count + 1",
        "lambda: None",
    ) in texts
    assert ("label", "string", '"many"', '"XXmanyXX"') in texts
    assert not any('"few boxes"' == m.before or "no " in m.before for m in found)  # text for people
    assert {m.function for m in found} == {"Box.half", "label"}  # not what runs at import, nor annotations and defaults
    for m in found:
        changed = [n for n, (a, b) in enumerate(zip(CODE.splitlines(), m.source.splitlines(), strict=True), 1) if a != b]
        assert changed == [m.line] and m.lines[0] <= m.line <= m.lines[1]
    assert len({m.source for m in found}) == len({m.id for m in found}) == len(found)


def test_a_seed_chooses():
    codes = {"box": CODE, "twice": CODE + CODE.replace("Box", "Case").replace("label", "word")}
    chosen = [mutations.sample(codes, 12, seed) for seed in (0, 0, 1)]
    ids = [[m.id for m in one] for one in chosen]
    assert ids[0] == ids[1] != ids[2] and [m.module for m in chosen[2]] == ["box"] * 4 + ["twice"] * 8


def test_a_mutant_is_another_function_in_a_fork_alone():
    rate = Schedule("constant", 3.0, 10, warmup=0)
    code = mutants.source_of("train/schedule").read_text(encoding="utf-8")
    one = next(
        m for m in mutations.sample({"train/schedule": code}, 999, 0) if m.function == "_constant" and m.after == "2.0"
    )
    assert mutants.forked(lambda: [mutants.change_(one), rate(5)], 5) == ([None, 6.0], False)
    assert rate(5) == 3.0


def test_a_mutant_that_never_ends_is_ended():
    def forever():
        while True:
            pass

    assert mutants.forked(forever, 0) == (None, True)
    assert mutants.forked(lambda: 1 / 0, 5) == (None, False)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("axes", "Axis.layer"),
        ("keep", "Keep.from_json"),
        ("keep", "WeightMask.sparsity"),
        ("train/shrink/saliency", "Saliency.see"),
    ],
)
def test_what_decorators_put_around_a_function_is_taken_off(module, function):
    found = mutants.function_named(mutants.import_module(f"prunus.{module.replace('/', '.')}"), function)
    code = compile(mutants.source_of(module).read_text(encoding="utf-8"), str(mutants.source_of(module)), "exec")
    assert found.__code__ == mutants.code_named(code, function)


def test_a_record_says_what_it_lacks(tmp_path):
    rows = [{"id": f"m{i}", "module": "axes", "line": i, "outcome": "killed" if i < 8 else "survived"} for i in range(10)]
    record, reasons = tmp_path / "mutants.jsonl", tmp_path / "survivors.yaml"

    def lacks(rows, count=10):
        record.write_text("".join(json.dumps(row) + "\n" for row in [{"count": count}, *rows]))
        return mutants.faults(record)

    assert mutants.faults(record)[0].startswith("0 of 0 mutants have been run")
    assert lacks(rows) == [
        "80.0% were noticed, but 85% are to be",
        "m8 (axes:8) survived without a reason",
        "m9 (axes:9) survived without a reason",
    ]
    reasons.write_text("m9: only speed\nm1: not any more\n")
    rows[8]["outcome"] = "timeout"  # as good as killed
    assert lacks(rows) == ["m1 has a reason, but did not survive"]
    reasons.write_text("m9: only speed\n")
    assert lacks(rows) == [] and lacks(rows, 11) == ["10 of 11 mutants have been run; run `make mutants` again"]
    assert mutants.summary(record).splitlines()[-2:] == [f"{'all':24} {10:7} {9:6} {1:8} {1:9}", "killed: 90.0%"]


def test_the_record_lacks_nothing():
    assert mutants.faults(mutants.ROOT / "results" / "suite" / "mutants.jsonl") == []
