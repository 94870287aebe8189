"""A recipe and all that it names, opened and checked against each other before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checkpoint, record
from ..anatomy import Anatomy
from ..data.tokenizer import fingerprint, open_tokenizer
from ..distributed import leads
from ..errors import UserError
from ..headers import safetensors_entries
from ..keep import WeightMask
from ..ledger import Ledger
from ..reading import table_of
from ..source import Source
from ..tensorfiles import read
from . import lora
from .cache import Cache, wanted
from .feeds import Feeds
from .loop import Clock
from .parts import NO_TOKENIZER
from .recipe import Recipe
from .shapes import checkpoint_of, config_of, is_folder
from .shrink.cutting import Cutting
from .shrink.masks import too_short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECIPE, LEDGER, RECORD, MODEL, CHECKPOINTS = "recipe.json", "ledger.json", "record.jsonl", "model", "checkpoints"


@dataclass
class Run:
    """A checked recipe with everything it names opened, and no weight read."""

    recipe: Recipe
    out: Path
    config: Any
    tokenizer: PreTrainedTokenizerBase
    feeds: Feeds
    source: Source | None
    teacher: Source | None  # whose weights are to be read
    mask: WeightMask | None
    cache: Cache | None = None  # what a teacher said, where none is to be read
    best: dict[str, float] = field(default_factory=dict)  # loss and step of the best validation
    adapters: Any = None  # peft's wrapper of the model, where only adapters are trained
    clock: Clock = field(default_factory=Clock)
    cutting: Cutting | None = None  # what is cut while it trains
    spent: int = 0  # FLOPs of the updates so far

    @property
    def anatomy(self) -> Anatomy:
        """Of the model that is trained."""
        return Anatomy.of(self.config)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before it begins."""
        return (*self.feeds.notes, *filter(None, [too_short(self.recipe)]))

    @property
    def teacher_flops(self) -> int | None:
        """Of one sequence, on-line or when the cache was written; None without a teacher."""
        if self.cache is not None:
            return self.cache.manifest.flops_per_sequence
        return None if self.teacher is None else self.teacher.anatomy.flops(self.recipe.data.seq_len)


def prepare(recipe: Recipe, out: Path, *, online: bool = False) -> Run:
    """Open what the recipe names and check that it fits together; UserError otherwise. Reads no weight of a model."""
    if recipe.lora is not None:
        lora.check_library()
    _check_folder(out, recipe)
    return opened(recipe, out, online=online)


def opened(recipe: Recipe, out: Path, *, online: bool = False) -> Run:
    """As `prepare`, whatever is in the folder `out`."""
    source = None if recipe.model.source is None else Source.open(recipe.model.source, online=online)
    asked = recipe.model
    if asked.tokenizer is not None:
        tokenizer = open_tokenizer(asked.tokenizer, online=online)
    elif source is not None or is_folder(str(asked.shape)):
        tokenizer = (source or Source.open(str(checkpoint_of(str(asked.shape))))).tokenizer()
    else:
        raise UserError(f"model: {NO_TOKENIZER}")
    config: Any = source.config if source is not None else None
    if config is None:
        config = config_of(asked.shape or "", len(tokenizer), asked.target_params, asked.enlarge)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and recipe.data.seq_len > limit:
        raise UserError(f"data.seq_len: {recipe.data.seq_len} is more than the {limit} positions that the model knows")
    window = getattr(config, "sliding_window", None)
    if recipe.data.separate_documents and window and window < recipe.data.seq_len:
        raise UserError(
            f"data.separate_documents: this model sees {window} tokens back in some layers, and one mask for all would undo that; "
            f"set data.seq_len to {window} or less, or drop it"
        )
    cutting = cutting_of(recipe, config)
    if source is not None:
        Ledger.check(source.path)
    feeds = Feeds.open(recipe, tokenizer)
    anatomy = Anatomy.of(config)
    teacher, cache = _teacher(recipe, feeds, tokenizer, anatomy.shape.vocab_size, online=online)
    mask = None if recipe.model.mask is None else _mask(Path(recipe.model.mask), anatomy)
    return Run(recipe, out, config, tokenizer, feeds, source, teacher, mask, cache, cutting=cutting)


def cutting_of(recipe: Recipe, config: Any, shape: Any = None) -> Cutting | None:
    """What a recipe cuts of a model while it trains; an enlarged shape comes back to the width that it had.

    `shape`: the config of what is enlarged, where the recipe names what is not there yet.
    """
    asked, before = recipe.model, None
    if asked.enlarge is not None:
        shape = config_of(asked.shape or "", 0, asked.target_params) if shape is None else shape
        before = Anatomy.of(shape).shape.layers[0].intermediate_size
    return Cutting.of(recipe, config, before)


def _teacher(
    recipe: Recipe, feeds: Feeds, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, online: bool
) -> tuple[Source | None, Cache | None]:
    """Whose weights are to be read, or what a teacher said; UserError for one that cannot teach this model."""
    part = recipe.teacher
    if part is None:
        return None, None
    if part.top_k is not None and part.top_k > vocab_size:
        raise UserError(f"teacher.top_k: {part.top_k:,} are more than the vocabulary's {vocab_size:,}; give fewer, or null")
    teacher = None if part.source is None else Source.open(part.source, online=online)
    if teacher is not None and (
        teacher.anatomy.shape.vocab_size != vocab_size or teacher.tokenizer().get_vocab() != tokenizer.get_vocab()
    ):
        raise UserError(
            f"teacher.source: {teacher.label} has another vocabulary than the model that it is to teach, so their "
            "distributions cannot be compared; give a teacher of the same tokenizer"
        )
    if part.cache is None:
        return teacher, None
    asked = wanted(recipe, feeds, fingerprint(tokenizer), vocab_size)
    first = leads()  # one process is enough to hash files
    named = teacher.sha256 if teacher is not None and first else None
    folder, sequences = Path(part.cache).expanduser(), recipe.steps * recipe.sequences
    return None, Cache.open(folder, asked, sequences, teacher=named, whole=first)


def _check_folder(out: Path, recipe: Recipe) -> None:
    """UserError unless the folder is free, or holds this very run. Free is one that holds what is not seen at most: the lock
    of a run that was killed before it wrote its recipe.
    """
    if not out.exists() or (out.is_dir() and all(path.name.startswith(".") for path in out.iterdir())):
        record.check_place(out / RECORD, "out")
        return
    try:
        found = table_of(out / RECIPE)
    except UserError as error:
        raise UserError(f"{out}: is there already and holds no run of prunus; give another --out") from error
    if found != recipe.plain():
        differing = _differing(found, recipe.plain())
        raise UserError(
            f"{out}: holds a run of another recipe ({differing} differs); give another --out, or the same recipe"
        )


def _differing(one: Any, other: Any, at: str = "") -> str:
    """The first field in which two plain recipes differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                return _differing(one.get(name), other.get(name), f"{at}.{name}" if at else name)
    return at


def _mask(folder: Path, anatomy: Anatomy) -> WeightMask:
    path = folder / checkpoint.EXTRA / "mask.safetensors"
    if not path.is_file():
        raise UserError(f"model.mask: {folder} has no {checkpoint.EXTRA}/{path.name}; give a sparse checkpoint of prunus")
    packed = {name: read(entry) for name, entry in safetensors_entries(path).items()}
    for name, bits in packed.items():
        if name not in anatomy.tensors or bits.numel() != -(-anatomy.tensors[name].numel // 8):
            raise UserError(f"model.mask: '{name}' of {folder} does not fit the model; give the mask of the same shape")
    return WeightMask.from_packed(packed, anatomy)
