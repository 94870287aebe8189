"""Bad input by the thousand: every kind that prunus reads, changed by a seed, in processes that are watched.

python tools/fuzz.py --inputs 100000 --record results/fuzz.jsonl        # goes on where it was stopped
python tools/fuzz.py --kinds gguf,config --inputs 5000                  # several at a time: one command a kind
python tools/fuzz.py --replay gguf:1234                                 # one input again, here, with its traceback
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402, F401  (offline, and no cache of the user's, before any library is imported)
from fuzzing.kinds import kinds  # noqa: E402
from fuzzing.watched import Kind, Tally, refusal, run, specimen  # noqa: E402

from prunus import record  # noqa: E402
from prunus.errors import UserError, VerificationError  # noqa: E402

_PIECE = 1500  # inputs between two marks of how far it is
_LIMIT_S = 60.0  # of an input: nobody else need be idle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--kinds", default="", help="with commas; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "fuzz", help="how far each kind is, and inputs that fail"
    )
    parser.add_argument("--record", type=Path, help="append a line a kind, once it is done")
    parser.add_argument("--replay", metavar="KIND:NUMBER")
    asked = parser.parse_args()
    known = kinds()
    if asked.replay:
        name, _, number = asked.replay.partition(":")
        return replay(known[name], int(number), asked.seed, asked.work)
    chosen = [known[name] for name in asked.kinds.split(",")] if asked.kinds else list(known.values())
    weights = sum(kind.weight for kind in chosen)
    failed = 0
    for kind in chosen:
        count = -int(-asked.inputs * kind.weight // weights)
        tally = through(kind, count, asked.seed, asked.work)
        failed += len(tally.failures)
        counts = f"{tally.tried:,} inputs, {tally.refused:,} refused, {tally.taken:,} taken, {len(tally.failures)} failed"
        print(f"{kind.name}: {counts}, {tally.seconds:.0f} s ({tally.cpu_s:.0f} s of a processor)", flush=True)
        for number, why in list(tally.failures.items())[:20]:
            print(f"  --replay {kind.name}:{number}  {why}")
        if asked.record is not None:
            figures: dict[str, float] = {
                "inputs": tally.tried,
                "refused": tally.refused,
                "taken": tally.taken,
                "failed": len(tally.failures),
            }
            recipe = {"kind": kind.name, "seed": asked.seed, "inputs": count}
            record.append(
                asked.record, "fuzz", recipe, figures | {"seconds": round(tally.seconds, 1), "cpu_s": round(tally.cpu_s, 1)}
            )
    return 1 if failed else 0


def through(kind: Kind, count: int, seed: int, work: Path) -> Tally:
    """All inputs of a kind, from where an earlier call stopped."""
    mark = work / f"{kind.name}.{seed}.json"
    tally = Tally()
    if mark.is_file():
        tally = Tally(**json.loads(mark.read_text(encoding="utf-8")))
        tally.failures = {int(number): why for number, why in tally.failures.items()}
    while tally.tried < count:
        run(kind, range(tally.tried, min(count, tally.tried + _PIECE)), seed, limit_s=_LIMIT_S, tally=tally)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(vars(tally)) + "\n", encoding="utf-8")
    for number in tally.failures:
        keep(kind, number, seed, work)
    return tally


def keep(kind: Kind, number: int, seed: int, work: Path) -> Path:
    """The input of a number, as it was given."""
    folder = work / "failed" / f"{kind.name}-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return specimen(kind, kind.make(), folder, number, seed)[0]


def replay(kind: Kind, number: int, seed: int, work: Path) -> int:
    """One input again in this process, for the debugger."""
    folder = work / "replayed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place, rng = specimen(kind, kind.make(), folder, number, seed)
    print(f"the input lies in {place}")
    try:
        kind.enter(place, rng)
        print("taken")
    except (UserError, VerificationError) as error:
        print(f"refused: {error}")
        refusal(str(error), kind.place)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
