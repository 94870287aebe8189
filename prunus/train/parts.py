"""What a recipe says of model, data, optimizer, schedule, teacher, saving and validation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from .strict import Strict

RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # that sweep tries: the comparison study's
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
        le=1000,
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
    floor: float = Field(
        default=0.001, gt=0, lt=1, description="no domain's share falls below it; one at 0 could not come back"
    )


class RangePart(Strict):
    """The first tokens of a range, in the order of a seed."""

    tokens: int = Field(ge=1)
    seed: int | None = Field(default=None, description="default: data.seed")


def _kind(value: Any) -> str:
    return "name" if isinstance(value, str) else "each"


# told apart before they are checked, so that a mistake in the second is not said of the first
_Ranges = Annotated[Annotated[str, Tag("name")] | Annotated[dict[str, RangePart], Tag("each")], Discriminator(_kind)]


class DataPart(Strict):
    """Which tokens, in which order."""

    domains: list[DomainPart] = Field(min_length=1)
    range: _Ranges = Field(
        default="retrain",
        description="parent, retrain or validation; or several, {parent: {tokens: 2007040}, retrain: {tokens: 507904}}: of each "
        "the first so many, as a run on it alone reads them",
    )
    seq_len: int = Field(default=256, ge=2)
    seed: int = 0
    epochs: int = Field(default=1, ge=1, description="how often the data may be repeated")
    mixing: MixingPart | None = None
    separate_documents: bool = Field(default=False, description="no token sees the document before its own")
    evaluation: list[str] = Field(default=[], description="texts that training text must not contain (13-gram check)")

    @model_validator(mode="after")
    def _whole(self) -> DataPart:
        if isinstance(self.range, dict):
            wrong = next((name for name, part in self.range.items() if part.tokens % self.seq_len), None)
            if wrong is not None or not self.range:
                told = f"{wrong}: {self.range[wrong].tokens:,} tokens" if wrong is not None else "nothing"
                raise ValueError(f"range {told} is no whole number of sequences of seq_len {self.seq_len}")
            if self.mixing is not None:
                raise ValueError(
                    "range names several, whose order is fixed, and mixing shares out by losses; drop one of them"
                )
        return self

    @property
    def ranges(self) -> tuple[str, ...]:
        """Of all that is read."""
        return (self.range,) if isinstance(self.range, str) else tuple(self.range)


class OptimizerPart(Strict):
    """AdamW; matrices decay, norms and biases do not."""

    lr: float | Literal["sweep"] | list[float] = Field(
        default=3e-4, description="peak rate; sweep, or rates, to try them first"
    )
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float | None = Field(default=1.0, gt=0, description="largest norm of all gradients together; null: any")

    @model_validator(mode="after")
    def _positive(self) -> OptimizerPart:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must both lie in [0, 1)")
        rates = self.rates
        if wrong := [rate for rate in rates if not 0 < rate < 1]:
            raise ValueError(f"lr {wrong[0]} is no learning rate; give a number in (0, 1), several, or sweep")
        if len(rates) > len(set(rates)) or not rates:
            raise ValueError(f"lr {rates} tries {'a rate twice' if rates else 'no rate'}; give rates that differ")
        return self

    @property
    def sweeps(self) -> bool:
        """Whether the rate is found by trying."""
        return not isinstance(self.lr, float)

    @property
    def rates(self) -> list[float]:
        """That a sweep tries, or the one."""
        if isinstance(self.lr, float):
            return [self.lr]
        return self.lr if isinstance(self.lr, list) else list(RATES)


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
        description="folder, GGUF file or hub name of the parent (of prune, by default model.source); with "
        "cache only compared, and may be left out",
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
