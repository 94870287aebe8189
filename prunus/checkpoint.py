"""Files out: written to a temporary name, verified in a clean process, then moved into place. All of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from . import findings, modeling_pruned, record, saliency
from .anatomy import Anatomy
from .data.windows import Windows
from .errors import UserError, VerificationError
from .families import PRUNED_PREFIX
from .headers import safetensors_entries, safetensors_shapes, sha256
from .hf import quiet
from .job import Outcome
from .keep import Keep, WeightMask
from .ledger import LEDGER, Ledger, Stage
from .manifest import FORMAT, MANIFEST, Manifest, read_manifest
from .place import beside, clear_left, make_readable, swap
from .planning import Plan
from .reading import table_of
from .source import Source
from .tensorfiles import read, write
from .verification import NEW_TOKENS, NEW_TOKENS_STREAMED, check_fingerprint, check_saved, probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DECISION = "keep.json"
EXTRA = "prunus"  # sub-folder for what engines that glob *.safetensors must not see


def read_keep(folder: Path) -> Keep | None:
    """keep.json of a folder; None for a checkpoint whose decision is a mask and nothing else."""
    path = folder / DECISION
    data = table_of(path)
    return None if "mask" in data and "keep" not in data else Keep.from_json(data, str(path))


# -- where it goes ------------------------------------------------------------------------------------------------------


_SPARE_BYTES = 64e6  # what a checkpoint has besides weights, and what others write in the meantime


def check_destination(out: Path, *, overwrite: bool, needed_bytes: int) -> None:
    """UserError, before any work, if the folder exists, cannot be written, or will not fit."""
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise UserError(f"{out}: already exists; give another --out, or --overwrite to replace it")
        if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).exists()):
            raise UserError(f"{out}: is not a folder that prunus wrote, so --overwrite will not replace it")
    parent = standing(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{out}: no right to write in {parent}")
    free, needed = shutil.disk_usage(parent).free, needed_bytes * 1.02 + _SPARE_BYTES
    if free < needed:
        raise UserError(
            f"{out}: needs {needed / 1e6:,.0f} MB, some of them to spare, but {free / 1e6:,.0f} MB are free there; make room, "
            "or give another --out"
        )


def check_own(out: Path, marker: str, command: str, *, overwrite: bool, needed_bytes: int) -> None:
    """The same for a folder of another command, which is known by a file that it leaves there."""
    if not out.exists():
        check_destination(out, overwrite=False, needed_bytes=needed_bytes)
    elif not overwrite:
        raise UserError(f"{out}: already exists; give another --out, or --overwrite to replace it")
    elif not (out / marker).is_file():
        raise UserError(f"{out}: is not a folder that prunus {command} wrote, so --overwrite will not replace it")


def standing(path: Path) -> Path:
    """The nearest thing above `path` that exists."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextmanager
def staged(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and vanishes when it does not."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_left(out)
    stage = beside(out)
    try:
        stage.mkdir()
        yield stage
        for file in stage.rglob("*.safetensors"):
            make_readable(file)
        if out.exists() and not overwrite:
            raise UserError(f"{out}: appeared while prunus was working; nothing was written")
        swap(stage, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


# -- what goes there ----------------------------------------------------------------------------------------------------


def save(
    outcome: Outcome,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    calibration: Windows | None,
    overwrite: bool = False,
) -> Manifest:
    """Write a cut model and prove it; VerificationError leaves nothing behind."""
    with staged(out, overwrite=overwrite) as stage:
        try:
            write_folder(outcome.model, tokenizer, stage, outcome.store.save)
            _write_decision(outcome, source, calibration, stage)
            _ledger(outcome, source, calibration).write(stage / LEDGER)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{out}: cannot be written: {error}") from error
        streams = outcome.store.streams
        expected = probe(outcome.model, NEW_TOKENS_STREAMED if streams else NEW_TOKENS)
        verified = check_saved(stage, expected, _on_disk(outcome.target.anatomy) if streams else ())
        verified |= check_counts(stage, outcome.target.anatomy)
        manifest = _manifest(outcome, source, calibration, expected.to_json(), verified, _weights(stage))
        (stage / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return manifest


def write_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, save: Callable[[PreTrainedModel, Path], None]
) -> None:
    """Config and weights by `save`, the tokenizer, and for a type of ours the classes that load it without prunus."""
    with quiet():
        if is_per_layer(model.config.model_type):
            stem = type(model).__name__.removesuffix("ForCausalLM")
            model.config.auto_map = {
                "AutoConfig": f"modeling_pruned.{stem}Config",
                "AutoModelForCausalLM": f"modeling_pruned.{stem}ForCausalLM",
            }
            shutil.copyfile(modeling_pruned.__file__, folder / "modeling_pruned.py")
        save(model, folder)
        tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "backend"):
        data.pop(name, None)
    if data.get("tokenizer_class") == "TokenizersBackend":  # a name that only transformers 5 knows
        data["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _write_decision(outcome: Outcome, source: Source, calibration: Windows | None, stage: Path) -> None:
    decision: dict[str, Any] = {"format": FORMAT} if outcome.keep is None else outcome.keep.to_json()
    if outcome.mask is not None:
        (stage / EXTRA).mkdir(exist_ok=True)
        sizes = {name: -(-outcome.target.anatomy.tensors[name].numel // 8) for name in outcome.mask.kept}
        specs = {name: (torch.uint8, (size,)) for name, size in sizes.items()}
        write(stage / EXTRA / "mask.safetensors", specs, outcome.mask.packed())
        decision["mask"] = f"{EXTRA}/mask.safetensors"
    (stage / DECISION).write_text(json.dumps(decision, indent=1) + "\n", encoding="utf-8")
    if outcome.findings is not None and calibration is not None and outcome.findings.statistics:
        key = findings.key(source, calibration, outcome.model.dtype)
        findings.save(outcome.findings, stage / EXTRA / "statistics.safetensors", key)
    if outcome.scores is not None and (outcome.plan.parts or "scores" not in outcome.measured):
        saliency.save_scores(outcome.scores, stage / EXTRA)
    for name, measured in outcome.measured.items():
        (stage / EXTRA).mkdir(exist_ok=True)
        (stage / EXTRA / f"{name}.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def _ledger(outcome: Outcome, source: Source, calibration: Windows | None) -> Ledger:
    if outcome.ledger is not None:
        return outcome.ledger
    stage = Stage(name=outcome.plan.method.name, params=outcome.target.anatomy.num_params)
    if calibration is not None:
        stage.consume_text(calibration.sha256, calibration.num_tokens)
    stage.spend("scoring", outcome.flops)
    return Ledger.after(source.path, source.label, [stage])


def _manifest(
    outcome: Outcome,
    source: Source,
    calibration: Windows | None,
    fingerprint: dict[str, Any],
    verified: dict[str, Any],
    weights_sha256: str,
) -> Manifest:
    plan, width = outcome.plan, outcome.model.dtype.itemsize
    seq_len = calibration.seq_len if calibration else 1024

    def side(anatomy: Anatomy) -> dict[str, Any]:
        return {"shape": anatomy.shape.describe(), "flops_seq_len": seq_len, **anatomy.counts(seq_len, width)}

    return Manifest(
        format=FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=record.versions(),
        commit=record.commit(),
        source={"name": source.label, "kind": source.kind, "sha256": source.sha256},
        method=_described(plan) | ({"parts": _parts(outcome)} if plan.parts else {}),
        calibration=calibration.provenance() if calibration else None,
        before=side(plan.anatomy),
        after=side(outcome.target.anatomy) | {"model_type": outcome.target.config.model_type},
        ratios=outcome.ratios,
        notes=[*source.all_notes, *(plan.notes if plan.method.is_sparse else outcome.target.notes), *outcome.notes],
        seconds={k: round(v, 3) for k, v in outcome.seconds.items()},
        weights_sha256=weights_sha256,
        fingerprint=fingerprint,
        verified=verified,
    )


def _described(plan: Plan) -> dict[str, Any]:
    return {
        "name": plan.method.name,
        "citation": plan.method.citation,
        "deviations": list(plan.method.deviations),
        "compensator": plan.compensator,
        "options": dict(plan.options),
        "request": plan.request.describe(),
    }


def _parts(outcome: Outcome) -> list[dict[str, Any]]:
    """What each part of a combination was asked for, and the block parameters that it found and left."""
    parts = outcome.plan.parts
    left = [part.anatomy.block_params for part in parts] + [outcome.target.anatomy.block_params]
    return [
        _described(part) | {"block_params": {"before": before, "after": after}}
        for part, before, after in zip(parts, left[:-1], left[1:], strict=True)
    ]


def _on_disk(anatomy: Anatomy) -> tuple[str, ...]:
    """The modules that hold all large weights."""
    family = anatomy.family
    return (family.embedding, family.blocks, family.head)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, in order."""
    return sorted(folder.glob("*.safetensors"))


def _weights(folder: Path) -> str:
    return sha256(weight_files(folder))


def check_counts(folder: Path, anatomy: Anatomy) -> dict[str, Any]:
    """Tensors on disk against the anatomy's declaration: names, shapes and total; VerificationError if they differ."""
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        found |= safetensors_shapes(file)
    renamed = {saved: name for name, saved in anatomy.family.saved_as.items()}
    found = {renamed.get(name, name): shape for name, shape in found.items()}
    declared = {name: tensor.shape for name, tensor in anatomy.tensors.items()}
    if found != declared:
        odd = sorted(set(found.items()) ^ set(declared.items()))[0][0]
        raise VerificationError(f"{folder.name}: '{odd}' on disk is not what the plan's anatomy declares")
    return {"params_on_disk": anatomy.num_params}


# -- looking back -------------------------------------------------------------------------------------------------------


def verify(folder: Path) -> dict[str, Any]:
    """Check a folder against its own prunus.json: files unchanged, counts right, and it still computes the same."""
    manifest = read_manifest(folder)
    digest = _weights(folder)
    if digest != manifest.weights_sha256:
        raise VerificationError(f"{folder.name}: the weight files changed since prunus wrote them (SHA-256 differs)")
    source = Source.open(str(folder))
    counts = check_counts(folder, source.anatomy)
    if source.anatomy.num_params != manifest.after["params"]:
        raise VerificationError(
            f"{folder.name}: {source.anatomy.num_params:,} parameters, but prunus.json says {manifest.after['params']:,}"
        )
    if manifest.ratios.get("sparsity") is not None:
        counts |= _check_mask(folder, source, manifest.ratios["sparsity"])
    on_disk = _on_disk(source.anatomy) if manifest.verified.get("streamed") else ()
    return {"weights_sha256": digest, **counts, **check_fingerprint(folder, manifest.fingerprint, on_disk)}


def _check_mask(folder: Path, source: Source, sparsity: float) -> dict[str, Any]:
    """The mask has the recorded sparsity, and what lies outside it is zero; one matrix at a time."""
    path = folder / EXTRA / "mask.safetensors"
    if not path.is_file():
        raise VerificationError(f"{folder.name}: {EXTRA}/{path.name}, the mask that prunus.json speaks of, is missing")
    weights = {name: entry for file in weight_files(folder) for name, entry in safetensors_entries(file).items()}
    total = alive = 0
    alien = ""
    for name, entry in safetensors_entries(path).items():
        kept = WeightMask.from_packed({name: read(entry)}, source.anatomy).kept[name]
        total, alive = total + kept.numel(), alive + int(kept.sum())
        if not alien and name in weights and bool((read(weights[name])[~kept] != 0).any()):
            alien = name
    found = 1.0 - alive / total
    if abs(found - sparsity) > 1e-9:
        raise VerificationError(f"{folder.name}: the mask has sparsity {found}, but prunus.json says {sparsity}")
    if alien:
        raise VerificationError(f"{folder.name}: '{alien}' has weights outside its mask that are not zero")
    return {"sparsity": found}


def is_per_layer(model_type: str) -> bool:
    """Whether a type is one of ours, which stock engines cannot load."""
    return model_type.startswith(PRUNED_PREFIX)
