"""The base of everything that is read from YAML: no unknown field, no infinity, and nothing changes once it is read."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A table of fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
