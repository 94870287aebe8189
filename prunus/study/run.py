"""Doing a study: every step a process of its own, in any order that their needs allow; stopped and gone on with anywhere."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO, Any

from .. import record
from ..checkpoint import MANIFEST, read_manifest
from ..data.text import HUB, documents
from ..errors import UserError
from ..ledger import Ledger
from ..place import locked, staged_files
from ..source import Source
from ..train.feeds import check_budget, overlap_notes
from ..train.opening import RECORD
from ..train.stopping import StoppedError, asked_to_stop
from .file import Cell, Study
from .plan import plan
from .protocol import proofs
from .results import PROOFS, RECORDS, index, keep, load, rows
from .steps import EVALUATIONS, Step, cut_of, ledger_of, measured_of, model_of, steps

LOGS = "logs"
LOG_BYTES = 4 << 20  # of what a step says, over all its starts; then the file becomes NAME.log.1, and the one before goes
_GRACE_S = 120  # that a step has to save what it has once the study is asked to stop
Tell = Callable[[str], None]


@dataclass
class Outcome:
    """What became of the steps that were not done before."""

    ran: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)  # that could not be begun -> the failed step that they need


def run(study: Study, out: Path, *, processes: int = 1, tell: Tell = lambda text: None) -> dict[str, Any]:
    """Do what is not done yet, so many steps at a time; returns the rows of all runs that are done, and the proofs.

    A step that fails is reported, with those that need it, and leaves the others alone. StoppedError once all have stopped.
    """
    if processes < 1:
        raise UserError(f"processes: {processes} are too few; give at least 1")
    record.check_place(out / RECORDS, "out")
    made = plan(study, out, rate=1.0)  # refuses what can be known beforehand: protocols, cuts, shapes
    for name in made["published"]:
        Source.open(name)  # refuses it: a shape is enough for a plan alone
    check_texts(study)
    known = steps(study)
    for step in known.values():
        if (out / step.place).exists():
            step.claim(out)  # refuses what is another study's, before any work
    for note in overlaps(study):
        tell(f"note: {note}")
    with locked(out):
        keep(study, out)
        doing = _Doing(study, known, out, processes, tell)
        try:
            doing.all()
        finally:  # what is done can be looked at, however this ended
            gather(study, out)
    return done(study, out) | vars(doing.outcome)


def done(study: Study, out: Path) -> dict[str, Any]:
    """What a study's folder holds, gathered: rows and proofs."""
    found = load(out)
    return {"study": study.name, "out": str(out), **vars(Outcome()), "rows": rows(found), "proofs": list(found.proofs)}


def check_texts(study: Study) -> None:
    """UserError, before the first step, for tokens that are missing or too few, and for texts and tasks that cannot be read."""
    for cell in study.cells:
        if cell.recipe is not None and "flops_of" not in cell.others:  # whose tokens are not known yet
            try:
                check_budget(cell.recipe)
            except UserError as error:
                raise UserError(f"{study.path}: {cell.name}: {error}") from error
    cuts = [cell.cut.calibration for cell in study.cells if cell.cut is not None and cell.cut.calibration is not None]
    texts = {text.text: text.field for text in cuts} | {t: "text" for part in study.file.evaluate for t in part.texts}
    for text, field_ in texts.items():
        if not text.startswith(HUB):
            next(iter(documents(text, field=field_)), None)
    for part in study.file.evaluate:
        part.question.checked()


def overlaps(study: Study) -> list[str]:
    """A word of warning for every text that is scored on and lies in text that is trained on."""
    folders = {one.folder for cell in study.cells if cell.recipe is not None for one in cell.recipe.data.domains}
    texts = dict.fromkeys((text, part.documents) for part in study.file.evaluate for text in part.texts)
    return [note for text, which in texts for note in overlap_notes(text, sorted(folders), which)]


class _Doing:
    """Steps on their way."""

    def __init__(self, study: Study, known: dict[str, Step], out: Path, processes: int, tell: Tell) -> None:
        self.study, self.known, self.out, self.processes, self.tell = study, known, out, processes, tell
        self.todo = [step for step in known.values() if not step.is_done(out)]
        self.total = len(self.todo)
        self.running: dict[str, _Process] = {}
        self.outcome = Outcome()

    def all(self) -> Outcome:
        with asked_to_stop() as asked:
            try:
                while (self.todo or self.running) and not asked():
                    self._begin()
                    self._end()
                    if self.running:
                        time.sleep(0.05)
            finally:  # nothing goes on behind the user's back
                self._stop()
            if stop := asked():
                raise StoppedError(stop, len(self.outcome.ran), "study")
        return self.outcome

    def _begin(self) -> None:
        for step in [*self.todo]:
            bad = next((need for need in step.needs if need in self.outcome.failed or need in self.outcome.left), None)
            if bad is not None:
                self.outcome.left[step.name] = self.outcome.left.get(bad, bad)
                self.todo.remove(step)
            elif self._has_room(step) and all(self.known[need].is_done(self.out) for need in step.needs):
                self.todo.remove(step)
                number = len(self.outcome.ran) + len(self.outcome.failed) + len(self.running) + 1
                self.tell(f"{self.study.name}: step {number} of {self.total}, {step.name}")
                self.running[step.name] = _Process(self.study, step, self.out, self.processes, self.tell)

    def _has_room(self, step: Step) -> bool:
        """Whether it may begin now. What is timed has the machine to itself."""
        if any(self.known[name].kind == "measure" for name in self.running):
            return False
        return not self.running if step.kind == "measure" else len(self.running) < self.processes

    def _end(self) -> None:
        for name, process in [*self.running.items()]:
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            if code == 0:
                self.outcome.ran.append(name)
            else:
                self.outcome.failed[name] = process.reason(code)
                self.tell(f"{name} failed: {self.outcome.failed[name]}")

    def _stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        end = time.monotonic() + _GRACE_S
        for process in self.running.values():
            process.wait(max(0.1, end - time.monotonic()))


def _end_with_parent() -> None:
    """In a step's process: it is killed with the study, so that the same command finds nobody at work on what it goes on with."""
    call = getattr(_LIBRARY, "prctl", None)  # of Linux; elsewhere a step of a killed study comes to its own end
    if call is not None:
        call(_SIGNAL_OF_PARENT, signal.SIGKILL)


_LIBRARY, _SIGNAL_OF_PARENT = ctypes.CDLL(None), 1  # PR_SET_PDEATHSIG of linux/prctl.h


class _Process:
    """One step in a process of its own, so that nothing that befalls it befalls another; what it says goes to its log."""

    def __init__(self, study: Study, step: Step, out: Path, processes: int, tell: Tell) -> None:
        self.log = out / LOGS / f"{step.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.said = ""
        words = [sys.executable, "-m", "prunus", "study", "step", str(study.path), step.name]
        words += ["--key", step.key, "--out", str(out)]  # the file is read again there, and may have been changed
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=threads(processes), start_new_session=True, preexec_fn=_end_with_parent,
        )  # fmt: skip
        tells = tell if processes == 1 else lambda text: None
        assert self.process.stdout is not None
        self.reader = threading.Thread(target=self._read, args=(self.process.stdout, tells), daemon=True)
        self.reader.start()

    def _read(self, said: IO[str], tell: Tell) -> None:
        log = RotatingFileHandler(self.log, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
        with said, closing(log):
            for line in said:
                log.handle(logging.makeLogRecord({"msg": line.rstrip("\n")}))
                if text := line.rstrip():
                    self.said = text
                    tell(f"  {text}")

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None:
            self.reader.join(5)
        return code

    def reason(self, code: int) -> str:
        if code < 0:
            return f"was ended by signal {-code}" + (", as the system does when memory runs out" if code == -9 else "")
        return self.said.removeprefix("prunus: ") or f"ended with code {code} and said nothing; see {self.log}"

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self, seconds: float) -> None:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.reader.join(5)


def threads(processes: int) -> dict[str, str]:
    """The environment of a step: the cores shared out among so many, unless the user has said how many threads to use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {} if processes == 1 else {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    return shared | dict(os.environ)


# -- what is there ----------------------------------------------------------------------------------------------------------


def is_done(cell: Cell, out: Path) -> bool:
    """Whether a run's model is there; a released one is."""
    if cell.recipe is not None:
        return (out / cell.name / RECORD).is_file()
    return cell.cut is None or (model_of(cell, out) / MANIFEST).is_file()


def _evaluations(cell: Cell, out: Path) -> list[dict[str, Any]]:
    path = out / EVALUATIONS / f"{cell.name}.jsonl"
    return record.read(path) if path.is_file() else []


def _uncut(cell: Cell, out: Path) -> int | None:
    """Parameters of a released model that a run cut, of which there is no run; None once the cut is deleted."""
    if cell.model is None or cell.cut is None or not (cut_of(cell, out) / MANIFEST).is_file():
        return None
    return int(read_manifest(cut_of(cell, out)).before["params"])


def gather(study: Study, out: Path) -> list[dict[str, Any]]:
    """Writes all records in one file, in the study's order, each with its arm and place, what ledgers prove, and the index.

    A cut alone is its manifest. What the study is stands beside them, so that no file of it is needed to read them.
    """
    keep(study, out)
    lines = []
    for cell in study.cells:
        if not is_done(cell, out):
            continue
        line: dict[str, Any] = {"kind": "released", "recipe": {"model": cell.model}, "figures": {}}
        if cell.recipe is not None:
            line = record.read(out / cell.name / RECORD)[-1]
        elif cell.cut is not None:
            made = read_manifest(model_of(cell, out))
            line = {
                "kind": "cut",
                "commit": made.commit,
                "time": made.created,
                "versions": made.versions,
                "figures": made.after,
            }
            line |= {"recipe": {"cut": made.method["request"], "calibration": made.calibration}}
        line |= {"run": cell.name, "arm": cell.arm, "place": dict(cell.place)}
        if (uncut := _uncut(cell, out)) is not None:
            line["uncut"] = uncut
        if scored := _evaluations(cell, out):
            line["evaluations"] = scored
        if (timed := measured_of(cell, study, out)) is not None:
            line["measured"] = timed | {
                "models": [{k: v for k, v in row.items() if k != "widths"} for row in timed["models"]]
            }
        if (folder := ledger_of(cell, out)) is not None:
            line["ledger"] = Ledger.read(folder).summary()
        lines.append(line)
    out.mkdir(parents=True, exist_ok=True)
    with staged_files(out / RECORDS) as (stage,):
        text = "".join(json.dumps(entry, sort_keys=True, allow_nan=False) + "\n" for entry in lines)
        stage.write_text(text, encoding="utf-8")
    with staged_files(out / PROOFS) as (stage,):
        stage.write_text(json.dumps(proofs(study, out), indent=1) + "\n", encoding="utf-8")
    index(load(out))
    return lines
