"""Recipes: strict YAML for one run, checked before any weight is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from ..errors import UserError, nearest
from ..reading import text_of, yaml_of
from ..record import digest
from .parts import DataPart, LoraPart, ModelPart, OptimizerPart, SavePart, SchedulePart, TeacherPart, ValidatePart
from .schedule import Schedule
from .shrink.part import PrunePart
from .strict import Strict

_SUFFIXES = (".yaml", ".yml")


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

    @model_validator(mode="before")
    @classmethod
    def _parent_teaches(cls, asked: Any) -> Any:
        """Of a recipe that prunes, a teacher that is not named is the model that is cut."""
        teacher, model = (asked.get(part) if isinstance(asked, dict) else None for part in ("teacher", "model"))
        named = isinstance(teacher, dict) and any(teacher.get(key) for key in ("source", "cache", "snapshot"))
        if isinstance(teacher, dict) and isinstance(model, dict) and not named and asked.get("prune"):
            return asked | {"teacher": teacher | {"source": model.get("source")}}
        return asked

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
        if self.prune is not None and self.optimizer.sweeps:
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

    @property
    def dtype(self) -> str:
        """Of weights."""
        return "bfloat16" if self.precision == "bfloat16" else "float32"

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
    return changed(load(name, shipped()), name, changes, fields)


def changed(data: dict[str, Any], where: str, changes: Sequence[str], fields: Mapping[str, Any] | None) -> Recipe:
    """As `read`, of plain data, which is changed."""
    change(data, changes)
    for key, value in (fields or {}).items():
        if key == "target_params":
            prunes = isinstance(data.get("prune"), dict)
            key, value = ("prune.target", {"params": value}) if prunes else ("model.target_params", value)
        put(data, key, value)
    return parse(data, where)


def change(data: dict[str, Any], changes: Sequence[str]) -> None:
    """Put ``a.b=c`` changes into plain data."""
    for one in changes:
        key, equals, text = one.partition("=")
        if not (key and equals):
            raise UserError(f"--set: '{one}' is not NAME=VALUE")
        put(data, key, yaml_of(text, f"--set: the value of '{one}'"))


def parse(data: Any, where: str) -> Recipe:
    """Check plain data; UserError names the field, the value and the mend."""
    if (large := _too_large(data)) is not None:
        raise UserError(f"{where}: {large[0]}: {str(large[1])[:40]} is more than 2^64; nothing here is counted so far")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {sentence(error, data)}") from error


def _too_large(data: Any, at: str = "") -> tuple[str, int] | None:
    """Field and value of the first whole number whose products no estimate could hold."""
    if isinstance(data, int) and abs(data) > 1 << 64:
        return at, data
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    found = (_too_large(value, f"{at}.{key}".removeprefix(".")) for key, value in parts)
    return next((one for one in found if one is not None), None)


def load(name: str, known: Mapping[str, str]) -> dict[str, Any]:
    """Plain data of a recipe file, or of one in `known`, bare name -> YAML."""
    path = Path(name).expanduser()
    if path.suffix in _SUFFIXES:
        if not os.path.isfile(path):  # also where a name is too long for any file
            raise UserError(f"{name}: no such recipe file")
        text = text_of(path)
    else:
        if name not in known:
            raise UserError(
                f"recipe '{name}' does not exist{nearest(name, known)}; known are {', '.join(known)}, or give a .yaml file"
            )
        text = known[name]
    data = yaml_of(text, name)
    if not isinstance(data, dict):
        raise UserError(f"{name}: a recipe is a table of fields, not {type(data).__name__}")
    return data


def put(data: dict[str, Any], dotted: str, value: Any) -> None:
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


def sentence(error: ValidationError, data: Any, model: type[BaseModel] | None = None) -> str:
    """The first mistake in words, with the nearest known name for a field of `model` (a recipe) that does not exist."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1], model or Recipe)
        return f"field '{place}' does not exist{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"field '{place}' is missing"
    text = str(first["msg"]).removeprefix("Value error, ")
    if not place or first["type"] == "value_error":
        return f"{place + ': ' if place else ''}{text}"
    return f"field '{place}': {json.dumps(first['input'], default=str)[:80]} is wrong: {text[:1].lower() + text[1:]}"


def _fields_at(location: Sequence[Any], model: Any) -> list[str]:
    """Names of the fields of the table at a place."""
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
