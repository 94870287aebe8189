"""Bad input, the short form: a few hundred of every kind. The long form is `python tools/fuzz.py --inputs 100000`."""

import pytest
from fuzzing.kinds import kinds
from fuzzing.watched import Kind, WrongError, refusal, run

INPUTS = 40  # of a kind of weight 1


@pytest.mark.parametrize("name", [
    "config", "safetensors", "index", "gguf", "tokenizer", "prunus.json", "statistics", "manifest", "shards", "run", "state",
    "study-folder", "teacher-cache", "latency", "records", "recipe", "tuning", "study", "text", "tasks", "plan", "command",
])  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(name):
    kind = kinds()[name]
    tally = run(kind, range(int(INPUTS * kind.weight)), seed=1)
    assert not tally.failures, {f"--seed 1 --replay {name}:{number}": why for number, why in tally.failures.items()}
    assert tally.refused and tally.taken + tally.refused == tally.tried  # some are harmless


def test_all_kinds_are_tried():
    (marks,) = test_bad_input_is_refused_in_one_sentence.pytestmark
    assert set(marks.args[1]) == set(kinds())


def failing(tmp_path, enter, **more):
    (tmp_path / "base").mkdir(exist_ok=True)
    (tmp_path / "base" / "x.txt").write_text("x")
    kind = Kind("made", lambda: tmp_path / "base", (), enter, **more)
    return run(kind, range(3), seed=0, limit_s=1.0).failures


def test_the_watch_sees_what_it_is_for(tmp_path):
    """A traceback, a hang, too much memory, a write elsewhere, a process that dies, and sentences that are none."""
    from prunus.errors import UserError

    def say(text):
        raise UserError(text)

    def hang(place, rng):
        while True:
            pass

    def die(place, rng):
        import os

        os.abort()

    cases = {
        "ZeroDivisionError": lambda place, rng: 1 / 0,
        "hangs for 1 s": hang,
        "MemoryError": lambda place, rng: bytearray(3 << 30),
        "writes outside": lambda place, rng: (tmp_path / "elsewhere").write_text("x"),
        "code -6": die,
        "does not say where": lambda place, rng: say("something is wrong"),
    }
    for message, enter in cases.items():
        found = failing(tmp_path, enter)
        assert len(found) == 3 and all(message in why for why in found.values()), (message, found)
    assert not failing(tmp_path, lambda place, rng: say(f"{place}: is wrong; mend it"))
    with pytest.raises(WrongError, match="not one sentence"):
        refusal("specimen\nx", "specimen")
