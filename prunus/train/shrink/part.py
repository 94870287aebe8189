"""What a recipe says of pruning while it trains."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..strict import Strict

SIZES = {  # field of a target -> kind of axis
    "hidden_size": "hidden",
    "intermediate_size": "intermediate",
    "num_key_value_heads": "kv_heads",
    "num_hidden_layers": "layers",
}
TIMED = ("prefill_ms", "decode_ms")  # by this machine's clock
MEASURES = ("params", "ratio", "flops", "kv_bytes", *TIMED)
AxisKind = Literal["kv_heads", "heads", "intermediate", "hidden", "layers"]


PACE_FIELDS = {  # kind of pace -> the fields that it goes by
    "curve": ("start", "end", "power", "rounds"),
    "rate": ("start", "end", "power", "rounds"),
    "steps": ("start", "prune", "train"),
    "once": ("samples",),
}


class TargetPart(Strict):
    """What the model is cut down to: one measure of the whole model, or sizes (those not named stay)."""

    params: int | None = Field(default=None, ge=1, description="all parameters, a tied embedding once")
    ratio: float | None = Field(default=None, gt=0, lt=1, description="share of the blocks' parameters that goes")
    flops: int | None = Field(default=None, ge=1, description="forward FLOPs of a token, at data.seq_len")
    kv_bytes: int | None = Field(default=None, ge=1, description="bytes of KV cache a token, two a number")
    prefill_ms: float | None = Field(default=None, gt=0, description="milliseconds of a prompt, measured on this machine")
    decode_ms: float | None = Field(default=None, gt=0, description="milliseconds of a token more, measured likewise")
    hidden_size: int | None = Field(default=None, ge=1)
    intermediate_size: int | None = Field(default=None, ge=1)
    num_key_value_heads: int | None = Field(default=None, ge=1)
    num_hidden_layers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one(self) -> TargetPart:
        measures = [name for name in MEASURES if getattr(self, name) is not None]
        if len(measures) + bool(self.sizes) != 1:
            raise ValueError(f"give one of {', '.join(MEASURES)}, or sizes such as hidden_size; not several, and not none")
        return self

    @property
    def measure(self) -> str | None:
        """The one that is named; None for sizes."""
        return next((name for name in MEASURES if getattr(self, name) is not None), None)

    @property
    def sizes(self) -> dict[str, int]:
        """Kind of axis -> the size that it is to have."""
        return {kind: value for name, kind in SIZES.items() if (value := getattr(self, name)) is not None}


class SaliencyPart(Strict):
    """What units are worth, from the gradients that training computes anyway, read before they are clipped."""

    metric: Literal["first", "second", "hessian", "adam", "obc"] = Field(
        default="first",
        description="of a weight: |w g|; |w g - w^2 F / 2|; w^2 F / 2; w^2 v / 2 with Adam's second moment v; or w^2 / [H^-1]_jj "
        "with H the mean of x x^T over what its matrix reads (activations). F, the Fisher information, is of micro-batches",
    )
    matrices: Literal["output", "output+embedding", "all"] = Field(
        default="output",
        description="whose weights count: o_proj and down_proj alone (EfficientLLM), for the stem the embedding's as well, or "
        "those of every matrix of the blocks",
    )
    average: float = Field(
        default=0.95,
        ge=0,
        lt=1,
        description="what the running mean over updates keeps; 0: the last update alone (adam, obc: their own)",
    )


class RepairPart(Strict):
    """What mends the rest when something goes, from what was read while the model trained."""

    kind: Literal["none", "least-squares"] = Field(
        default="none", description="of heads and channels: what reads them is fitted anew on those that stay"
    )
    stem: Literal["none", "gain", "least-squares"] = Field(
        default="none",
        description="gain: norms are scaled by what is left of what they divide by; least-squares: what reads the stem is "
        "fitted anew, too",
    )


class ActivationsPart(Strict):
    """Running sums of what matrices read, for repair and for the metric obc."""

    average: float = Field(default=0.95, ge=0, lt=1, description="what they keep at an update; 0: the last update alone")
    every: int = Field(default=16, ge=1, description="one of so many tokens is looked at, others at every update")


class PacePart(Strict):
    """When how much goes."""

    kind: Literal["curve", "rate", "steps", "once"] = Field(
        default="curve",
        description="curve: what is left follows a curve in tokens; rate: what goes is in proportion to the learning rate; steps: "
        "so many groups after so many updates, until the target is met; once: all before the first update",
    )
    start: float = Field(default=0.05, ge=0, le=1, description="share of the tokens before the first cut (not of once)")
    end: float = Field(
        default=0.6, gt=0, le=1, description="of curve and rate: share of the tokens at which the target is met"
    )
    power: float = Field(
        default=1.0, gt=0, description="of curve: 1 a straight line, 3 cubic: fast at first; of rate: of the learning rate"
    )
    rounds: int | None = Field(
        default=None, ge=1, description="of curve and rate: in so many rounds; default: at every update"
    )
    prune: int = Field(default=1, ge=1, description="of steps: groups that go ...")
    train: int = Field(default=1, ge=1, description="... after so many updates")
    samples: int = Field(default=128, ge=1, description="of once: sequences that are scored on")

    @model_validator(mode="after")
    def _fits(self) -> PacePart:
        for name, field in type(self).model_fields.items():
            if name not in ("kind", *PACE_FIELDS[self.kind]) and getattr(self, name) != field.default:
                raise ValueError(
                    f"{name} {getattr(self, name)} says nothing to kind {self.kind}; drop it, or take another kind"
                )
        if self.kind in ("curve", "rate") and self.end < self.start:
            raise ValueError(f"end {self.end} lies before start {self.start}")
        return self


class MasksPart(Strict):
    """Sheared LLaMA: gates on units learn, with the weights, what goes; multipliers bring them to the target's sizes."""

    lr: float = Field(default=0.3, gt=0, description="of the gates' log alphas, by an Adam of their own")
    multiplier_lr: float = Field(default=30.0, gt=0, description="of the Lagrangian's multipliers, by plain ascent")
    stiffness: float = Field(
        default=1000.0, ge=0, description="what the squared distance to the size asked for is multiplied by at the start"
    )
    end: float = Field(default=0.5, gt=0, le=1, description="share of the updates after which gates are folded and sliced")
    warmup: float = Field(
        default=0.5, ge=0, le=1, description="share of the gates' updates in which what is asked for nears the target"
    )


class PrunePart(Strict):
    """Pruning while training: the least salient group goes first, until the target is met."""

    target: TargetPart | None = Field(default=None, description="default: the shape as it was before model.enlarge")
    stops: list[float] = Field(
        default=[],
        description="shares of what target measures of the source, falling: a checkpoint is left at each on the way",
    )
    axes: list[AxisKind] = Field(default=["kv_heads", "intermediate", "hidden"], min_length=1)
    alike: bool = Field(
        default=True, description="every layer loses the same number of units; else each unit goes by itself"
    )
    allocate: Literal["least", "adaptive"] = Field(
        default="least",
        description="least: the least salient group goes first; adaptive: at every cut each layer gives up a share of its own, "
        "less where it turns the stream more (Adapt-Pruner), and its least salient units go",
    )
    amplitude: float = Field(
        default=1.0, ge=0, description="of adaptive: how far layers' shares differ, in shares of what goes at a cut"
    )
    saliency: SaliencyPart = Field(default_factory=SaliencyPart)
    per: Literal["none", "elements", "params", "flops", "kv_bytes", "prefill_ms", "decode_ms"] = Field(
        default="params",
        description="groups of different kinds compare by their saliency over this; milliseconds of a prompt, or of a token "
        "more, are measured on this machine before the first update",
    )
    order: list[AxisKind] = Field(
        default=[], description="a fixed order of the axes instead: each down to its size in target"
    )
    repair: RepairPart = Field(default_factory=RepairPart)
    activations: ActivationsPart = Field(default_factory=ActivationsPart)
    pace: PacePart = Field(default_factory=PacePart)
    units: dict[AxisKind, int] = Field(default={}, description="units of an axis that go together, default 1")
    floor: dict[AxisKind, int] = Field(default={}, description="least size of an axis, default a sixteenth of the source's")
    slice_at: float = Field(
        default=0.05, ge=0, le=1, description="zeroed units are sliced away when this share of the parameters is dead"
    )
    masks: MasksPart | None = Field(default=None, description="what goes is learned instead, to a target of sizes")

    @model_validator(mode="after")
    def _fits(self) -> PrunePart:
        for name in ("axes", "order"):
            listed = getattr(self, name)
            if len(set(listed)) != len(listed):
                raise ValueError(f"{name} names an axis twice")
        sizes = self.target.sizes if self.target is not None else {}
        if stray := sorted((set(sizes) | set(self.order) | set(self.units) | set(self.floor)) - set(self.axes)):
            raise ValueError(f"target, order, units or floor name {stray[0]}, which axes leaves out; add it there")
        if self.allocate == "adaptive":
            self._fits_adaptive()
        elif self.amplitude != PrunePart.model_fields["amplitude"].default:
            raise ValueError(f"amplitude {self.amplitude} is of allocate: adaptive alone; drop it")
        if "heads" in self.axes:
            self._fits_heads()
        if self.masks is not None:
            self._fits_masks()
        if self.order and not sizes:
            raise ValueError("order needs a target of sizes, which say where one axis stops and the next begins")
        if self.stops and self.pace.kind == "once":
            raise ValueError("stops are passed on the way, but pace.kind once has none; drop them, or take another pace")
        if self.saliency.metric == "adam" and self.pace.kind == "once":
            raise ValueError(
                "saliency.metric: adam knows nothing before the first update, when pace.kind once cuts; give another"
            )
        if self.order and set(self.order) != set(sizes):
            raise ValueError(f"order {list(self.order)} must name every axis that target gives a size, and no other")
        if sizes and self.floor:
            raise ValueError("floor: target says where every axis ends; drop it")
        if any(not 0 < share < 1 for share in self.stops) or sorted(set(self.stops), reverse=True) != self.stops:
            raise ValueError(f"stops {self.stops} must be shares between 0 and 1 that fall")
        self._fits_repair()
        self._fits_matrices()
        if any(count < 1 for count in [*self.units.values(), *self.floor.values()]):
            raise ValueError("units and floor are counts of at least 1")
        return self

    @property
    def clocked(self) -> bool:
        """Whether the target is milliseconds."""
        return self.target is not None and self.target.measure in TIMED

    @property
    def timed(self) -> tuple[str, ...]:
        """Milliseconds that decide: as the price of groups, or as the target."""
        measure = None if self.target is None else self.target.measure
        return tuple(name for name in TIMED if name in (self.per, measure))

    @property
    def looks(self) -> bool:
        """Whether what matrices read is of use."""
        return self.saliency.metric == "obc" or (self.repair.kind, self.repair.stem) != ("none", "none")

    def _fits_matrices(self) -> None:
        if self.saliency.matrices == "output+embedding" and "hidden" not in self.axes:
            raise ValueError("saliency.matrices: the embedding counts for hidden alone, which axes leaves out; give output")
        if self.saliency.matrices == "output+embedding" and self.saliency.metric == "obc":
            raise ValueError(
                "saliency.metric: obc goes by what matrices read, and the embedding reads none; give matrices output"
            )

    def _fits_heads(self) -> None:
        """Single query heads share KV heads: what is said of units that share nothing is not said of them."""
        if "kv_heads" in self.axes:
            raise ValueError("axes: heads and kv_heads both cut query heads, one by one or by groups; name one of them")
        if self.masks is not None:
            raise ValueError("masks are learned for whole KV groups; put kv_heads into axes instead of heads")
        if self.target is not None and (self.target.sizes or self.target.kv_bytes is not None or self.clocked):
            raise ValueError(
                "target: which KV heads are left is not known before, if heads go one by one; give params, ratio or flops"
            )
        if self.per in ("kv_bytes", *TIMED):
            raise ValueError(
                f"per: {self.per} of a single query head is nothing until its KV head goes; give params or flops"
            )
        if self.saliency.matrices == "all":
            raise ValueError("saliency.matrices: the weights of KV heads are no single query head's; give output")

    def _fits_repair(self) -> None:
        if self.repair.stem != "none" and "hidden" not in self.axes:
            raise ValueError(f"repair.stem: {self.repair.stem} mends cuts of hidden, which axes leaves out; drop it")
        if self.repair.kind != "none" and not {"kv_heads", "heads", "intermediate"} & set(self.axes):
            raise ValueError(
                "repair.kind: least-squares mends cuts of kv_heads, heads and intermediate, which axes leaves out; drop it"
            )
        if not self.looks and self.activations != ActivationsPart():
            raise ValueError("activations are looked at for repair and for saliency.metric obc; name one, or drop them")

    def _fits_adaptive(self) -> None:
        if self.alike:
            raise ValueError("allocate: adaptive gives every layer a size of its own; set alike to false")
        if self.pace.kind == "steps":
            raise ValueError("allocate: adaptive takes a share at every cut, not groups; use pace.kind curve")
        if stray := sorted(set(self.axes) - {"kv_heads", "intermediate"}):
            raise ValueError(f"allocate: adaptive shares out KV groups and channels; take {stray[0]} out of axes")
        if "intermediate" not in self.axes:
            raise ValueError("allocate: adaptive gives each layer its share in channels; put intermediate into axes")
        if self.per != "params":
            raise ValueError(f"allocate: adaptive shares out parameters, and per: {self.per} has no say; drop it")
        if self.units or self.floor:
            raise ValueError("allocate: adaptive leaves every layer a KV group and a channel; drop units and floor")
        if self.target is None or (self.target.params is None and self.target.ratio is None):
            raise ValueError("allocate: adaptive shares out parameters; give a target of params or ratio")

    def _fits_masks(self) -> None:
        if self.target is not None and not self.target.sizes:
            raise ValueError("masks are learned to a shape; give target sizes such as hidden_size and intermediate_size")
        plain = PrunePart(target=self.target, axes=self.axes)
        for name in (name for name in PrunePart.model_fields if name not in ("target", "axes", "masks")):
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(
                    f"masks and {name} exclude each other: gates learn what goes, all at once; drop one of them"
                )
