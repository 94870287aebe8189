"""A model card from what is on record: source, method, tokens, results with errors, licence. Nothing in it is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from .. import checkpoint, record
from ..errors import UserError
from ..families import PRUNED_PREFIX
from ..ledger import LEDGER, Ledger
from ..place import staged_files
from ..reading import bytes_of, yaml_of
from ..source import Source
from ..train.listing import Finished, finished

NAME = "README.md"
_MARK = "made_with: prunus"  # in the head of a card that we wrote, and may write anew
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class Given:
    """What records do not say."""

    records: tuple[Path, ...] = ()  # of `prunus eval`
    base: str | None = None  # the source's public name
    licence: str | None = None


def write(folder: Path, given: Given, *, overwrite: bool = False) -> dict[str, Any]:
    """README.md of a checkpoint or of a run's model; UserError rather than another's card replaced unasked."""
    run, model = (folder, folder / "model") if (folder / "record.jsonl").is_file() else (None, folder)
    source = Source.open(str(model))
    if source.kind != "folder":
        raise UserError(f"card: {folder} is no folder with a model")
    out = model / NAME
    if out.exists() and not overwrite and _MARK not in out.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{out} is not a card that prunus wrote; use --overwrite to replace it")
    told = _told(source, run, given)
    text = _environment().get_template("card.md.j2").render(told)
    with staged_files(out) as (stage,):
        stage.write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")
    return {"out": str(out), "results": len(told["texts"]) + len(told["tasks"]), "licence": told["licence"]}


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    found = jinja2.Environment(loader=loader, autoescape=False, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    found.filters |= {"plain": plain, "code": code, "grouped": lambda value: f"{value:,}"}
    return found


def plain(text: Any) -> str:
    """Text that can begin no table cell, code, heading, link or tag of its own; on one line."""
    return re.sub(r"[\\`*_|<>\[\]#]", lambda found: f"&#{ord(found[0])};", " ".join(str(text).split()))


def code(text: Any) -> str:
    """Text between backticks, where no entity is read: what would end it, or a table's cell, is another sign."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "/")


def _told(source: Source, run: Path | None, given: Given) -> dict[str, Any]:
    manifest = checkpoint.read_manifest(source.path) if (source.path / checkpoint.MANIFEST).is_file() else None
    trained = finished(run) if run is not None else None
    licence, licence_sentence = _licence(source, given)
    base = given.base or (manifest.source["name"] if manifest is not None else None)
    texts, tasks = _results(given.records, source.sha256)
    if manifest is not None:
        before = manifest.before["params"]
    else:
        before = None if trained is None or trained.figures.pruning is None else trained.figures.pruning.source_params
    head = {
        "license": licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "prunus"],
    }
    head |= {"base_model": given.base} if given.base else {}
    ledger = _ledger(source.path if run is None else run)
    return {
        "head": yaml.safe_dump({k: v for k, v in head.items() if v}, sort_keys=False) + f"{_MARK}\n",
        "title": source.path.resolve().name if run is None else run.resolve().name,
        "params": source.anatomy.num_params,
        "source_params": before,
        "base": base,
        "made": _by_manifest(manifest) if manifest is not None else _by_run(trained),
        "stages": _stages(ledger),
        "parent_unknown": ledger is not None,
        "texts": texts,
        "tasks": tasks,
        "remote": source.config.model_type.startswith(PRUNED_PREFIX),
        "licence": licence,
        "licence_sentence": licence_sentence,
        "sha256": source.sha256,
        "versions": ", ".join(
            f"{name} {version}" for name, version in record.versions().items() if version != "not installed"
        ),
    }


def _by_manifest(manifest: checkpoint.Manifest) -> dict[str, Any]:
    method = manifest.method
    request = ", ".join(f"{name} {value}" for name, value in method.get("request", {}).items() if name != "method")
    ratios = ", ".join(f"{value:.1%} {name.replace('_', ' ')}" for name, value in manifest.ratios.items())
    return {
        "sentence": f"{method['name']} ({method.get('citation', 'no citation')}), asked for {request or 'its defaults'}: {ratios}.",
        "rows": [_row(name, manifest.before["shape"], manifest.after["shape"]) for name in _SIZES],
        "deviations": list(method.get("deviations", ())),
        "calibration": manifest.calibration,
    }


def _by_run(trained: Finished | None) -> dict[str, Any] | None:
    if trained is None:
        return None
    cut = trained.figures.pruning
    sentence = f"Trained by the recipe {trained.recipe.recipe.name} ({trained.recipe_hash})"
    sentence += f" on {trained.figures.tokens:,} tokens"
    sentence += f", cut from {cut.source_params:,} parameters on the way" if cut else ""
    return {"sentence": f"{sentence}.", "rows": [], "deviations": [], "calibration": None}


def _row(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str, str]:
    return (name, _size(before.get(name)), _size(after.get(name)))


def _size(value: Any) -> str:
    if isinstance(value, list):
        return f"{min(value)} to {max(value)}"
    return "none" if value is None else f"{value}"


def _ledger(folder: Path) -> Ledger | None:
    there = any((folder / place / LEDGER).is_file() for place in (".", "prunus"))
    return Ledger.read(folder) if there else None


def _stages(ledger: Ledger | None) -> list[dict[str, Any]]:
    if ledger is None:
        return []
    return [
        {
            "name": stage.name, "tokens": stage.tokens, "flops": f"{sum(stage.flops.values()):.3g}",
            "data": ", ".join(stage.data) if stage.data else "",
        }
        for stage in ledger.stages
    ]  # fmt: skip


def _results(paths: Sequence[Path], sha256: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Texts and tasks of `prunus eval` records of these very weights; the last one of each counts."""
    texts: dict[str, dict[str, Any]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"card: {path}: no such file or folder; records come from prunus eval --record")
        rows = [row for row in record.read(path) if row.get("kind") == "eval" and isinstance(row.get("figures"), dict)]
        own = [row for row in rows if row["figures"].get("weights_sha256") == sha256]
        if not own:
            raise UserError(f"card: {path} has no record of prunus eval on these weights ({sha256[:16]})")
        try:
            _add_(texts, tasks, own)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(f"card: {path} is no record of prunus eval ({type(error).__name__}: {error})") from error
    return list(texts.values()), list(tasks.values())


def _add_(texts: dict[str, dict[str, Any]], tasks: dict[str, dict[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Changes `texts` and `tasks`: what the rows say of them."""
    for row in rows:
        for text in row["figures"].get("texts", ()):
            drawn = text["text"]
            value = "above e^700" if text["perplexity"] is None else f"{text['perplexity']:.4g}"
            key = f"{drawn['sha256']} {row['recipe']['dtype']}"
            texts[key] = {
                "text": drawn["source"], "windows": f"{drawn['windows']} x {drawn['seq_len']}", "perplexity": value,
                "bits": f"{text['bits_per_byte']:.4f}", "dtype": row["recipe"]["dtype"],
            }  # fmt: skip
        for name, task in row["figures"].get("tasks", {}).items():
            for metric in (m for m in task if m != "metric"):
                tasks[f"{name} {metric}"] = _score(name, metric, task[metric])
        for name, mean in row["figures"].get("means", {}).items():
            tasks[f"mean {name}"] = _score(f"mean of {name}", "", mean)


def _score(name: str, metric: str, found: Mapping[str, Any]) -> dict[str, Any]:
    shown = f"{100 * found['mean']:.1f} ± {100 * found['error']:.1f}"
    return {"name": name, "metric": metric, "score": shown, "items": f"{found['items']:,}"}


def _licence(source: Source, given: Given) -> tuple[str | None, str]:
    """The identifier and a sentence; of a card that is there, its own is carried over."""
    if given.licence:
        return given.licence, f"{given.licence}, carried over from the source."
    card = source.path / NAME
    head = re.match(r"---\n(.*?)\n---", bytes_of(card).decode("utf-8", "replace"), re.S) if card.is_file() else None
    try:
        told = yaml_of(head[1], str(card)) if head else None
    except UserError:  # a card that another program wrote may say its licence in its own way
        told = None
    known = told.get("license") if isinstance(told, dict) else None
    if isinstance(known, str):
        return known, f"{known}, carried over from the source."
    return None, "The source's licence is not on record here; it binds this model as it binds the source."
