"""A checkpoint in fewer bits through torchao: saved as transformers loads it, and proven in a clean process.

For accuracy, on any machine; what is fast on a processor is `prunus export --format onnx` (docs/quantization.md).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint, record
from .errors import UserError, VerificationError, unknown
from .hf import quiet
from .ledger import LEDGER, ledger_of
from .source import DTYPES, QUANTIZED, Source
from .tensorfiles import sort_metadata
from .verification import check_saved, probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 32  # weights of a row that share a scale, where a scheme asks for groups


def _8w8a(_: int) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _int8(_: int) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4(group: int) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    few: Any = torch.int4  # type: ignore[attr-defined]
    return IntxWeightOnlyConfig(weight_dtype=few, granularity=PerGroup(group))


@dataclass(frozen=True)
class Scheme:
    """One way to spend fewer bits."""

    does: str
    config: Callable[[int], Any]  # by group size
    grouped: bool = False


SCHEMES: Mapping[str, Scheme] = {
    "8w8a": Scheme("8-bit weights, a scale a row, and 8-bit activations, a scale a token", _8w8a),
    "int8": Scheme("8-bit weights, a scale a row", _int8),
    "int4": Scheme("4-bit weights, a scale a group of a row", _int4, grouped=True),
}


@dataclass(frozen=True)
class Plan:
    """What will be made; from the config alone."""

    source: Source
    scheme: str
    group_size: int | None
    dtype: str
    converted: tuple[str, ...]  # modules
    left: tuple[str, ...]  # modules of blocks whose rows no group fits

    @classmethod
    def of(cls, source: Source, scheme: str, group_size: int | None = None, dtype: str = "bfloat16") -> Plan:
        """UserError for a scheme that is none, groups that fit no row, or a library that is missing."""
        if scheme not in SCHEMES:
            raise unknown("scheme", scheme, SCHEMES)
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        if source.kind != "folder":
            raise UserError(f"quantize: {source.label} is no folder of safetensors; give one, such as prunus prune writes")
        if find_spec("torchao") is None:
            raise UserError("quantize: torchao is not installed; pip install 'prunus[quantize]'")
        grouped = SCHEMES[scheme].grouped
        if group_size is not None and not grouped:
            raise UserError(f"group_size: {scheme} has a scale a row and no groups; drop --group-size, or take int4")
        group = (GROUP if group_size is None else group_size) if grouped else None
        if group is not None and group < 2:
            raise UserError(f"group_size: {group} weights are no group; give at least 2, such as {GROUP}")
        source.anatomy.checked()
        if getattr(source.config, "stream_size", None):
            raise UserError(
                "quantize: its layers hand on a turned stream, whose matrices are not all linear modules; cut by another method"
            )
        rows = {
            name.removesuffix(".weight"): tensor.shape[-1]
            for name, tensor in source.anatomy.tensors.items()
            if tensor.layer is not None and tensor.is_matrix
        }
        fits = {name: group is None or size % group == 0 for name, size in rows.items()}
        if not any(fits.values()):
            sizes = sorted(set(rows.values()))
            best = max((g for g in (128, 64, 32, 16, 8, 4, 2) if any(size % g == 0 for size in sizes)), default=None)
            mend = f"give --group-size {best}" if best else "take int8, which has a scale a row"
            raise UserError(f"group_size: no row is a multiple of {group} (they have {', '.join(map(str, sizes))}); {mend}")
        converted = tuple(name for name, fit in fits.items() if fit)
        return cls(source, scheme, group, dtype, converted, tuple(name for name, fit in fits.items() if not fit))

    @property
    def notes(self) -> list[str]:
        """What a user should know of the outcome."""
        out = []
        if self.left:
            out.append(
                f"{len(self.left)} of {len(self.left) + len(self.converted)} matrices have rows that are no multiple of "
                f"{self.group_size} and stay {self.dtype} ({self.left[0]} and others); cut with --multiple-of {self.group_size}"
            )
        if self.scheme == "int4":
            out.append(
                "4-bit weights are kept a byte each here: what they do to scores is real, the size of the file is not"
            )
        out.append("embedding and head stay as they are; for speed on a processor write ONNX: prunus export --format onnx")
        return out


def quantize(plan: Plan, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the folder and prove it; VerificationError leaves nothing behind."""
    checkpoint.check_own(out, QUANTIZED, "quantize", overwrite=overwrite, needed_bytes=plan.source.anatomy.weight_bytes(2))
    tokenizer = plan.source.tokenizer()
    for _ in plan.source.stored(plan.dtype).values():
        pass  # each is checked as it is read: few bits would make an ordinary number of what is none
    with checkpoint.staged(out, overwrite=overwrite) as stage:
        model = _converted(plan)
        try:
            checkpoint.write_folder(model, tokenizer, stage, _save)
            if (told := ledger_of(plan.source.path)) is not None:
                shutil.copyfile(told, stage / LEDGER)
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error}") from error
        verified = check_saved(stage, probe(model))
        size = sum(file.stat().st_size for file in stage.glob("*.safetensors"))
        made = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "source": {"name": plan.source.label, "sha256": plan.source.sha256},
            "scheme": plan.scheme, "group_size": plan.group_size, "dtype": plan.dtype,
            "matrices": len(plan.converted), "left": list(plan.left), "bytes": size,
            "verified": verified, "versions": record.versions(), "notes": plan.notes,
        }  # fmt: skip
        (stage / QUANTIZED).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    before = sum(os.path.getsize(file) for file in plan.source.weight_files)
    return {"out": str(out), "bytes_before": before} | made


def _converted(plan: Plan) -> PreTrainedModel:
    """The model with its blocks' matrices in few bits; everything else in the plan's dtype."""
    keep = [f"{plan.source.anatomy.family.head}", *plan.left]
    with quiet():  # importing them, too, which imports torchao
        from transformers import AutoModelForCausalLM, TorchAoConfig

        config = TorchAoConfig(SCHEMES[plan.scheme].config(plan.group_size or GROUP), modules_to_not_convert=keep)
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(plan.source.path), config=plan.source.config, dtype=DTYPES[plan.dtype], quantization_config=config,
            local_files_only=True, trust_remote_code=False, use_safetensors=True,
        )  # fmt: skip
    few = {name for name, module in model.named_modules() if _is_few(getattr(module, "weight", None))}
    if few != set(plan.converted):
        wrong = sorted(few ^ set(plan.converted))[0]
        raise VerificationError(f"quantize: torchao did otherwise than planned with {wrong}; nothing was written")
    return model.eval()


def _is_few(weight: Any) -> bool:
    """Whether torchao made something of its own of a weight."""
    return weight is not None and type(getattr(weight, "data", weight)).__module__.startswith("torchao")


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        sort_metadata(path)
