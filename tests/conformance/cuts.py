"""The cuts that every family must survive, by name: uniform ones (`kv_heads`) and ones that differ between layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import tiny

from prunus.anatomy import Anatomy
from prunus.keep import Keep

Sizes = Callable[[str], int]


def _every_layer(axis: str, size: Sizes, start: int) -> dict[str, tuple[int, ...]]:
    return {f"layers.{i}.{axis}": tuple(range(start, size(f"layers.{i}.{axis}"), 2)) for i in range(tiny.LAYERS)}


def _heads(axis: str, size: Sizes) -> dict[str, tuple[int, ...]]:
    """Layer 0 loses its first unit, layer 1 keeps only its last, layer 2 keeps all."""
    n = size(f"layers.0.{axis}")
    return {f"layers.0.{axis}": tuple(range(1, n)), f"layers.1.{axis}": (n - 1,)}


def _ragged(size: Sizes) -> dict[str, tuple[int, ...]]:
    """Layer 0 loses its first query head, layer 1 all but the second and the last two, layer 2 none."""
    n = size("layers.0.heads")
    return {"layers.0.heads": tuple(range(1, n)), "layers.1.heads": (1, n - 2, n - 1)}


def _gone(axis: str, layers: Iterable[int]) -> dict[str, tuple[int, ...]]:
    return {f"layers.{i}.{axis}": () for i in layers}


def _everything(size: Sizes) -> dict[str, tuple[int, ...]]:
    """All axes at once; also inside a layer that goes, and inside a sub-layer that goes."""
    cut = {"hidden": tuple(range(3, 30)), "layers": (1, 2), "layers.2.mlp": ()}
    cut |= {"layers.1.intermediate": tuple(range(5, 20)), "layers.2.intermediate": (0, 3)}
    cut |= {"layers.0.intermediate": (1, 2, 3)}
    if size("layers.0.kv_heads") > 1:
        cut |= {"layers.1.kv_heads": tuple(range(1, size("layers.1.kv_heads"))), "layers.2.kv_heads": (0,)}
    if size("layers.0.q_heads") > 1:
        cut |= {"layers.1.q_heads": tuple(range(1, size("layers.1.q_heads")))}
    return cut


CUTS: dict[str, Callable[[Sizes], dict[str, tuple[int, ...]]]] = {
    "layers_middle": lambda size: {"layers": (0, 2)},
    "layers_first": lambda size: {"layers": (1, 2)},
    "attention_first": lambda size: _gone("attention", [0]),
    "attention_rest": lambda size: _gone("attention", [1, 2]),
    "attention_all": lambda size: _gone("attention", [0, 1, 2]),
    "mlp_first": lambda size: _gone("mlp", [0]),
    "mlp_all": lambda size: _gone("mlp", [0, 1, 2]),
    "sublayers": lambda size: _gone("attention", [0, 2]) | _gone("mlp", [1, 2]),
    "kv_heads": lambda size: _every_layer("kv_heads", size, 1),
    "kv_heads_per_layer": lambda size: _heads("kv_heads", size),
    "q_heads": lambda size: _every_layer("q_heads", size, 1),
    "q_heads_per_layer": lambda size: _heads("q_heads", size),
    "heads": lambda size: _every_layer("heads", size, 1),
    "heads_per_layer": _ragged,
    "intermediate": lambda size: _every_layer("intermediate", size, 1),
    "intermediate_per_layer": lambda size: {
        "layers.0.intermediate": (0, 7, 23),
        "layers.1.intermediate": tuple(range(4, 21)),
    },
    "hidden": lambda size: {"hidden": tuple(range(4, 28))},
    "hidden_odd": lambda size: {"hidden": tuple(range(3, 30))},
    "everything": _everything,
}
# What a stock config can say, where its validator lets it; a config of ours otherwise.
UNIFORM = {"layers_middle", "layers_first", "kv_heads", "q_heads", "heads", "intermediate", "hidden", "hidden_odd"}
FOLDED_AXES = {"hidden"}  # of every family with RMSNorm; olmo2 adds its heads, whose norms span all of them
LAYER_NORM = {"olmo", "phi", "phi_tied", "phi_qk", "gpt_neox", "gpt_neox_sequential"}  # cutting the stem is inexact
_DERIVED_HEADS = {"hidden", "kv_heads", "q_heads", "heads"}  # where a config takes the size of a head from hidden_size
REFUSED = dict.fromkeys(("phi_qk", "gpt_neox", "gpt_neox_sequential"), _DERIVED_HEADS)  # case -> kinds of axes it lacks


def sizes(case: str) -> Sizes:
    """Sizes of the axes inside a layer, from the config fields alone."""
    config = tiny.tiny_config(case)
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    known = {
        "kv_heads": kv_heads,
        "q_heads": config.num_attention_heads // kv_heads,
        "heads": config.num_attention_heads,
        "intermediate": config.intermediate_size,
    }
    return lambda name: known[name.rsplit(".", 1)[-1]]


def _units(case: str, cut: str) -> dict[str, tuple[int, ...]]:
    """The cut, less the axes that the model lacks."""
    units = CUTS[cut](sizes(case))
    return {name: kept for name, kept in units.items() if name.rsplit(".", 1)[-1] not in REFUSED.get(case, ())}


def keep_of(case: str, cut: str) -> Keep:
    """The decision of `cut` for the model `case`."""
    return Keep(_units(case, cut)).validated(Anatomy.of(tiny.tiny_config(case)))


_HEADS = {"kv_heads", "kv_heads_per_layer", "q_heads", "q_heads_per_layer", "heads", "heads_per_layer", "everything"}
_ONLY = {  # variants of a family that is there in full: the cuts that they are there for
    "llama_tied": {"hidden", "hidden_odd", "layers_middle", "everything"},
    "llama_mha": _HEADS - {"q_heads", "q_heads_per_layer"},  # one query head a group
    "llama_gqa4": _HEADS,
    "llama_mqa": _HEADS - {"kv_heads", "kv_heads_per_layer"},  # one group
    "gemma_untied": {"hidden", "hidden_odd", "everything"},
    "seed_oss_bias": {"hidden", "layers_middle", "sublayers", "kv_heads", "everything"},
    "phi_tied": {"hidden", "layers_middle", "everything"},
    "phi_qk": {"layers_middle", "sublayers", "intermediate", "everything"},
}


def pairs(cuts: Iterable[str] = CUTS, cases: Iterable[str] = tiny.CASES) -> list[tuple[str, str]]:
    """(case, cut) for all families and their variants."""
    return [(case, cut) for case in cases for cut in cuts if cut in _ONLY.get(case, CUTS) and _units(case, cut)]


def folds(case: str, cut: str) -> bool:
    """Whether the cut runs through an RMSNorm's gains."""
    through_norms = FOLDED_AXES | ({"kv_heads", "q_heads", "heads"} if case == "olmo2" else set())
    through = cut == "everything" or cut.removesuffix("_per_layer").removesuffix("_odd") in through_norms
    return through and case not in LAYER_NORM


def inexact(case: str, cut: str) -> bool:
    """Whether the cut runs through a LayerNorm over the stem, so that no sliced model equals the zeroed one."""
    return case in LAYER_NORM and "hidden" in _units(case, cut)
