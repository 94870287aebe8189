"""Commands as a user types them, each in a process of its own, disturbed at any moment, looked at, and run again.

A process is a fork of this one, which has imported all that is slow; what a command starts itself (the steps of a study, the clean
process that looks at a checkpoint) is forked likewise. For tests/test_faults.py, and for tools/faults.py, which records hundreds.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipeline
import training
import warm
import yaml

from prunus import reload, verification
from prunus.place import unbroken
from prunus.study import run as studies
from prunus.train import saved

# -- the commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """What is typed, and what lies in its folder before."""

    words: Callable[[Path], tuple[object, ...]]
    before: Callable[[Path], None] = lambda at: None
    again: tuple[str, ...] = ()  # what a second call of a finished one may say, with exit code 2: it replaces nothing


@functools.cache
def imported() -> None:
    """What commands import late, here, so that their forks have it."""
    for name in ("matplotlib.pyplot", "gguf", "onnx", "onnxscript", "onnxruntime", "torch.onnx", "torch.distributed.checkpoint",
                 "prunus.cli", "prunus.api", "prunus.show", "prunus.show_bench", "prunus.show_train", "prunus.show_study",
                 "prunus.show_data", "prunus.appraisal", "prunus.comparison", "prunus.export.gguf_file", "prunus.export.onnx_file",
                 "prunus.study.page", "prunus.study.steps", "prunus.train.searched", "prunus.train.track"):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from prunus.train import recipe

    recipe.shipped()  # what finds files of a package is imported then, from where other users may not read


@functools.cache
def inputs() -> Path:
    """All that commands read; nothing of it may ever change."""
    out = pipeline.scratch() / "inputs"
    out.mkdir()
    text = "".join(json.dumps({"text": f"{i} {doc}"}) + "\n" for i in range(6) for doc in pipeline.corpus())
    (out / "text.jsonl").write_text(text, encoding="utf-8")
    shutil.copytree(training.tokenizer(), out / "tokenizer")
    shutil.copytree(pipeline.folder("llama", 128), out / "dense")
    shutil.copytree(training.data(), out / "tokens")
    part = {"target": {"ratio": 0.4}, "pace": {"start": 0.1, "end": 0.9}, "slice_at": 0.1, "stops": [0.8]}
    fields = {"data__domains": [{"folder": str(out / "tokens")}], "model__tokenizer": str(out / "tokenizer")}
    recipe = training.asked(**fields, prune=part, log_every=2)
    (out / "recipe.yaml").write_text(json.dumps(recipe.plain()), encoding="utf-8")
    onward = training.asked(**fields, tokens=4 * 4 * training.SEQ).plain() | {"model": {"source": "model"}}
    (out / "onward.yaml").write_text(json.dumps(onward), encoding="utf-8")
    study = {
        "name": "two",
        "cut": {"calibration": {"text": str(out / "text.jsonl"), "windows": 3, "seq_len": 16, "documents": ":-20"},
                "ratio": 0.3, "method": "flap"},
        "arms": {"A": {"model": str(out / "dense"), "cut": {}, "recipe": str(out / "onward.yaml")}},
        "evaluate": [{"texts": [str(out / "text.jsonl")], "windows": 2, "seq_len": 16, "documents": "-20:"}],
    }  # fmt: skip
    (out / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return out


def calibrated(*words: object) -> tuple[object, ...]:
    return ("-c", inputs() / "text.jsonl", "--windows", 6, "--seq-len", 16, *words)


def pruned(at: Path) -> tuple[object, ...]:
    return ("prune", inputs() / "dense", "-m", "flap", "-r", "0.3", "-o", at / "out", *calibrated())


def replaced(at: Path) -> tuple[object, ...]:
    return ("prune", inputs() / "dense", "-m", "magnitude", "-r", "0.5", "-o", at / "out", "--overwrite")


def evaluated(at: Path) -> tuple[object, ...]:
    where = ("-t", inputs() / "text.jsonl", "--windows", 40, "--seq-len", 32, "--record", at / "records.jsonl")
    return ("eval", inputs() / "dense", *where, "--baseline", inputs() / "dense")


def compared(at: Path) -> tuple[object, ...]:
    options = ("--eval-windows", 4, "--eval-seq-len", 16, "--no-latency", "-o", at / "out")
    methods = ("-m", "flap,shortgpt", "-r", "0.2", "-t", inputs() / "text.jsonl")
    return ("compare-methods", inputs() / "dense", *methods, *calibrated(*options))


def one_record(at: Path) -> None:
    (at / "records.jsonl").write_text('{"kind": "older"}\n', encoding="utf-8")


def an_older_cut(at: Path) -> None:
    shutil.copytree(reference("prune").folder / "out", at / "out")


STANDS = "already exists"
SLOW = {"export to onnx", "compare"}  # seconds a run
COMMANDS: dict[str, Command] = {
    "prepare": Command(
        lambda at: ("data", "prepare", inputs() / "text.jsonl", "-t", inputs() / "tokenizer", "-o", at / "out",
                    "--shard-tokens", 2000)
    ),
    "prune": Command(pruned, again=(STANDS,)),
    "prune in another's place": Command(replaced, an_older_cut),
    "train": Command(lambda at: ("train", inputs() / "recipe.yaml", "--out", at / "run")),
    "evaluate": Command(evaluated, one_record),
    "compare": Command(compared),
    "study": Command(lambda at: ("study", "run", inputs() / "study.yaml", "--out", at / "study")),
    "export to gguf": Command(
        lambda at: ("export", inputs() / "dense", "-o", at / "model.gguf", "--modelfile"), again=(STANDS,)
    ),
    "export to onnx": Command(
        lambda at: ("export", inputs() / "dense", "-o", at / "model.onnx", "-f", "onnx"), again=(STANDS,)
    ),
    "report": Command(lambda at: ("report", reference("study").folder / "study", "-o", at / "page.html"), again=(STANDS,)),
}  # fmt: skip


# -- a process ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), what it said, and how long it took."""

    code: int
    said: str
    seconds: float
    calls: Counter[str]


SAVING = ("replace", "rename", "fsync", "unlink", "mkdir", "open", "write_text")  # of `os`; the last of `Path`


class Calls:
    """Counts what files are written by; at one call of one kind the process gets a signal, before it is done or after."""

    def __init__(self, deadly: tuple[str, int, int, bool] | None = None) -> None:
        self.deadly, self.counted = deadly, Counter[str]()

    def install_(self) -> None:
        """Changes `os` and `Path`, in a process that ends with it."""
        for name in SAVING:
            owner = Path if name == "write_text" else os
            setattr(owner, name, self._around(name, getattr(owner, name)))

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*arguments, **keywords)
            self.counted[name] += 1
            kind, number, signum, before = self.deadly or ("", 0, 0, False)
            deadly = (kind, number) == (name, self.counted[name])
            if deadly and before:
                if name == "write_text" and signum == signal.SIGKILL:  # halfway
                    arguments[0].write_bytes(arguments[1].encode()[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signum)
            done = real(*arguments, **keywords)
            if deadly and not before:
                os.kill(os.getpid(), signum)
            return done

        return call


def spoken(words: tuple[object, ...], said: int, calls: Calls | None = None) -> int:
    """In a fork: the command line, with all that it says in one file; returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(said, 1)
    os.dup2(said, 2)
    code = 1
    try:
        from prunus.cli import run

        verification.clean_process = looked_at
        studies.subprocess = SimpleNamespace(  # type: ignore[assignment]
            Popen=Step, DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT,
            TimeoutExpired=subprocess.TimeoutExpired,
        )  # fmt: skip
        sys.stdout, sys.stderr = (os.fdopen(os.dup(said), "w", buffering=1) for _ in range(2))
        from prunus.data import prepare

        prepare._BATCH_CHARS = 3000  # so that tokens are saved more often than a user's would be
        prepare.prepare.__kwdefaults__["checkpoint_tokens"] = 1500
        if calls is not None:
            calls.install_()
        code = run([str(word) for word in words])
    except BaseException as error:  # a process of its own would end with it
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
    return code


class Step:
    """As `subprocess.Popen` of another command of ours."""

    def __init__(
        self, words: list[str], *, env: dict[str, str], preexec_fn: Callable[[], None] | None = None, **_: Any
    ) -> None:
        reads, writes = os.pipe()
        self.pid, self.code = os.fork(), None
        if not self.pid:
            os.close(reads)
            os.setsid()
            if preexec_fn is not None:
                preexec_fn()
            os._exit(spoken(tuple(words[3:]), writes))
        os.close(writes)
        self.stdout = os.fdopen(reads, errors="replace")

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("step", timeout or 0)
            time.sleep(0.01)
        return self.code  # type: ignore[return-value]

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def looked_at(request: Path) -> subprocess.CompletedProcess[str]:
    """As `verification.clean_process`; not clean, but at once."""
    reads, writes = os.pipe()
    with unbroken():  # Python loses a Ctrl-C in what modules do at a fork, which no real process of ours does
        pid = os.fork()
    if not pid:
        sys.dont_write_bytecode = True  # as `python -B`
        spec = importlib.util.spec_from_file_location("__reload__", reload.__file__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with os.fdopen(writes, "w") as pipe:
            pipe.write(json.dumps(warm.asked(module, str(request))))
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        answer = json.loads(pipe.read() or '{"code": 1, "out": "", "err": "the fork died"}')
    os.waitpid(pid, 0)
    return subprocess.CompletedProcess([], answer["code"], answer["out"], answer["err"])


def start(
    name: str,
    at: Path,
    calls: Calls | None = None,
    *,
    wait: tuple[float, int] | None = None,
    first: Callable[[], None] = lambda: None,
    limit_s: float = 200,
) -> Ended:
    """The command in a fork; `first` runs there before it; `wait`: after so many seconds it gets that signal."""
    (aside := at.with_name(f"{at.name}.aside")).mkdir(exist_ok=True)
    since, words, calls = time.monotonic(), COMMANDS[name].words(at), calls or Calls()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.environ |= {"PRUNUS_CACHE": str(aside / "cache"), "TMPDIR": str(aside), "OMP_NUM_THREADS": "1"}
            said = os.open(aside / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            signal.alarm(int(limit_s))
            first()
            code = spoken(words, said, calls)
            (aside / "calls").write_bytes(json.dumps(calls.counted).encode())
        finally:
            os._exit(code)
    if wait is not None:
        time.sleep(wait[0])
        os.kill(pid, wait[1])  # not waited for yet, so the number is its own
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    counted = json.loads((aside / "calls").read_text()) if wait is None and code == 0 else {}
    return Ended(code, (aside / "said").read_text(errors="replace"), time.monotonic() - since, Counter(counted))


def refusal(said: str) -> str:
    """What a user is told: one sentence, no traceback."""
    lines = [line for line in said.splitlines() if line.startswith("prunus: ")]
    assert len(lines) == 1 and "Traceback" not in said, said[-3000:]
    return lines[0]


# -- what is left of it ---------------------------------------------------------------------------------------------------

# When and how long, and which commit wrote it. Headers of safetensors files have their fields in no fixed order, so what is not
# the model is compared by its tensors, and hashes of such files are left out.
TIMES = {"time", "created", "seconds", "tokens_per_s", "share_of_peak", "seconds_left", "cut_s", "shared_s", "stages_s", "commit",
         "machine", "files", "seal"}  # fmt: skip


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if name not in TIMES}
    return [plain(one) for one in value] if isinstance(value, list) else value


def told(path: Path) -> object:
    """What a file says, but for times."""
    from safetensors.torch import load_file

    if path.suffix == ".json":
        return plain(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl":  # a record that came right before the kill comes again
        lines = [json.dumps(plain(json.loads(line))) for line in path.read_text(encoding="utf-8").splitlines()]
        return list(dict.fromkeys(lines))
    if path.suffix == ".safetensors" and path.stem != "model":
        return {name: (t.dtype, t.shape, digest(t.numpy().tobytes())) for name, t in load_file(path).items()}
    if path.name == "comparison.md":  # tells seconds
        return path.read_text(encoding="utf-8").count("\n")
    if path.name == "comparison.png":
        return path.read_bytes()[-8:]  # its last chunk
    if path.suffix == ".sqlite":
        base = sqlite3.connect(path)
        try:
            return [line for line in base.iterdump() if "commit" not in line]
        finally:
            base.close()
    return digest(path.read_bytes())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def outcome(at: Path) -> dict[str, object]:
    """Every file but the lock, the steps' logs, and training's checkpoints before the last, one of which stands where it was
    stopped; hidden ones too: nothing may be left over.
    """
    last = {max(folder.glob("step-*"), default=None) for folder in at.rglob("checkpoints")}
    files = sorted(path for path in at.rglob("*") if path.is_file() and path.name != ".lock" and path.parent.name != "logs")
    found = (path for path in files if not path.parent.match("checkpoints/step-*") or path.parent in last)
    return {str(path.relative_to(at)): told(path) for path in found}


GROWING = {
    "log.jsonl",
    "runs.jsonl",
    "records.jsonl",
    "progress.json",
    "index.sqlite",
    "proofs.json",
}  # while a command is at work


def half(at: Path, whole: dict[str, object], older: dict[str, object]) -> list[str]:
    """Files that a user or a command would take for whole, and that are neither what they will be nor what they were."""
    found = []
    for path in (path for path in at.rglob("*") if path.is_file()):
        name = str(path.relative_to(at))
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if hidden or path.name in GROWING or path.parent.name == "logs":
            continue
        if path.parent.parent.name == "checkpoints":
            saved._check_files(path.parent)  # of itself
        elif (said := told(path)) not in (whole.get(name), older.get(name)):
            found.append(f"{name}: {said}")
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): digest(path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Reference:
    """The run that nobody disturbed."""

    folder: Path
    outcome: dict[str, object]
    ended: Ended


@functools.cache
def reference(name: str) -> Reference:
    imported()
    at = fresh(name)
    ended = start(name, at)
    assert ended.code == 0, ended.said[-5000:]
    kept = at.with_name(f"undisturbed-{name}")
    found = outcome(at)
    at.rename(kept)
    return Reference(kept, found, ended)


def fresh(name: str) -> Path:
    """The folder for a command, always the same, for some write down where they are; with what lies there before."""
    inputs()
    at = pipeline.scratch() / f"work-{name}"
    for place in (at, at.with_name(f"{at.name}.aside")):
        shutil.rmtree(place, ignore_errors=True)
    at.mkdir()
    COMMANDS[name].before(at)
    return at


# -- disturbed ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disturbance:
    """A signal to one command, at a share of its time, or of its calls of one kind."""

    name: str
    signum: int
    share: float
    place: str | None = None
    before: bool = False

    def __str__(self) -> str:
        when = "" if self.place is None else f" {'before' if self.before else 'after'} {self.place}"
        return f"{self.name}: {signal.Signals(self.signum).name}{when} at {self.share:.4f}"


def drawn(name: str, seed: int) -> Iterator[Disturbance]:
    """Moments without end: half SIGKILL, half asked to stop; half at any time, half inside saves."""
    chance = random.Random(f"{name} {seed}")
    calls = reference(name).ended.calls
    while True:
        signum = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        place = chance.choice([kind for kind in SAVING if calls[kind]]) if chance.random() < 0.5 else None
        yield Disturbance(name, signum, chance.random(), place, chance.random() < 0.5)


@dataclass(frozen=True)
class Happened:
    """What came of a disturbance: whether the process was stopped by it, and whether the same command then ended exactly."""

    stopped: bool
    faults: tuple[str, ...]


def disturb(what: Disturbance, times: int = 1) -> Happened:
    """Disturbed, looked at, run again, compared."""
    whole, command = reference(what.name), COMMANDS[what.name]
    inputs_before, at, faults, stopped = hashes(inputs()), fresh(what.name), [], False
    older = outcome(at)
    for _ in range(times):
        if what.place is None:
            ended = start(what.name, at, wait=(what.share * whole.ended.seconds, what.signum))
        else:
            number = 1 + int(what.share * whole.ended.calls[what.place])
            ended = start(what.name, at, Calls((what.place, number, what.signum, what.before)))
        stopped |= ended.code != 0
        faults += looked(what, ended, half(at, whole.outcome, older))
    again = start(what.name, at)
    if again.code != 0 and not any(text in again.said for text in command.again):
        faults.append(f"the same command ended with {again.code}: {again.said[-2000:]}")
    if hashes(inputs()) != inputs_before:
        faults.append("what it read was changed")
    mine = outcome(at)
    if mine != whole.outcome:
        names = [name for name in {**mine, **whole.outcome} if mine.get(name) != whole.outcome.get(name)]
        faults.append(f"the outcome differs: {names}")
    return Happened(stopped, tuple(faults))


def looked(what: Disturbance, ended: Ended, half_written: list[str]) -> list[str]:
    """What is wrong right after the disturbance."""
    faults = [f"half-written: {text[:300]}" for text in half_written]
    if "Traceback" in ended.said:
        faults.append(f"a traceback: {ended.said[-2000:]}")
    if ended.code not in (0, 128 + what.signum, -what.signum) and not (what.name == "study" and ended.code == 1):
        faults.append(f"exit code {ended.code}: {ended.said[-2000:]}")
    return faults
