"""Recipes: strict YAML for one run, checked before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ..errors import UserError, nearest
from ..record import digest
from .schedule import Schedule
from .shrink.part import PrunePart
from .strict import Strict

_SUFFIXES = (".yaml", ".yml")


NO_TOKENIZER = "a shape brings no tokenizer; give tokenizer, a folder that has one"


class ModelPart(Strict):
    """What is trained: a checkpoint to go on from, or a shape with fresh weights."""

    source: str | None = Field(None, description="folder, GGUF file or hub name to go on from; its tokenizer is the run's")
    shape: str | dict[str, Any] | None = Field(
        default=None,
        description="fresh weights of this shape: a name, config fields, or the folder of a checkpoint or finished run",
    )
    target_params: int | None = Field(
        default=None, ge=1, description="the shape's heads, stem and FFN scaled to so many parameters, within 1 %"
    )
    enlarge: float | None = Field(
        default=None,
        gt=1,
        description="the shape's FFN so many times as wide; prune brings it back unless it names a target",
    )
    tokenizer: str | None = Field(default=None, description="folder of the tokenizer, where no checkpoint brings one")
    init: Literal["standard", "depth-scaled"] = Field(default="standard", description="how fresh weights are drawn")
    mask: str | None = Field(default=None, description="a sparse checkpoint whose zeros stay zero (its mask is used)")

    @model_validator(mode="after")
    def _one(self) -> ModelPart:
        if (self.source is None) == (self.shape is None):
            raise ValueError("give either source (weights to go on from) or shape (fresh weights)")
        if self.target_params is not None and self.shape is None:
            raise ValueError("target_params scales a shape; a source's weights have their sizes")
        if self.enlarge is not None and self.shape is None:
            raise ValueError("enlarge widens a shape; a source's weights have their sizes")
        if isinstance(self.shape, dict) and self.tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        return self


class DomainPart(Strict):
    """One source of tokens."""

    folder: str = Field(description="what `prunus data prepare` wrote")
    name: str | None = None
    weight: float = Field(default=1.0, gt=0)


class MixingPart(Strict):
    """Dynamic batch loading (Sheared LLaMA): at every validation, domains furthest above their reference loss get more."""

    references: dict[str, float] = Field(description="domain -> the loss that it should reach")
    temperature: float = Field(default=1.0, gt=0)
    floor: float = Field(default=0.001, ge=0, lt=1, description="no domain's share falls below it")


class DataPart(Strict):
    """Which tokens, in which order."""

    domains: list[DomainPart] = Field(min_length=1)
    range: str = Field(default="retrain", description="parent, retrain or validation")
    seq_len: int = Field(default=256, ge=2)
    seed: int = 0
    epochs: int = Field(default=1, ge=1, description="how often the data may be repeated")
    mixing: MixingPart | None = None
    separate_documents: bool = Field(default=False, description="no token sees the document before its own")
    evaluation: list[str] = Field(default=[], description="texts that training text must not contain (13-gram check)")


class OptimizerPart(Strict):
    """AdamW; matrices decay, norms and biases do not."""

    lr: float | Literal["sweep"] = Field(default=3e-4, description="peak rate, or sweep")
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest norm of all gradients together")

    @model_validator(mode="after")
    def _positive(self) -> OptimizerPart:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must both lie in [0, 1)")
        if self.lr != "sweep" and not 0 < self.lr < 1:
            raise ValueError(f"lr {self.lr} is no learning rate; give a number in (0, 1), or sweep")
        return self


class SchedulePart(Strict):
    """The rate against tokens."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the curve")
    floor: float = Field(default=0.1, ge=0, le=1, description="share of the peak at the end")
    decay: float = Field(default=0.2, gt=0, le=1, description="of wsd: share of the curve in which the rate falls")
    start: int = Field(default=0, ge=0, description="tokens of the curve that earlier stages used")
    total: int | None = Field(default=None, description="tokens of the whole curve; default: start + tokens")


class TeacherPart(Strict):
    """Distillation: temperature^2 * KL(parent || model) of the next token, mixed with cross-entropy."""

    source: str | None = Field(
        default=None,
        description="folder, GGUF file or hub name of the parent; with cache only compared, and may be left out",
    )
    mix: float = Field(default=1.0, ge=0, le=1, description="share of the KL; the rest is cross-entropy")
    temperature: float = Field(default=1.0, gt=0, description="both models' logits are divided by it")
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="KL over the parent's so many likeliest tokens and all others as one; default: over all",
    )
    cache: str | None = Field(
        default=None, description="what `prunus teach` wrote: the parent's weights are not read; needs top_k"
    )
    snapshot: bool = Field(default=False, description="of prune: what teaches is the model itself, as it was before a cut")

    @model_validator(mode="after")
    def _somewhere(self) -> TeacherPart:
        if self.snapshot != (self.source is None and self.cache is None):
            raise ValueError(
                "give source, the parent that teaches, cache, what prunus teach wrote of it, or else snapshot alone"
            )
        if self.cache is not None and self.top_k is None:
            raise ValueError("a cache holds likeliest tokens only; give top_k, the number that it was written with")
        return self


class LoraPart(Strict):
    """Low-rank adapters on every matrix of the blocks; all else is frozen."""

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)


class SavePart(Strict):
    """Checkpoints and measurements, every so many steps (0: only at the end)."""

    every: int = Field(default=100, ge=0)
    keep: int = Field(default=2, ge=1, description="last checkpoints that stay; the best stays besides")


class ValidatePart(Strict):
    """Loss on the validation range."""

    every: int = Field(default=100, ge=0)
    sequences: int = Field(default=64, ge=1)


class Recipe(Strict):
    """One training run."""

    name: str = "run"
    model: ModelPart
    data: DataPart
    tokens: int = Field(gt=0, description="budget: tokens to predict")
    batch_tokens: int = Field(default=8192, gt=0, description="tokens of one update")
    micro_batch: int = Field(default=8, ge=1, description="sequences that go through the model together")
    seed: int = Field(default=0, description="of fresh weights")
    precision: Literal["float32", "bfloat16-autocast", "bfloat16"] = "float32"
    compile: bool = Field(default=False, description="torch.compile the decoder: faster steps, minutes to start")
    checkpoint_activations: bool = False
    optimizer: OptimizerPart = Field(default_factory=OptimizerPart)
    schedule: SchedulePart = Field(default_factory=SchedulePart)
    teacher: TeacherPart | None = None
    lora: LoraPart | None = None
    prune: PrunePart | None = None
    save: SavePart = Field(default_factory=SavePart)
    validate_: ValidatePart = Field(default_factory=ValidatePart, alias="validate")
    log_every: int = Field(default=10, ge=1)
    skip_spikes: float | None = Field(
        default=None, gt=1, description="skip updates whose loss is this many times the running mean"
    )

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.batch_tokens % self.data.seq_len:
            raise ValueError(f"batch_tokens {self.batch_tokens} is no multiple of data.seq_len {self.data.seq_len}")
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens {self.tokens:,} are fewer than one update of {self.batch_tokens:,}")
        if self.lora is not None and self.model.mask is not None:
            raise ValueError(
                "lora and model.mask exclude each other: merged adapters would fill the zeros; drop one of them"
            )
        if self.lora is not None and self.model.source is None:
            raise ValueError("lora adapts weights that are there; give model.source")
        if self.prune is not None and (self.lora is not None or self.model.mask is not None):
            other = "lora" if self.lora is not None else "model.mask"
            raise ValueError(f"prune and {other} exclude each other: units are cut with all their weights; drop one of them")
        if self.prune is not None and self.prune.target is None and self.model.enlarge is None:
            raise ValueError("prune.target is missing; only model.enlarge goes without, which names what to come back to")
        if self.prune is not None and self.compile and (self.prune.allocate == "adaptive" or self.prune.looks):
            what = "allocate: adaptive" if self.prune.allocate == "adaptive" else "repair or saliency.metric: obc"
            raise ValueError(
                f"prune.{what} looks at what blocks give and read, which compiled ones do not show; set compile false"
            )
        if self.prune is not None and self.prune.masks is not None and self.compile:
            raise ValueError("prune.masks act on what modules give, which compiled ones do not show; set compile false")
        if self.teacher is not None and self.teacher.snapshot and (self.prune is None or self.prune.masks is not None):
            raise ValueError(
                "teacher.snapshot is the model before a cut; give prune, without masks, or teacher.source instead of it"
            )
        if self.prune is not None and self.optimizer.lr == "sweep":
            raise ValueError("optimizer.lr: sweep tries rates on beginnings that prune would cut; name a rate")
        if self.data.mixing is not None and not self.validate_.every:
            raise ValueError("data.mixing goes by losses on the validation range; give validate.every")
        if self.data.mixing is not None and self.teacher is not None and self.teacher.cache is not None:
            raise ValueError(
                "teacher.cache is of an order of the data that is known beforehand, which data.mixing settles as it goes; drop one"
            )
        total = self.schedule.total
        if total is not None and total < self.schedule.start + self.tokens:
            raise ValueError(
                f"schedule.total {total:,} ends before the run does, at {self.schedule.start + self.tokens:,} tokens"
            )
        return self

    @property
    def sequences(self) -> int:
        """Sequences of one update."""
        return self.batch_tokens // self.data.seq_len

    @property
    def steps(self) -> int:
        """Updates; what the budget leaves over a whole number of them is not used."""
        return self.tokens // self.batch_tokens

    def rates(self, peak: float) -> Schedule:
        """The learning rate by tokens of the run."""
        asked = self.schedule
        total = asked.total or asked.start + self.steps * self.batch_tokens
        return Schedule(asked.kind, peak, total, asked.start, asked.warmup, asked.floor, asked.decay)

    def plain(self) -> dict[str, Any]:
        """As data, every field said."""
        return self.model_dump(mode="json", by_alias=True)

    def named(self) -> dict[str, Any]:
        """As `plain`, for records: what lies in folders is named by the folder alone, whose place is nobody else's business."""
        data = self.plain()
        for part, fields in (("model", ("source", "shape", "tokenizer", "mask")), ("teacher", ("source", "cache"))):
            for name in fields if data[part] else ():
                if isinstance(data[part][name], str):  # not the fields of a shape
                    data[part][name] = _last(data[part][name])
        for domain in data["data"]["domains"]:
            domain["folder"] = _last(domain["folder"])
        data["data"]["evaluation"] = [_last(text) for text in data["data"]["evaluation"]]
        return data

    @property
    def hash(self) -> str:
        """Same hash, same run."""
        return digest(self.plain())


def _last(place: str | None) -> str | None:
    """The last part of a path; a hub name stays whole."""
    return place if place is None or not Path(place).expanduser().exists() else Path(place).name


def schema() -> dict[str, Any]:
    """JSON schema of recipes."""
    return Recipe.model_json_schema(by_alias=True)


def shipped() -> dict[str, str]:
    """Recipes of the package: bare name -> YAML."""
    folder = resources.files("prunus") / "recipes"
    files = [f for f in folder.iterdir() if f.name.endswith(_SUFFIXES)]
    return {f.name.rsplit(".", 1)[0]: f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name)}


def read(name: str, changes: Sequence[str] = (), fields: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by its file or bare name, with ``a.b=c`` changes and ready values of `fields` (dotted names) on top.

    The field ``target_params`` is what the model is cut down to where the recipe prunes, else the size of its fresh weights.
    """
    return changed(_load(name), name, changes, fields)


def changed(data: dict[str, Any], where: str, changes: Sequence[str], fields: Mapping[str, Any] | None) -> Recipe:
    """As `read`, of plain data, which is changed."""
    for change in changes:
        key, equals, text = change.partition("=")
        if not (key and equals):
            raise UserError(f"--set: '{change}' is not NAME=VALUE")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set: the value of '{change}' is not YAML") from error
        _put(data, key, value)
    for key, value in (fields or {}).items():
        if key == "target_params":
            prunes = isinstance(data.get("prune"), dict)
            key, value = ("prune.target", {"params": value}) if prunes else ("model.target_params", value)
        _put(data, key, value)
    return parse(data, where)


def parse(data: Any, where: str) -> Recipe:
    """Check plain data; UserError names the field, the value and the mend."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error, data)}") from error


def _load(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    if path.suffix in _SUFFIXES:
        if not path.is_file():
            raise UserError(f"{name}: no such recipe file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: the recipe cannot be read: {error}") from error
    else:
        known = shipped()
        if name not in known:
            raise UserError(
                f"recipe '{name}' does not exist{nearest(name, known)}; known are {', '.join(known)}, or give a .yaml file"
            )
        text = known[name]
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{name}: not YAML{f' (line {mark.line + 1})' if mark else ''}") from error
    if not isinstance(data, dict):
        raise UserError(f"{name}: a recipe is a table of fields, not {type(data).__name__}")
    return data


def _put(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Changes `data`: the field at a dotted name; numbers are places in lists."""
    at: Any = data
    *parents, last = dotted.split(".")
    for part in parents:
        if isinstance(at, list):
            if not (part.isdigit() and int(part) < len(at)):
                raise UserError(f"--set: '{dotted}' names place {part} of a list of {len(at)}")
            at = at[int(part)]
        else:
            at = at.setdefault(part, {}) if isinstance(at, dict) else None
        if not isinstance(at, dict | list):
            raise UserError(f"--set: '{dotted}' goes through '{part}', which is no table")
    if isinstance(at, list):
        raise UserError(f"--set: '{dotted}' ends in a list; name a field of one of its places")
    at[last] = value


def _sentence(error: ValidationError, data: Any) -> str:
    """The first mistake in words, with the nearest known name for a field that does not exist."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        return f"field '{place}' does not exist{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"field '{place}' is missing"
    text = str(first["msg"]).removeprefix("Value error, ")
    if not place or first["type"] == "value_error":
        return f"{place + ': ' if place else ''}{text}"
    return f"field '{place}': {json.dumps(first['input'], default=str)[:80]} is wrong: {text[:1].lower() + text[1:]}"


def _fields_at(location: Sequence[Any]) -> list[str]:
    """Names of the fields of the table at a place."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        found = next((f for n, f in model.model_fields.items() if (f.alias or n) == part), None)
        if found is None:
            return []
        model = next((t for t in _types(found.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if model is None:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _types(annotation: Any) -> list[Any]:
    """A type and those inside it."""
    return [annotation, *(inner for arg in getattr(annotation, "__args__", ()) for inner in _types(arg))]
