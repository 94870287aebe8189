"""The kinds of input: whole specimens, made by the tiny models of the tests, and what reads them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import checkpoints
import lessons
import pipeline
import pytest
import test_study_results
import training
import typer
import yaml
from test_tasks import rows_of as task_rows

from prunus import checkpoint, findings, latency, planning, record, saliency, verification
from prunus.builders import make_plan
from prunus.data import shards, text
from prunus.data.tokenizer import fingerprint, open_tokenizer
from prunus.errors import UserError, VerificationError
from prunus.export import card
from prunus.generations import prompts
from prunus.methods import METHODS
from prunus.sealed import SEAL, sealed
from prunus.source import Source
from prunus.study import file as studies
from prunus.tasks import local
from prunus.train import cache, saved, tuning
from prunus.train import recipe as recipes

from .commands import arguments
from .mutations import hostile
from .watched import Kind, WrongError

GENEROUS = 5  # one in so many goes further than what opens it: loading, planning, rendering


_built = functools.cache(typer.main.get_command)  # nine tenths of what a refused command line costs


def says(*words: object) -> None:
    """A command line of this process; its refusal as the error that it is."""
    with mock.patch.object(typer.main, "get_command", _built):
        code, out, err = pipeline.cli(*words)
    if code in (2, 3) and not out.startswith("Usage: "):
        raise (UserError if code == 2 else VerificationError)(err.strip().removeprefix("prunus: "))
    if code not in (0, 2):
        raise WrongError(f"exit code {code}: {err[-300:]!r}")


@functools.cache
def _root() -> Path:
    path = pipeline.scratch() / "specimens"
    path.mkdir(exist_ok=True)
    return path


def _gathered(name: str, files: dict[str, Path | str]) -> Path:
    """A folder of files, each a copy of another or of this text."""
    out = _root() / name
    if not out.exists():
        for at, what in files.items():
            (out / at).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(what, Path):
                shutil.copyfile(what, out / at)
            else:
                (out / at).write_text(what, encoding="utf-8")
    return out


# -- models ---------------------------------------------------------------------------------------------------------------


def _sharded() -> Path:
    out = _root() / "sharded"
    if not out.exists():
        made = checkpoints.small_llama(vocab_size=pipeline.VOCAB)
        made.save_pretrained(out, max_shard_size="60KB")
        pipeline.tokenizer().save_pretrained(out)
    return out


def _gguf() -> Path:
    out = _root() / "gguf"
    if not out.exists():
        out.mkdir()
        checkpoints.save_gguf(out / "model.gguf", checkpoints.small_llama(vocab_size=pipeline.VOCAB), pipeline.tokenizer())
    return out


def _model(place: Path, rng: Random) -> None:
    source = Source.open(str(place))
    _ = source.anatomy, source.label
    further = rng.randrange(GENEROUS * 4)
    if further == 0:
        source.load()
    elif further == 1:
        source.generation_config()
    elif further < 4:
        says(
            "plan",
            place,
            "-m",
            rng.choice(("flap", "minitron-width", "shortgpt", "magnitude")),
            "-r",
            "0.3",
            "-c",
            pipeline.text_file(),
            "--seq-len",
            16,
        )
    elif further < 6:
        stored = source.stored()
        for name in itertools.islice(stored, 3):
            _ = stored[name]


def _gguf_model(place: Path, rng: Random) -> None:
    source = Source.open(str(place / "model.gguf"))
    if not rng.randrange(GENEROUS):
        _ = source.anatomy
        if not rng.randrange(3):
            source.tokenizer()


def _tokenizer(place: Path, rng: Random) -> None:
    made = Source.open(str(place)).tokenizer() if rng.random() < 0.5 else open_tokenizer(str(place))
    fingerprint(made)


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


# -- what prunus wrote ----------------------------------------------------------------------------------------------------


def _written() -> Path:
    out = _root() / "written"
    if not out.exists():
        shutil.copytree(pipeline.saved("uniform")[0], out)
    return out


def _manifest(place: Path, rng: Random) -> None:
    further = rng.randrange(GENEROUS * 2)
    if further == 0:
        card.write(place, card.Given())
    elif further == 1:
        says("ledger", place)
    elif further == 2:
        with pytest.MonkeyPatch.context() as patch:
            pipeline.verify_here(patch)  # a clean process takes seconds, and reads what this one has read
            patch.setattr(verification, "reload_probe", _as_there(verification.reload_probe))
            says("verify", place)
    elif further == 3:
        saliency.load_scores(place / checkpoint.EXTRA)
    else:
        says("inspect", place, *(["--json"] if further < 7 else []))


def _as_there(reload: Callable[..., Any]) -> Callable[..., Any]:
    """A model that fails in this process as one that fails in a clean one."""

    def reloaded(folder: Path, *given: Any, **more: Any) -> Any:
        try:
            return reload(folder, *given, **more)
        except (IndexError, RuntimeError) as error:
            raise VerificationError(f"{folder}: does not load in a clean process: {error}") from error

    return reloaded


def _statistics(place: Path, rng: Random) -> None:
    path = place / "prunus" / "statistics.safetensors"
    import safetensors

    with safetensors.safe_open(_written() / "prunus" / "statistics.safetensors", "pt") as file:
        meta = file.metadata()
    findings.load(path, meta["key"], json.loads(meta["about"])["what"])


def _prepared(place: Path, rng: Random) -> None:
    which = rng.choice(("parent", "retrain", "validation"))
    if rng.random() < 0.3:
        says("data", "inspect", place, *rng.choice(((), ("--json",), ("--verify",))))
    opened = shards.Shards.open(place, which)
    opened.document_starts(0, opened.num_tokens)
    found = shards.prepared_documents(f"{place}:{which}")
    if found is not None:
        list(itertools.islice(found, 5))


def _run() -> Path:
    out = _root() / "run"
    if not out.exists():
        shutil.copytree(training.finished(), out)
        for lock in out.rglob(".lock"):
            lock.unlink()
    return out


def _run_folder(place: Path, rng: Random) -> None:
    further = rng.randrange(4)
    if further == 0:
        says("report", place)
    elif further == 1:
        says("ledger", place)
    elif further == 2:
        card.write(place, card.Given())
    else:
        says("runs", place.parent)


def _sealed_again_(path: Path) -> None:
    """Changes a file: whoever means harm can also reckon its seal."""
    if not path.is_file():
        return
    with contextlib.suppress(ValueError, RecursionError):
        told = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(told, dict):
            path.unlink()  # it may be a hard link to the specimen
            path.write_text(sealed({name: value for name, value in told.items() if name != SEAL}), encoding="utf-8")


def _state(place: Path, rng: Random) -> None:
    for folder in sorted((place / "checkpoints").iterdir()):
        if rng.random() < 0.5:
            _sealed_again_(folder / "state.json")
        saved.read_state(folder)
        if not rng.randrange(GENEROUS):
            import torch

            saved.read_(folder, {"nothing": torch.zeros(3)})


def _study_done() -> Path:
    out = _root() / "study-done"
    if not out.exists():
        out.mkdir()
        made = test_study_results.folder(out, test_study_results.three_seeds())
        shutil.copytree(made, out, dirs_exist_ok=True)
        shutil.rmtree(made)
    return out


def _study_folder(place: Path, rng: Random) -> None:
    if rng.random() < 0.3:
        says("report", place)
    else:
        says("study", "table", place, "--format", rng.choice(("text", "markdown", "latex", "csv")))


def _taught() -> Path:
    out = _root() / "taught"
    if not out.exists():
        lessons.teach(out)  # not those that other tests share, whose files are shorter
    return out


def _cache(place: Path, rng: Random) -> None:
    cache.Manifest.read(place).check_files(place, whole=rng.random() < 0.5)


def _latency() -> Path:
    key = latency.key("float32")
    timing = {"prefill_ms": 1.0, "decode_ms": 2.0}
    told = {"format": latency.FORMAT, "tables": {record.digest(key): {"key": key, "entries": {"a part": timing}}}}
    return _gathered("latency", {"latency.json": json.dumps(told)})


def _table(place: Path, rng: Random) -> None:
    latency.Table.only(place / "latency.json")
    latency.Table.open(latency.key("float32"), place / "latency.json")


def _records() -> Path:
    folder = _root() / "records"
    if not folder.exists():
        shutil.copytree(pipeline.folder(), folder)
        code, _, err = pipeline.cli(
            "eval", folder, "-t", pipeline.text_file(), "--windows", 2, "--seq-len", 16, "--record", folder / "eval.jsonl"
        )
        assert code == 0, err
    return folder


def _record(place: Path, rng: Random) -> None:
    record.read(place / "eval.jsonl")
    card.write(place, card.Given(records=(place / "eval.jsonl",)))


# -- what people write ----------------------------------------------------------------------------------------------------


def _recipe() -> Path:
    files = {"recipe.yaml": yaml.safe_dump(training.asked().plain(), sort_keys=False)}
    return _gathered("recipe", files | {"shipped.yaml": recipes.shipped()["prunus"]})


def _read_recipe(place: Path, rng: Random) -> None:
    name = rng.choice(("recipe.yaml", "recipe.yaml", "shipped.yaml"))
    if rng.randrange(GENEROUS):
        recipes.read(str(place / name))
    else:
        _of_others(place, "plan", "--train", place / name, "--rate", "1e9", "--memory", "8")


def _of_others(place: Path, *words: object) -> None:
    """A command that opens what a file names: a refusal may name that alone."""
    try:
        says(*words)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _tuning() -> Path:
    return _gathered("tuning", {"alpaca.yaml": tuning.shipped()["alpaca"]})


def _study() -> Path:
    plain = training.asked().plain()
    texts = {"fresh.yaml": yaml.safe_dump(plain), "onward.yaml": yaml.safe_dump(plain | {"model": {"source": "model"}})}
    recipes_of = _gathered("recipes", texts)
    fresh, onward = recipes_of / "fresh.yaml", recipes_of / "onward.yaml"
    told = {
        "name": "half",
        "cut": {"calibration": {"text": str(pipeline.text_file()), "windows": 3, "seq_len": 16}, "ratio": 0.5},
        "cuts": {"deep": {"method": "minitron-depth"}, "wide": {"method": "flap"}},
        "arms": {
            "P": {"recipe": str(fresh), "set": {"tokens": 512}, "grid": {}},
            "P-R": {"from": "P", "cut": {}, "recipe": str(onward), "set": {"tokens": 256}},
            "S": {"shape_of": "P-R", "recipe": str(fresh), "set": {"tokens": 256}},
        },
        "grid": {"cut": ["deep", "wide"], "seed+data.seed": [0, 3]},
        "compare": [{"protocol": "training-tokens", "arms": ["P-R", "S"]}],
        "claims": [{"says": "cut is better", "better": ["P-R", "S"]}],
        "evaluate": [{"texts": [str(pipeline.text_file())], "windows": 2, "seq_len": 16}],
        "measure": {"context": 8},
    }
    return _gathered("study", {"study.yaml": yaml.safe_dump(told, sort_keys=False)})


def _read_study(place: Path, rng: Random) -> None:
    if rng.randrange(GENEROUS):
        studies.read(place / "study.yaml")
    else:
        _of_others(place, "study", rng.choice(("plan", "plan", "slurm")), place / "study.yaml", "-o", place / "out")


def _text() -> Path:
    rows = [
        {"prompt": f"the cat {i}", "text": f"a {i}", "instruction": "say", "input": "", "output": "it"} for i in range(6)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return _gathered(
        "text", {"rows.jsonl": lines, "rows.json": json.dumps(rows), "plain.txt": "one\n\ntwo <|endoftext|> three\n"}
    )


def _read_text(place: Path, rng: Random) -> None:
    readers: Iterable[Callable[[], object]] = (
        lambda: list(text.documents(str(place / "rows.jsonl"))),
        lambda: list(text.documents(str(place / "plain.txt"), separator=rng.choice((None, "<|endoftext|>")))),
        lambda: prompts(place / rng.choice(("rows.jsonl", "rows.json", "plain.txt"))),
        lambda: tuning.rows_of(place / rng.choice(("rows.jsonl", "rows.json"))),
        lambda: text.check(str(place / rng.choice(("rows.jsonl", "plain.txt")))),
    )
    rng.choice(list(readers))()


TASKS = ("piqa", "arc_easy", "sciq", "hellaswag", "winogrande", "mmlu", "boolq", "openbookqa")


def _tasks() -> Path:
    known = [name for name in TASKS if name in local.TASKS]
    return _gathered(
        "tasks", {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in task_rows(name, 4)) for name in known}
    )


def _read_tasks(place: Path, rng: Random) -> None:
    for file in sorted(place.glob("*.jsonl")):
        local.read(place, file.stem)


# -- what is asked for ----------------------------------------------------------------------------------------------------


def _nothing() -> Path:
    return _gathered("nothing", {"x.txt": "x"})


def _plan(place: Path, rng: Random) -> None:
    """Requests of any values of their types, against any family."""
    of = pipeline.config(rng.choice(("llama", "gemma2", "phi", "gpt_neox", "qwen2", "olmo2")))
    from prunus.anatomy import Anatomy

    floats = (None, 0.0, 0.3, 0.5, 0.999, 1.0, -0.1, 2.0, 1e-9, float("nan"), float("inf"), -float("inf"), 1e308)
    whole = (None, 0, 1, 2, 8, 24, 31, 32, -1, 2**31, 2**63, 10**30)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "x", "")
    words = (
        None,
        "none",
        "bias",
        "gain",
        "uniform",
        "global",
        "params",
        "flops",
        "kv-bytes",
        "prefill-ms",
        "candidates",
        "sequential",
        "dense",
    )
    one = lambda: rng.choice(words) if rng.random() < 0.9 else str(hostile(rng))[:300]  # noqa: E731
    asked = {"method": rng.choice(tuple(METHODS)), "ratio": 0.3}
    wrong = {
        "method": lambda: rng.choice(
            (*METHODS, "flap+wanda", "shortgpt+flap", "+", "", "flap+flap", str(hostile(rng))[:200])
        ),
        "ratio": lambda: rng.choice(floats),
        "pattern": lambda: rng.choice(
            (None, "2:4", "4:8", "0:0", "4:2", "2:4:8", "99999999999:4", ":", "-1:4", str(hostile(rng))[:50])
        ),
        "target": lambda: {rng.choice(sizes): rng.choice(whole[1:]) for _ in range(rng.randrange(3))},
        "uniform": lambda: True,
        "multiple_of": lambda: rng.choice(whole),
        "compensate": one,
        "options": lambda: {one() or "": one() or ""},
        "sparsity": lambda: rng.choice(floats),
        "split": lambda: tuple(rng.choice(floats[1:]) for _ in range(rng.choice((1, 2)))),
        "allocate": one,
        "cost": one,
        "order": one,
    }
    for name in rng.sample(list(wrong), rng.choice((1, 1, 2, 3))):
        asked[name] = wrong[name]()
    make_plan(of, Anatomy.of(of), planning.Request(**asked))


def _command(place: Path, rng: Random) -> None:
    words = arguments(place, rng)
    for name, made in (("model", pipeline.folder), ("run", training.finished)):
        if place / name in words:  # pages are written there
            shutil.copytree(made(), place / name)
    says(*words)


@functools.cache
def kinds() -> dict[str, Kind]:
    """All of them by name. What they name beside their own folders is made here, not in a process that is watched."""
    pipeline.text_file(), training.data(), training.finished()
    of_prunus = ("prunus.json", "keep.json", "ledger.json", "prunus/scores.safetensors")
    rows = [
        Kind("config", pipeline.folder, ("config.json", "config.json", "generation_config.json"), _model, 2),
        Kind("safetensors", pipeline.folder, ("model.safetensors",), _model, 2),
        Kind("index", _sharded, ("model.safetensors.index.json",), _model),
        Kind("gguf", _gguf, ("model.gguf",), _gguf_model, 1.5),
        Kind("tokenizer", pipeline.folder, TOKENIZER, _tokenizer, 1),
        Kind("prunus.json", _written, of_prunus, _manifest, 2),
        Kind("statistics", _written, ("prunus/statistics.safetensors",), _statistics, 0.5),
        Kind("manifest", training.data, ("manifest.json",), _prepared, 1),
        Kind("shards", training.data, ("*.bin", "tokenizer.json"), _prepared, 1),
        Kind("run", _run, ("*.json", "*.jsonl", "*.yaml"), _run_folder, 1),
        Kind("state", _run, ("checkpoints/*/state.json", "checkpoints/*/*.safetensors"), _state, 0.5),
        Kind("study-folder", _study_done, ("study.json", "records.jsonl", "proofs.json"), _study_folder, 1),
        Kind("teacher-cache", _taught, ("manifest.json",), _cache, 0.5),
        Kind("latency", _latency, ("latency.json",), _table, 0.5),
        Kind("records", _records, ("eval.jsonl",), _record, 0.5),
        Kind("recipe", _recipe, ("recipe.yaml", "recipe.yaml", "shipped.yaml"), _read_recipe, 2),
        Kind("tuning", _tuning, ("alpaca.yaml",), lambda place, rng: tuning.read(str(place / "alpaca.yaml")) and None, 0.5),
        Kind("study", _study, ("study.yaml",), _read_study, 2),
        Kind("text", _text, ("rows.jsonl", "rows.json", "plain.txt"), _read_text, 1),
        Kind("tasks", _tasks, ("*.jsonl",), _read_tasks, 1),
        Kind("plan", _nothing, (), _plan, 2, place=""),
        Kind("command", _nothing, (), _command, 2, place=""),
    ]
    return {row.name: row for row in rows}
