"""Instruction tuning by TRL's `SFTTrainer`: rows of instruction and answer, the loss on answers alone.

Training is TRL's; ours are the checks, the rows held out, the ledger, the record, and the proof of what comes out.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from .. import checkpoint, products, record
from ..api import positions
from ..data import text
from ..errors import UserError
from ..hf import quiet
from ..job import Progress, no_progress
from ..ledger import LEDGER, Ledger, Stage
from ..source import Source
from ..verification import check_saved, probe
from .recipe import change, load, sentence
from .strict import Strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TUNED = "tuned.json"
_FIELDS = ("instruction", "output")  # of a row; `input` may be there
_PROMPT = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)  # Stanford Alpaca's, for tokenizers that have no chat template


class Tuning(Strict):
    """The fields of a tuning recipe."""

    epochs: Annotated[float, Field(gt=0)]
    lr: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "linear", "constant"]
    warmup: Annotated[float, Field(ge=0, lt=1)]  # share of the updates
    weight_decay: Annotated[float, Field(ge=0)]
    batch: Annotated[int, Field(ge=1)]  # rows of an update
    micro_batch: Annotated[int, Field(ge=1)]  # rows that go through the model together
    max_length: Annotated[int, Field(ge=8)]  # tokens of a row; the rest is cut off
    precision: Literal["float32", "bfloat16-autocast"]
    held_out: Annotated[int, Field(ge=1)]  # the last rows, which give the loss before and after
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # NumPy, which transformers seeds too, takes no larger one


def shipped() -> dict[str, str]:
    """Recipes of the package: bare name -> YAML."""
    folder = resources.files("prunus") / "recipes" / "tuning"
    return {
        f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in sorted(folder.iterdir(), key=lambda f: f.name)
    }


def read(name: str, changes: Sequence[str] = ()) -> Tuning:
    """A recipe that ships or a .yaml file, with ``a=b`` changes on top; UserError names the field."""
    data = load(name, shipped())
    change(data, changes)
    try:
        return Tuning.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{name}: {sentence(error, data, Tuning)}") from error


def rows_of(path: Path) -> list[dict[str, str]]:
    """Rows of a .json or .jsonl file with `instruction`, `output` and perhaps `input`; UserError names the first that is none."""
    found = text.rows_of(path, "data")
    if not found:
        raise UserError(f"data: {path} has no rows; give a list of objects with {' and '.join(_FIELDS)}")
    for i, row in enumerate(found, 1):
        for name in _FIELDS:
            if not isinstance(row, dict) or not isinstance(row.get(name), str) or not row[name].strip():
                raise UserError(f"data: row {i} of {path} has no {name} with text in it; give it one, or leave the row out")
        if not isinstance(row.get("input", ""), str):
            raise UserError(f"data: the input of row {i} of {path} is {row['input']!r}; give text, or leave it out")
    return found


def asked(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row as TRL reads it: turns of a chat if the tokenizer has a template, else Alpaca's own prompt."""
    told = row.get("input", "").strip()
    if getattr(tokenizer, "chat_template", None):
        content = f"{row['instruction']}\n\n{told}" if told else row["instruction"]
        return {
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
    prompt = _PROMPT.format(
        instruction=row["instruction"],
        input=f"### Input:\n{told}\n\n" if told else "",
        with_input=", paired with an input that provides further context" if told else "",
    )
    return {"prompt": prompt, "completion": row["output"]}


def tune(
    source: Source,
    data: Path,
    recipe: Tuning,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = no_progress,
    to: Path | None = None,
) -> dict[str, Any]:
    """Tune a checkpoint and write it, proven in a clean process; `to` appends a run record.

    The chat template stays the source's. A run that is killed leaves nothing and starts anew: TRL's own checkpoints are pickles.
    """
    if find_spec("trl") is None:
        raise UserError("tune: trl is not installed; pip install 'prunus[tune]'")
    if (source.path / checkpoint.EXTRA / "mask.safetensors").is_file():
        raise UserError(
            "tune: single weights of this checkpoint are cut, and tuning would fill them again; use sparse-retrain first"
        )
    checkpoint.check_own(out, TUNED, "tune", overwrite=overwrite, needed_bytes=source.anatomy.weight_bytes(4))
    if to is not None:
        record.check_place(to)
    known = positions(source)
    if known is not None and recipe.max_length > known:
        raise UserError(
            f"max_length: {recipe.max_length} tokens are more than the {known} positions that {source.label} knows"
        )
    rows = rows_of(data)
    if len(rows) <= recipe.held_out:
        raise UserError(f"held_out: {recipe.held_out} of {len(rows)} rows leave none to learn from; hold fewer out")
    if recipe.batch % recipe.micro_batch:
        raise UserError(f"micro_batch: {recipe.micro_batch} does not divide batch, {recipe.batch}")
    tokenizer, start = source.tokenizer(), time.perf_counter()
    with checkpoint.staged(out, overwrite=overwrite) as stage:
        model, figures = _trained(source, tokenizer, rows, recipe, progress)
        checkpoint.write_folder(model, tokenizer, stage, lambda made, folder: made.save_pretrained(folder))
        spent = Stage(name="tune", params=source.anatomy.num_params, seed=recipe.seed)
        sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
        spent.consume_text(sha256, figures["tokens"])
        spent.spend("train", 3 * source.anatomy.flops(recipe.max_length) * figures["tokens"] // recipe.max_length)
        Ledger.after(source.path, source.label, [spent]).write(stage / LEDGER)
        figures |= {"seconds": time.perf_counter() - start, "verified": check_saved(stage, probe(model))}
        described = {
            "command": "tune", "source": source.label, "source_sha256": source.sha256, "data": data.name, "data_sha256": sha256,
            "rows": len(rows), "recipe": recipe.model_dump(),
        }  # fmt: skip
        made = described | {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": _versions(),
            "figures": figures,
        }
        (stage / TUNED).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if to is not None:
        record.append(to, "tune", described | {"trl": _versions()["trl"]}, figures)
    return {"out": str(out)} | made


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return record.versions() | {"trl": version("trl")}


@products.fast()
def _trained(
    source: Source, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], recipe: Tuning, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """(the model, figures): the loss of the rows held out before and after, every update's, tokens."""
    import torch

    with quiet(), tempfile.TemporaryDirectory() as work:
        from datasets import Dataset, disable_progress_bars
        from transformers import PrinterCallback, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        disable_progress_bars()
        here = Dataset.from_list([asked(row, tokenizer) for row in rows])
        cut = len(rows) - recipe.held_out
        updates = max(1, -(-cut // recipe.batch)) * recipe.epochs
        given = SFTConfig(
            output_dir=work, num_train_epochs=recipe.epochs, learning_rate=recipe.lr, lr_scheduler_type=recipe.schedule,
            warmup_steps=round(recipe.warmup * updates), weight_decay=recipe.weight_decay,
            per_device_train_batch_size=recipe.micro_batch, per_device_eval_batch_size=recipe.micro_batch,
            gradient_accumulation_steps=recipe.batch // recipe.micro_batch, max_length=recipe.max_length,
            completion_only_loss=True, packing=False, bf16=recipe.precision == "bfloat16-autocast", seed=recipe.seed,
            use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True,
            include_num_input_tokens_seen="non_padding", gradient_checkpointing=False,
        )  # fmt: skip
        losses: list[float] = []

        class Told(TrainerCallback):
            """Losses, and how far it is."""

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if logs and "loss" in logs:
                    losses.append(float(logs["loss"]))
                    progress("tune", state.global_step, state.max_steps)

        before = tokenizer.chat_template if hasattr(tokenizer, "chat_template") else None
        trainer: Any = SFTTrainer(
            model=source.load("float32"), args=given, processing_class=tokenizer,
            train_dataset=here.select(range(cut)), eval_dataset=here.select(range(cut, len(rows))), callbacks=[Told()],
        )  # fmt: skip
        fit = {
            name: len(found) for name, found in (("learn from", trainer.train_dataset), ("hold out", trainer.eval_dataset))
        }
        for what, count in fit.items():
            if not count:
                raise UserError(
                    f"max_length: no row to {what} has a token of its answer within {recipe.max_length} tokens; give more, or "
                    "shorter rows"
                )
        trainer.pop_callback(PrinterCallback)
        first = float(trainer.evaluate()["eval_loss"])
        trainer.train()
        last = float(trainer.evaluate()["eval_loss"])
    if before is not None:
        tokenizer.chat_template = before
    if not all(map(_finite, (*losses, last))):
        raise UserError(f"tune: the loss is no number after {len(losses)} updates; lower lr, {recipe.lr:g}")
    figures = {
        "updates": int(trainer.state.global_step), "tokens": int(trainer.state.num_input_tokens_seen),
        "rows": fit["learn from"], "held_out": fit["hold out"], "too_long": len(rows) - sum(fit.values()),
        "loss_before": first, "loss_after": last, "losses": losses, "params": source.anatomy.num_params,
    }  # fmt: skip
    # accelerate leaves an autocast around forward, in which the model would be something else than what is saved
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval(), figures


def _finite(value: float) -> bool:
    return abs(value) < float("inf")
