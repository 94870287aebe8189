"""Do the tests of the core notice when it is wrong? A seeded sample of small changes, each run against the tests that execute it.

    python tools/mutants.py --record results/suite/mutants.jsonl

All tests are collected once. Every mutant has a fork of that process, in which one function has other code, and its tests are
run until one fails: those of the module's own file that execute the changed statement, the quickest first. A second call goes
on where the first was stopped, and runs anew what survived if `--again` is given. A mutant counts as killed if a test fails,
or if it takes far more processor time than its tests need undisturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import coverage
import pytest
import yaml
from _pytest.runner import runtestprotocol
from hypothesis import HealthCheck, settings
from mutations import Mutant, sample

ROOT = Path(__file__).resolve().parent.parent
CORE = {  # module -> the file of its tests; that others might notice too does not count
    "axes": "axes",
    "train/schedule": "schedule",
    "shape": "shape",
    "keep": "keep",
    "saliency": "saliency",
    "ledger": "ledger",
    "allocate": "allocate",
    "train/shrink/pace": "choosing",
    "train/shrink/saliency": "choosing",
}
SLOWEST_S, MOST_S = 4.0, 12.0  # of processor time: a test that is taken, and all of a mutant's tests
PATIENCE, SLACK_S = 5, 10  # a mutant is stuck after so many times its tests' processor time, and so much more
LEAST = 0.85  # of the sample
WALL = 30  # as often the processor time may pass by the clock, on a machine that has other work


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def source_of(module: str) -> Path:
    return ROOT / "prunus" / f"{module}.py"


def forked(work: Callable[[], Any], cpu_s: float) -> tuple[Any, bool]:
    """What `work` gives in a fork of this process, and whether it ran out of time; None if it died."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reads)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1), os.dup2(quiet, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + cpu_s) + 1, resource.RLIM_INFINITY))
            with os.fdopen(writes, "w") as pipe:
                pipe.write(json.dumps(work()))
        finally:
            os._exit(0)
    os.setpgid(child, child)  # with what its tests start; it is ended as a whole
    os.close(writes)
    answer, late, end = b"", False, time.monotonic() + WALL * (cpu_s + 1)
    while not late:
        if not select.select([reads], [], [], max(0.0, end - time.monotonic()))[0]:
            late = True
        elif part := os.read(reads, 1 << 16):
            answer += part
        else:
            break
    os.close(reads)
    if late:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    late = late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
    return (json.loads(answer) if answer and not late else None), late


def first_failure(items: Iterable[pytest.Item]) -> str | None:
    """Runs tests until one fails; its id."""
    listed = list(items)
    for item, following in zip(listed, [*listed[1:], None], strict=True):
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            return item.nodeid
    return None


def code_named(code: CodeType, name: str) -> CodeType:
    """The code of a function, of what a module compiles to."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and name == constant.co_qualname:
            return constant
        if isinstance(constant, CodeType) and name.startswith(f"{constant.co_qualname}."):
            return code_named(constant, name)
    raise AssertionError(name)


def function_named(module: Any, name: str) -> FunctionType:
    """What a module defines, without what its decorators put around it."""
    found: Any = module
    for part in name.split("."):
        found = vars(found)[part]
    while not isinstance(found, FunctionType) or hasattr(found, "__wrapped__"):
        inner = ("__wrapped__", "fget", "func", "__func__")  # functools.wraps, property, cached_property, classmethod
        found = next(getattr(found, name) for name in inner if hasattr(found, name))
    return found


def change_(mutant: Mutant) -> None:
    """Changes the function of the module that is imported, and with it all that has a reference to it."""
    module = import_module(f"prunus.{mutant.module.replace('/', '.')}")
    path = str(source_of(mutant.module))
    function = function_named(module, mutant.function)
    function.__code__ = code_named(compile(mutant.source, path, "exec", dont_inherit=True), mutant.function)


class Trial:
    """The plugin that runs mutants in place of tests."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.record, self.cache = arguments, arguments.record, arguments.work / "map.json"
        self.items: dict[str, pytest.Item] = {}
        self.maps: dict[str, dict[str, Any]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """See pytest: tests are collected, and no plugin but this one runs them."""
        self.items = {item.nodeid: item for item in session.items}
        self.base = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        chosen = [mutant for mutant in self.mutants if mutant.module in (self.arguments.only or CORE)]
        outcomes = self.known()
        for number, mutant in enumerate(chosen, 1):
            known = outcomes.get(mutant.id)
            if known is None or (self.arguments.again and known["outcome"] == "survived"):
                outcomes[mutant.id] = self.run(mutant)
                self.write(outcomes)
                say(
                    f"{number}/{len(chosen)} {outcomes[mutant.id]['outcome']:9} {mutant.module}:{mutant.line} {mutant.operator}"
                )
        self.write(outcomes)
        return True

    @cached_property
    def mutants(self) -> list[Mutant]:
        """The sample."""
        codes = {module: source_of(module).read_text(encoding="utf-8") for module in CORE}
        return sample(codes, self.arguments.count, self.arguments.seed)

    # -- which test runs which line ----------------------------------------------------------------------------------

    def map(self, file: str) -> dict[str, Any]:
        """What the tests of a file cost, and who of them runs which line of the core; kept while neither changes."""
        if file not in self.maps:
            helpers = sorted(path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_"))
            key = digest(*map(source_of, CORE), *helpers, ROOT / file)
            kept = json.loads(self.cache.read_text()) if self.cache.exists() else {}
            if kept.get(file, {}).get("key") != key:
                found, _ = forked(lambda: self.measured(file), 3600)
                assert found is not None, f"{file} cannot be measured"
                kept[file] = found | {"key": key}
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                self.cache.write_text(json.dumps(kept))
                say(f"{file}: {len(found['costs'])} tests, {sum(found['costs'].values()):.1f} s; fail: {found['failed']}")
            for name in kept[file]["imports"]:  # once here, and not in every fork
                with contextlib.suppress(Exception):
                    import_module(name)
            gc.collect()
            gc.freeze()  # memory that no fork has to copy because a counter in it changed
            self.maps[file] = kept[file]
        return self.maps[file]

    def measured(self, file: str) -> dict[str, Any]:
        """In a fork: the tests of a file, undisturbed; one that fails is left out."""
        cover = coverage.Coverage(data_file=None, include=[str(source_of(m)) for m in CORE], config_file=False)
        items = [item for name, item in self.items.items() if name.startswith(f"{file}::")]
        costs, failed, before = {}, [], set(sys.modules)
        cover.start()
        for item, following in zip(items, [*items[1:], None], strict=True):
            cover.switch_context(item.nodeid)
            start = time.process_time()
            reports = runtestprotocol(item, log=False, nextitem=following)
            costs[item.nodeid] = time.process_time() - start
            if any(report.failed for report in reports):
                failed.append(item.nodeid)
        cover.stop()
        data = cover.get_data()
        lines = {m: {k: v for k, v in data.contexts_by_lineno(str(source_of(m))).items() if any(v)} for m in CORE}
        return {"costs": costs, "failed": failed, "lines": lines, "imports": sorted(set(sys.modules) - before)}

    def tests_of(self, mutant: Mutant) -> list[tuple[str, float]]:
        """Ids and costs, in the order in which they are run."""
        found = self.map(f"tests/test_{CORE[mutant.module]}.py")
        seen = found["lines"][mutant.module]
        runs = {test for line in range(mutant.lines[0], mutant.lines[1] + 1) for test in seen.get(str(line), ())}
        ranked = sorted((found["costs"][test], test) for test in runs - {"", *found["failed"]})
        out, total = [], 0.0
        for cost, test in ranked:
            if cost <= SLOWEST_S and total + cost <= MOST_S:
                out.append((test, cost))
                total += cost
        return out

    # -- one mutant ----------------------------------------------------------------------------------------------------

    def run(self, mutant: Mutant) -> dict[str, Any]:
        """The record of one mutant."""
        tests = self.tests_of(mutant)
        limit = PATIENCE * sum(cost for _, cost in tests) + SLACK_S

        def work() -> dict[str, Any]:
            start = time.process_time()
            change_(mutant)
            killer = first_failure(self.items[test] for test, _ in tests)
            return {"by": killer, "cpu_s": round(time.process_time() - start, 2)}

        answer, late = forked(work, limit) if tests else ({"by": None, "cpu_s": 0.0}, False)
        for left in self.base.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        outcome = "timeout" if late else "killed" if answer is None or answer["by"] else "survived"
        place = {"id": mutant.id, "module": mutant.module, "function": mutant.function, "line": mutant.line}
        change = {"operator": mutant.operator, "before": mutant.before, "after": mutant.after}
        return place | change | {"outcome": outcome, "tests": len(tests)} | (answer or {"by": "crash", "cpu_s": limit})

    # -- the record ----------------------------------------------------------------------------------------------------

    def known(self) -> dict[str, Any]:
        """What the record says of the mutants of this sample."""
        ids = {mutant.id for mutant in self.mutants}
        return {row["id"]: row for row in rows_of(self.record) if row["id"] in ids}

    @cached_property
    def head(self) -> dict[str, Any]:
        """What the outcomes hang on."""
        from prunus import record

        return {
            "kind": "mutants",
            "seed": self.arguments.seed,
            "count": self.arguments.count,
            "commit": record.commit(),
            "versions": record.versions() | {name: record.version(name) for name in ("mutmut", "pytest", "hypothesis")},
            "sources": {module: digest(source_of(module)) for module in CORE},
        }

    def write(self, outcomes: dict[str, Any]) -> None:
        """All or nothing, in the order of the sample."""
        rows = [outcomes[mutant.id] for mutant in self.mutants if mutant.id in outcomes]
        self.record.parent.mkdir(parents=True, exist_ok=True)
        draft = self.record.with_suffix(".part")
        draft.write_text("".join(json.dumps(row) + "\n" for row in [self.head, *rows]), encoding="utf-8")
        draft.replace(self.record)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rows_of(record: Path) -> list[dict[str, Any]]:
    """The mutants of a record, without its head."""
    if not record.exists():
        return []
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()[1:]]


def reasons_of(record: Path) -> dict[str, str]:
    """Why nobody can notice what survived, by id: a file beside the record, written by hand."""
    path = record.with_name("survivors.yaml")
    return (yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}


def summary(record: Path) -> str:
    """Killed, survived and explained, by module."""
    rows, reasons = rows_of(record), reasons_of(record)
    lines = [f"{'module':24} mutants killed survived explained"]
    for module in (*CORE, "all"):
        own = [row for row in rows if module in (row["module"], "all")]
        left = [row["id"] for row in own if row["outcome"] == "survived"]
        told = sum(name in reasons for name in left)
        lines.append(f"{module:24} {len(own):7} {len(own) - len(left):6} {len(left):8} {told:9}")
    return "\n".join([*lines, f"killed: {killed(rows):.1%}"])


def killed(rows: list[dict[str, Any]]) -> float:
    """The share that a test noticed."""
    return sum(row["outcome"] != "survived" for row in rows) / max(len(rows), 1)


def faults(record: Path) -> list[str]:
    """What a record lacks: mutants, kills or explanations."""
    rows, reasons = rows_of(record), reasons_of(record)
    count = json.loads(record.read_text(encoding="utf-8").split("\n", 1)[0])["count"] if rows else 0
    out = [] if rows and len(rows) == count else [f"{len(rows)} of {count} mutants have been run; run `make mutants` again"]
    if killed(rows) < LEAST:
        out.append(f"{killed(rows):.1%} were noticed, but {LEAST:.0%} are to be")
    left = {row["id"]: f"{row['id']} ({row['module']}:{row['line']})" for row in rows if row["outcome"] == "survived"}
    out += [f"{name} survived without a reason" for key, name in left.items() if key not in reasons]
    return out + [f"{key} has a reason, but did not survive" for key in reasons if key not in left]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=ROOT / "results" / "suite" / "mutants.jsonl")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "mutants", help="where the map of tests to lines is kept"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--only", nargs="*", choices=CORE, help="modules")
    parser.add_argument("--again", action="store_true", help="run again what survived")
    parser.add_argument("--summary", action="store_true", help="say what the record says, and run nothing")
    arguments = parser.parse_args()
    code: int = 0
    if not arguments.summary:
        os.environ["HF_HUB_OFFLINE"] = "1"
        sys.path.insert(0, str(ROOT))
        settings.register_profile(
            "mutants",
            deadline=None,
            derandomize=True,
            max_examples=40,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        options = [
            "-m",
            "not slow",
            "-s",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:terminal",
            "-o",
            "addopts=",
            "--hypothesis-profile=mutants",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            f"--rootdir={ROOT}",
        ]
        files = [str(ROOT / "tests" / f"test_{name}.py") for name in dict.fromkeys(CORE.values())]
        code = int(pytest.main([*options, *files], plugins=[Trial(arguments)]))
    print(summary(arguments.record))
    for fault in faults(arguments.record):
        print(fault)
        code = 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
