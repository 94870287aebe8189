"""`prunus.json`: where a checkpoint came from, what was done to it, and what it computes; read as strictly as it is written."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from .errors import UserError
from .reading import first_wrong, json_of

MANIFEST = "prunus.json"
FORMAT: Literal[1] = 1
_MOST_GENERATED = 64  # tokens; four times what we write
_Count = Annotated[int, Field(ge=0, lt=10**30)]
_Figure = Annotated[float, Field(allow_inf_nan=False)]


class Fingerprint(BaseModel):
    """`verification.Probe.to_json`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    ids: list[list[int]]
    generated: Annotated[list[int], Field(max_length=_MOST_GENERATED)]
    dtype: Literal["float32", "bfloat16", "float16"]
    logsumexp: list[list[_Figure]]
    top_ids: list[list[list[int]]]
    top_logits: list[list[list[_Figure]]]

    @model_validator(mode="after")
    def _shapes(self) -> Fingerprint:
        """Of every sequence as many tokens, and of every token as many numbers, as of the first."""
        rows, length = len(self.ids), len(self.ids[0]) if self.ids else 0
        told = [{len(row) for row in table} for table in (self.ids, self.logsumexp, self.top_ids, self.top_logits)]
        depth = {len(cell) for table in (self.top_ids, self.top_logits) for row in table for cell in row}
        if not length or any(found != {length} for found in told) or len(depth) != 1 or 0 in depth:
            raise ValueError("its tables are not of one shape")
        if any(len(table) != rows for table in (self.logsumexp, self.top_ids, self.top_logits)):
            raise ValueError("its tables are not of one length")
        if min(min(row) for row in [*self.ids, *itertools.chain(*self.top_ids)]) < 0:
            raise ValueError("its tokens are not all 0 or more")
        return self


class Side(BaseModel):
    """Sizes and counts of a model before or after."""

    model_config = ConfigDict(extra="allow", strict=True)
    shape: dict[str, int | list[int] | bool | None]
    params: _Count
    block_params: _Count
    flops: _Count
    weight_bytes: _Count
    kv_bytes_per_token: _Count


class After(Side):
    """Of a model that was cut."""

    model_type: str


class Named(BaseModel):
    """The model that was cut."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str


class Part(BaseModel):
    """A method and what was asked of it; of a combination, also of each part."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str
    citation: str
    deviations: list[str]
    compensator: str
    request: dict[str, Any]
    block_params: dict[Literal["before", "after"], _Count] = {}
    parts: list[Part] = []


class Calibration(BaseModel):
    """The windows that a cut went by."""

    model_config = ConfigDict(extra="allow", strict=True)
    source: str
    windows: _Count
    seq_len: _Count
    sha256: str


class Proof(BaseModel):
    """What a clean process said of the saved model."""

    model_config = ConfigDict(extra="allow", strict=True)
    max_logit_difference: _Figure
    streamed: bool = False


class Manifest(BaseModel):
    """prunus.json: where a checkpoint came from, what was done to it, and what it computes."""

    model_config = ConfigDict(extra="forbid")
    format: Literal[1]
    created: str
    versions: dict[str, str]
    commit: str | None
    source: dict[str, Any]
    method: dict[str, Any]
    calibration: dict[str, Any] | None
    before: dict[str, Any]
    after: dict[str, Any]
    ratios: dict[str, _Figure]
    notes: list[str]
    seconds: dict[str, _Figure]
    weights_sha256: str
    fingerprint: dict[str, Any]
    verified: dict[str, Any]

    @field_validator("source", "before", "after", "method", "calibration", "verified", "fingerprint")
    @classmethod
    def _check(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        try:
            if value is not None:
                _TABLES[str(info.field_name)].model_validate(value)
            return value
        except ValidationError as error:
            raise ValueError(first_wrong(error, "")) from None


_TABLES: dict[str, type[BaseModel]] = {
    "source": Named, "before": Side, "after": After,
    "method": Part, "calibration": Calibration, "verified": Proof, "fingerprint": Fingerprint,
}  # fmt: skip


def read_manifest(folder: Path) -> Manifest:
    """prunus.json of a folder; UserError if it is missing or not what we write."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: no {MANIFEST} here; this is not a checkpoint that prunus wrote")
    try:
        return Manifest.model_validate(json_of(path))
    except ValidationError as error:
        raise UserError(f"{path}: {first_wrong(error, 'the file')}") from error
