"""Milliseconds of a *shape* on this machine, from a table of parts that are each measured once, on random weights.

A part is one layer of given sizes, or all that is not a layer (embedding, final norm, head, the loop itself). A model's
time is the sum of its parts, batch 1: `prefill_ms` of one prompt, `decode_ms` of one more token behind it. The table lies in
the user's cache folder, under a key that names all that a time depends on besides the sizes.
"""

from __future__ import annotations

import json
import os
import statistics as st
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import hf, record
from .anatomy import Anatomy
from .errors import UserError
from .keep import Keep
from .place import staged_files
from .reading import json_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PROMPT_TOKENS = 256
FORMAT = 1
_REPEATS, _DECODED = 3, 8  # prefills, and tokens after them, that a part's median is taken over
_COLD_BYTES = 256 << 20  # copies of a layer make up this much: fewer would stay in the processor's cache while decoding
_COPIES = (2, 32)

Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a part or of a whole model."""

    prefill_ms: float
    decode_ms: float

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.prefill_ms + other.prefill_ms, self.decode_ms + other.decode_ms)

    def __mul__(self, count: int) -> Timing:
        return Timing(self.prefill_ms * count, self.decode_ms * count)


def prompt_tokens(positions: int | None) -> int:
    """The prompt that is timed: shorter for a model that knows fewer positions."""
    return PROMPT_TOKENS if positions is None else max(1, min(PROMPT_TOKENS, positions - _DECODED - 1))


# -- parts: pure ----------------------------------------------------------------------------------------------------------


def layer_part(anatomy: Anatomy, layer: int) -> str:
    """The name of one layer's entry: family, sizes, and the flags that add parameters."""
    s, own = anatomy.shape, anatomy.shape.layers[layer]
    sizes = f"hidden={s.hidden_size} head_dim={s.head_dim} heads={own.num_attention_heads}/{own.num_key_value_heads}"
    flags = "".join(f" {flag}" for flag in sorted(anatomy.flags))
    flags += " ragged" if own.kv_index is not None else ""  # keys and values are gathered, whatever the map
    return f"{anatomy.family.name} layer {sizes} intermediate={own.intermediate_size}{flags}"


def outer_part(anatomy: Anatomy) -> str:
    """The name of the entry for all that is not a layer. A tied head is multiplied like an untied one."""
    return f"{anatomy.family.name} outer hidden={anatomy.shape.hidden_size} vocab={anatomy.shape.vocab_size}"


def parts(anatomy: Anatomy) -> Counter[str]:
    """Part -> how often the model runs it."""
    return Counter([outer_part(anatomy), *(layer_part(anatomy, i) for i in range(anatomy.shape.num_hidden_layers))])


def estimate(anatomy: Anatomy, entries: Mapping[str, Timing]) -> Timing | None:
    """The sum of the model's parts; None if the table lacks one."""
    needed = parts(anatomy)
    if not needed.keys() <= entries.keys():
        return None
    return sum((entries[part] * count for part, count in needed.items()), Timing(0.0, 0.0))


def missing_layers(anatomy: Anatomy, entries: Mapping[str, Timing]) -> list[int]:
    """One layer for every size that the table lacks; the first layer if only the outer part is missing."""
    first: dict[str, int] = {}
    for i in range(anatomy.shape.num_hidden_layers):
        first.setdefault(layer_part(anatomy, i), i)
    lacking = [i for part, i in first.items() if part not in entries]
    return lacking or ([] if outer_part(anatomy) in entries else [0])


# -- the table ------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """PRUNUS_CACHE, or `prunus` in the folder that the system keeps for caches of a user."""
    if own := os.environ.get("PRUNUS_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "prunus"


def key(dtype: str, prompt_tokens: int = PROMPT_TOKENS) -> dict[str, Any]:
    """What a part's time depends on besides its sizes."""
    machine, versions = record.machine(), record.versions()
    return {
        "cpu": machine["cpu"],
        "threads": machine["threads"],
        "device": machine["device"],
        "dtype": dtype,
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "prompt_tokens": prompt_tokens,
    }


@dataclass(frozen=True)
class Table:
    """The entries under one key of the file at `path`."""

    path: Path
    key: Mapping[str, Any]
    entries: dict[str, Timing]

    @classmethod
    def open(cls, key: Mapping[str, Any], path: Path | None = None) -> Table:
        """Read the file; empty if there is none or nothing under this key, UserError if it is not what we write."""
        path = path or cache_folder() / "latency.json"
        return cls(path, key, _entries(_read(path), key, path))

    @classmethod
    def only(cls, path: Path) -> Table | None:
        """The one table of a file, whatever machine it is of; None if there is no file."""
        found = list(_read(path)["tables"].values())
        if len(found) != 1:
            return None
        return cls(path, found[0]["key"], _entries(_read(path), found[0]["key"], path))

    def saved(self, more: Mapping[str, Timing]) -> Table:
        """The table with `more`, written to the file: beside it first, then into place, other keys as they stand there."""
        data = _read(self.path)
        entries = {**_entries(data, self.key, self.path), **self.entries, **more}
        told = {part: asdict(timing) for part, timing in sorted(entries.items())}
        data["tables"][record.digest(dict(self.key))] = {"key": dict(self.key), "entries": told}
        with staged_files(self.path) as (stage,):
            stage.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return replace(self, entries=entries)


_PARTS = ("key", "entries")  # of a table


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"format": FORMAT, "tables": {}}
    data = json_of(path, "delete it")
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("tables"), dict):
        raise UserError(f"{path}: not a latency table of format {FORMAT}; delete it")
    parts = [table.get(part) if isinstance(table, dict) else None for table in data["tables"].values() for part in _PARTS]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: the latency table has a part without {' and '.join(_PARTS)}; delete it")
    return data


def _entries(data: Mapping[str, Any], key: Mapping[str, Any], path: Path) -> dict[str, Timing]:
    found = data["tables"].get(record.digest(dict(key)))
    try:
        return {} if found is None else {part: Timing(**timing) for part, timing in found["entries"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: the latency table holds an entry that is none; delete it") from error


def filled(
    table: Table,
    config: PreTrainedConfig,
    anatomy: Anatomy,
    *,
    probe: Callable[..., tuple[Timing, Timing]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """The table with every part of this model; what is lacking is measured (by `probe`) and written at once."""
    todo = missing_layers(anatomy, table.entries)
    for done, layer in enumerate(todo):
        progress(done, len(todo))
        own, outer = (probe or measured)(config, anatomy, layer, table.key["dtype"], table.key["prompt_tokens"])
        more = {layer_part(anatomy, layer): own}
        if outer_part(anatomy) not in table.entries:
            more[outer_part(anatomy)] = outer
        table = table.saved(more)
        progress(done + 1, len(todo))
    return table


# -- measuring ------------------------------------------------------------------------------------------------------------


def measured(
    config: PreTrainedConfig, anatomy: Anatomy, layer: int, dtype: str, prompt_tokens: int
) -> tuple[Timing, Timing]:
    """(one layer, all that is not a layer) of a model made of copies of one layer, with random weights."""
    own = [t.numel for t in anatomy.tensors.values() if t.layer == layer]
    size = max(1, sum(own) * getattr(torch, dtype).itemsize)
    copies = min(max(-(-_COLD_BYTES // size), _COPIES[0]), _COPIES[1])
    return timed(built(config, anatomy, layer, copies, dtype), anatomy, prompt_tokens)


def built(config: PreTrainedConfig, anatomy: Anatomy, layer: int, copies: int, dtype: str) -> PreTrainedModel:
    """A model of `copies` of one layer, embedding and head as they are, with small random weights."""
    target = hf.target_for(config, anatomy, Keep({"layers": (layer,) * copies}))
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    weights = {
        name: torch.empty(tensor.shape, dtype=kind).normal_(0, 0.02, generator=generator)
        for name, tensor in target.anatomy.tensors.items()
    }
    return hf.build(target.config, weights)


@torch.no_grad()
def timed(
    model: PreTrainedModel, anatomy: Anatomy, prompt_tokens: int, clock: Clock = time.perf_counter
) -> tuple[Timing, Timing]:
    """(one layer, the rest) of a model of equal layers: the clock is read before and after every layer and every pass.

    A warm-up first; medians over passes of the mean layer, and of what the layers leave of the pass.
    """
    blocks: Any = model.get_submodule(anatomy.family.blocks)
    marks: list[float] = []
    hooks = [b.register_forward_pre_hook(lambda *_: marks.append(clock())) for b in blocks]
    hooks += [b.register_forward_hook(lambda *_: marks.append(clock())) for b in blocks]
    passes: dict[str, list[tuple[float, float]]] = {"prefill": [], "decode": []}
    ids = torch.zeros(1, prompt_tokens, dtype=torch.int64)

    def run(kind: str, ids_BT: torch.Tensor, cache: Any) -> Any:
        marks.clear()
        start = clock()
        out = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        whole = clock() - start
        inside = sum(marks[1::2]) - sum(marks[::2])
        passes[kind].append((inside / len(blocks), whole - inside))
        return out.past_key_values

    try:
        for _ in range(1 + _REPEATS):
            cache = run("prefill", ids, None)
        for _ in range(1 + _DECODED):
            cache = run("decode", ids[:, :1], cache)
    finally:
        for hook in hooks:
            hook.remove()
    # the first of each is the warm-up
    (layer_p, rest_p), (layer_d, rest_d) = (
        [1000 * st.median(column) for column in zip(*passes[kind][1:], strict=True)] for kind in ("prefill", "decode")
    )
    return Timing(layer_p, layer_d), Timing(rest_p, rest_d)
