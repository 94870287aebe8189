"""The table of methods: each row answers the same few questions. Data only; imports neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import unknown


@dataclass(frozen=True)
class Method:
    """What is cut (`axes`), what a unit is worth (`criterion`), where the cut falls (`allocator`), what repairs the rest
    (`compensators`, the first is the default), and whether a block sees the pruned blocks before it (`sequential`).
    """

    name: str
    summary: str
    axes: tuple[str, ...]  # "weights" for single weights
    criterion: str
    allocators: tuple[str, ...]  # where the cut falls; the first is the default
    citation: str
    compensators: tuple[str, ...] = ("none",)
    sequential: bool = False  # statistics of a block see the cut blocks before it
    either_order: bool = False  # that can be chosen
    sweeps: float = 0.0  # forward passes over the calibration windows, for the plan's estimate
    patterns: bool = False  # n:m is possible
    streams: bool = False  # goes through the model block by block, so the weights can stay in files
    uniform: bool = True  # the result's layers are alike by construction
    trains: bool = False  # weights learn with what is cut, on so many tokens: no calibration, but a training run
    multiple_of: int = 1
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # option -> values, the first is the default
    deviations: tuple[str, ...] = ()

    @property
    def is_sparse(self) -> bool:
        """Zeroes single weights, so the model keeps its size."""
        return self.axes == ("weights",)

    @property
    def needs_text(self) -> bool:
        """Needs calibration text."""
        return self.sweeps > 0


SEARCH_OPTIONS = {"generations": ("20",), "offspring": ("16",)}  # of the allocator `search`: any whole numbers
_ROWS = (
    Method(
        name="magnitude",
        summary="zero the smallest weights of every matrix",
        axes=("weights",),
        criterion="magnitude",
        allocators=("per-matrix",),
        citation="Han et al. 2015, arXiv 1506.02626",
        streams=True,
        patterns=True,
    ),
    Method(
        name="wanda",
        summary="zero the weights with the smallest |W| x input norm in every row",
        axes=("weights",),
        criterion="wanda",
        either_order=True,
        allocators=("per-row",),
        citation="Sun et al. 2023, arXiv 2306.11695",
        streams=True,
        sequential=True,
        sweeps=2.0,
        patterns=True,
        options={"allocation": ("uniform", "owl")},
        deviations=("exactly int(s * in) weights go in a row, also with ties",),
    ),
    Method(
        name="sparsegpt",
        summary="zero weights left to right by w^2 / [H^-1]_jj, and let the columns behind take over what they carried",
        axes=("weights",),
        criterion="obs",
        either_order=True,
        allocators=("per-matrix",),
        citation="Frantar and Alistarh 2023, arXiv 2301.00774",
        streams=True,
        compensators=("obs",),
        sequential=True,
        sweeps=2.0,
        patterns=True,
        options={"allocation": ("uniform", "owl")},
        deviations=(
            "exactly round(s * block) weights go in a block, also with ties",
            "damping grows tenfold until the factorisation succeeds, and says so",
        ),
    ),
    Method(
        name="prunus-sparse",
        summary="zero weights little by little by |W| x input norm while all others of the row move to make up for them",
        axes=("weights",),
        criterion="obs",
        either_order=True,
        allocators=("per-matrix",),
        citation="this project; built on Boza 2024, arXiv 2401.02938, and Sun et al. 2023, arXiv 2306.11695",
        compensators=("admm",),
        sequential=True,
        sweeps=2.0,
        patterns=True,
        options={"allocation": ("uniform", "owl")},
    ),
    Method(
        name="magnitude-sp",
        summary="cut the KV groups and FFN channels with the smallest weights, the same number in every layer",
        axes=("kv_heads", "intermediate"),
        criterion="magnitude-units",
        allocators=("uniform",),
        citation="Li et al. 2016, arXiv 1608.08710",
        streams=True,
        compensators=("none", "least-squares"),
        deviations=(
            "a unit's score is the L2 norm of all weights it owns, in every matrix of its axis",
            "KV groups go whole, as near to the ratio as their number allows; channels make up the rest of the target",
        ),
    ),
    Method(
        name="wanda-sp",
        summary="cut the KV groups and FFN channels with the smallest sum of |W| x input norm, the same number in every layer",
        axes=("kv_heads", "intermediate"),
        criterion="wanda-units",
        either_order=True,
        allocators=("uniform",),
        citation="An et al. 2023, arXiv 2312.11983",
        streams=True,
        compensators=("none", "least-squares"),
        sequential=True,
        sweeps=2.0,
        deviations=(
            "the unit of attention is a KV group with all its query heads (the published code has MHA only)",
            "exactly as many units go as the plan says, also with ties",
            "KV groups go as near to the ratio as their number allows; channels make up the rest of the target",
        ),
    ),
    Method(
        name="ziplm",
        summary="cut KV groups and FFN channels one after another, each time the one that the rest can best make up for",
        axes=("kv_heads", "intermediate"),
        criterion="obs-units",
        either_order=True,
        allocators=("uniform",),
        citation="Kurtic et al. 2023, arXiv 2302.04089",
        streams=True,
        compensators=("least-squares",),
        sequential=True,
        sweeps=2.0,
        deviations=(
            "the same number of units goes in every layer (published: a search for the sizes that meet a latency)",
            "the unit of attention is a KV group with all its query heads (published: one head)",
            "KV groups go as near to the ratio as their number allows; channels make up the rest of the target",
            "the weights that stay are solved for once all units are chosen, which is what the published updates add up to",
            "one cut, and no training (published: several, with distillation between them)",
        ),
    ),
    Method(
        name="osscar",
        summary="cut the KV groups and FFN channels whose absence least squares repairs best, then swap while that improves",
        axes=("kv_heads", "intermediate"),
        criterion="least-squares-error",
        either_order=True,
        allocators=("uniform",),
        citation="Meng et al. 2024, arXiv 2403.12983",
        streams=True,
        compensators=("least-squares",),
        sequential=True,
        sweeps=2.0,
        deviations=(
            "the unit of attention is a KV group with all its query heads (published: one head)",
            "KV groups go as near to the ratio as their number allows; channels make up the rest of the target",
            "a round swaps one unit for another, by their exact costs, 32 rounds at most",
            "what was cut is known by its index (published code takes columns that add up to zero as cut)",
        ),
    ),
    Method(
        name="flap",
        summary="cut KV groups and FFN channels whose input fluctuates least; the mean goes into a bias",
        axes=("kv_heads", "intermediate"),
        criterion="fluctuation",
        either_order=True,
        allocators=("global-standardised", "search", "candidates"),
        citation="An et al. 2023, arXiv 2312.11983",
        streams=True,
        compensators=("bias", "none", "least-squares"),
        sweeps=1.0,
        uniform=False,
        options=SEARCH_OPTIONS,
        deviations=(
            "the unit of attention is a KV group with all its query heads (the paper has MHA only)",
            "variance is the exact unbiased one over all tokens (the published code's running update is biased)",
            "both kinds of units are scored alike (the published code squares the heads' metric first)",
            "every layer keeps at least one KV group and one chunk of channels",
            "parameters are counted exactly, the added biases included",
            "of its metrics and structures, WIFV with AL-AM (and --uniform) are built",
        ),
    ),
    Method(
        name="llm-pruner",
        summary="cut the KV groups and FFN channels that matter least to the loss by a Taylor expansion; outer layers stay whole",
        axes=("kv_heads", "intermediate"),
        criterion="taylor-units",
        allocators=("uniform-free", "global", "search"),
        citation="Ma et al. 2023, arXiv 2305.11627",
        compensators=("none", "least-squares"),
        sweeps=4.0,
        uniform=False,
        options={
            "score": ("first", "second", "mix", "vector"),
            "aggregate": ("sum", "prod", "max", "first"),
            "protect": ("4,2", "0,0"),
            **SEARCH_OPTIONS,
        },
        deviations=(
            "the ratio is of all blocks, so the layers that are not protected lose more than it (published: of each cut layer)",
            "a KV group is the root's r * head_dim consecutive rows (published code adds up rows of other groups' heads)",
            "gradients are those of the mean over all windows, squares of each window's, in float32 whatever the dtype",
            "KV groups go as near to the ratio as their number allows; channels make up the rest of the target",
            "calibration text is the user's (published: ten sequences of 64 tokens)",
        ),
    ),
    Method(
        name="adapt-pruner",
        summary="cut most from the layers that turn the residual stream least, in each the units with the lowest Taylor score",
        axes=("kv_heads", "intermediate"),
        criterion="cosine-taylor",
        allocators=("adaptive", "global", "search"),
        citation="Pan et al. 2025, arXiv 2502.03460",
        compensators=("none", "least-squares"),
        sweeps=4.0,
        uniform=False,
        options={"amplitude": ("1", "0", "0.5", "1.5"), **SEARCH_OPTIONS},
        deviations=(
            "one cut to the target (published: small cuts with training between them)",
            "the base share is solved for, so that the target is met exactly also where a layer's share is clipped",
            "every layer keeps at least one KV group and one chunk of channels (published: one hundredth)",
            "KV groups go as near to a layer's share as their number allows; channels make up the rest of it",
            "a KV group is scored with its own query heads (published code adds up rows of other groups' heads)",
        ),
    ),
    Method(
        name="prunus",
        summary="cut the KV groups and FFN channels whose loss the rest can best make up for, and refit what reads the rest",
        axes=("kv_heads", "intermediate"),
        criterion="output-error",
        allocators=("least-error",),
        citation="this project; built on Kurtic et al. 2023, arXiv 2302.04089 (ZipLM) and An et al. 2023, arXiv 2312.11983",
        compensators=("affine", "least-squares"),
        sequential=True,
        sweeps=4.0,
        uniform=False,
        multiple_of=32,
        options={"words": ("0.375", "0", "0.125", "0.75", "1.5"), "unseen": ("0.02", "0.001", "0.1", "0.4")},
    ),
    Method(
        name="minitron-width",
        summary="cut the hidden stem and FFN channels with the smallest activations, to a target shape",
        axes=("hidden", "intermediate"),
        criterion="activation-norm",
        allocators=("target-shape", "candidates"),
        citation="Muralidharan et al. 2024, arXiv 2407.14679",
        streams=True,
        compensators=("none", "gain", "least-squares"),
        sweeps=1.0,
        options={"reduction": ("mean-l2", "l2")},
        deviations=(
            "without --target, stem and channels shrink by the same factor; heads stay",
            "l2 scores the stem on what q and gate read (the comparison study: on block outputs)",
            "gain is ours: every norm is multiplied by the measured rms_kept / rms_all",
            "least-squares is ours: with gain, and every matrix of a block that reads what was cut is solved again",
        ),
    ),
    Method(
        name="sheared-llama",
        summary="learn what to cut by gates on stem, channels, KV groups, layers; they train with the weights, on --tokens of text",
        axes=("hidden", "intermediate", "kv_heads", "layers"),
        criterion="learned-gates",
        allocators=("gates",),
        citation="Xia et al. 2023, arXiv 2310.06694",
        trains=True,
        deviations=(
            "without --target, stem and channels shrink by the same factor; heads and layers stay (published: a given shape)",
            "the unit of attention is a KV group with all its query heads (the paper has MHA only)",
            "the whole budget is the phase of masks (published: continued pretraining follows, on dynamic shares of data)",
            "multipliers rise by plain ascent, the square's from a start above 0 (published: by Adam, from 0)",
        ),
    ),
    Method(
        name="slicegpt",
        summary="turn the stream into its principal directions and cut those that carry least",
        axes=("hidden",),
        criterion="principal-directions",
        allocators=("rotation",),
        citation="Ashkboos et al. 2024, arXiv 2401.15024",
        sequential=True,
        sweeps=2.0,
        multiple_of=8,
        options={"rotation": ("per-block", "shared"), "signal": ("stream", "normed")},
        deviations=(
            "the ratio is of block parameters and counts the shortcut matrices (published: of the stream's size)",
            "norms keep a gain, sqrt(d / d') at first, so that a stock RMSNorm divides by the original size",
            "what leaves the last block comes back to the original basis (published: to a random one; the same function)",
            "shared is ours: one rotation for all blocks needs no shortcut matrices, and a stock type can say it",
            "normed is ours: every token counts alike, as the norm that reads it makes it",
        ),
    ),
    Method(
        name="minitron-depth",
        summary="cut the run of layers whose absence costs the least loss",
        axes=("layers",),
        criterion="loss-without",
        allocators=("contiguous",),
        citation="Muralidharan et al. 2024, arXiv 2407.14679",
        sweeps=17.0,
        deviations=("the loss itself is compared, not its absolute difference, so a removal that helps is taken",),
    ),
    Method(
        name="shortgpt",
        summary="cut the layers that turn the residual stream least",
        axes=("layers",),
        criterion="block-influence",
        allocators=("lowest-layers",),
        citation="Men et al. 2024, arXiv 2403.03853",
        streams=True,
        sweeps=1.0,
        deviations=("the cosine is taken in float32 whatever the model's dtype; in bfloat16 small distances round to zero",),
    ),
    Method(
        name="shortened-llama",
        summary="cut the layers whose weights, or whose absence one by one, matter least to the loss",
        axes=("layers",),
        criterion="taylor",
        allocators=("lowest-layers",),
        citation="Kim et al. 2024, arXiv 2402.02834",
        sweeps=4.0,
        options={"score": ("taylor", "perplexity"), "protect": ("4,2", "0,0")},
        deviations=(
            "every tensor of a layer counts, its biases too (published code takes those named weight)",
            "gradients are summed in float32 and are those of the mean over all windows, so the batch size does not matter",
            "calibration text is the user's (published: ten sequences of 128 tokens)",
        ),
    ),
    Method(
        name="sleb",
        summary="cut layers one after another, each time the one whose absence costs the least loss",
        axes=("layers",),
        criterion="loss-without",
        allocators=("greedy-layers",),
        citation="Song et al. 2024, arXiv 2402.09025",
        sweeps=89.0,
        options={"protect": ("1,1", "0,0")},
        deviations=("calibration windows are full and equally long (published code joins 128 short rows of text)",),
    ),
    Method(
        name="sublayer-greedy",
        summary="cut attention and MLP sub-layers one after another, each time the one whose absence costs the least loss",
        axes=("attention", "mlp"),
        criterion="loss-without",
        allocators=("greedy-sublayers",),
        citation="Zhong et al. 2024, arXiv 2406.10594",
        sweeps=355.0,
        uniform=False,
        options={"sublayers": ("both", "attention", "mlp")},
        deviations=(
            "the target is a share of block parameters (published: a number of sub-layers)",
            "near the target only sub-layers that do not overshoot it by a whole smallest one may go",
            "a layer that has lost both its sub-layers is removed whole",
        ),
    ),
)
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
ONE_SHOT: dict[str, Method] = {name: row for name, row in METHODS.items() if not row.trains}


def method_named(name: str) -> Method:
    """The row of a method; UserError with the nearest name if there is none."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
