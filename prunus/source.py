"""Where a model comes from: a Hugging Face folder, a GGUF file, or a hub name. Checked before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from . import heap, hf
from .anatomy import Anatomy
from .errors import UserError, unknown
from .headers import Entry, gguf_metadata, safetensors_entries, sha256
from .hf import quiet
from .manifest import MANIFEST
from .reading import check_regular, check_tokenizer, first_line, refusing, table_of
from .sealed import stamp
from .tensorfiles import Stored, check_finite, same_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNREADABLE = (  # what the libraries raise over a config, weights or a tokenizer that are wrong
    ValueError, OSError, LookupError, TypeError, RuntimeError, AttributeError, ArithmeticError, AssertionError,
    StrictDataclassError, SafetensorError,
)  # fmt: skip
QUANTIZED = "quantized.json"  # how a folder with fewer bits was made
_LONGEST_NAME = 255  # bytes, as file systems have it
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What llama.cpp calls a pre-tokenizer, where transformers' conversion drops it: these split digits one by one first.
_SPLITS_DIGITS = ("smollm",)
_KNOWN_PRE = (*_SPLITS_DIGITS, None, "default", "gpt-2", "llama-bpe", "llama3", "qwen2")


@dataclass(frozen=True)
class Source:
    """A model that can be opened. Making one reads its config and headers, never its weights."""

    name: str  # as the user gave it
    path: Path  # the folder (a cached snapshot for hub names) or the GGUF file
    kind: Literal["folder", "gguf", "hub"]
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, name: str, *, online: bool = False, quantized: bool = False) -> Source:
        """Find and check a source; UserError says what is missing or broken and how to mend it.

        Weights of few bits can be run but not cut or trained, so who opens them says that it only runs them.
        """
        path = Path(name).expanduser()
        if path.is_file():
            if path.suffix != ".gguf":
                raise UserError(f"{name}: a model is a Hugging Face folder or a .gguf file; got a file '{path.suffix}'")
            note = "GGUF weights are dequantised; the model cannot be better than what quantisation left"
            source = cls(name, path, "gguf", (note,), gguf_metadata(path))
        elif path.is_dir():
            source = cls(name, path, "folder")
        else:
            source = cls(name, _snapshot(name, online), "hub")
        if source.kind != "gguf":
            source._check_folder()
        _ = source._stamps  # as they are before anything of them is read
        if source.is_quantized and not quantized:
            raise UserError(
                f"{name}: its weights are quantised ({source._quantization.get('quant_method')}), which eval and measure can "
                "run, and nothing can cut, train or export; give the folder that it was made from"
            )
        return source

    @cached_property
    def _quantization(self) -> dict[str, Any]:
        found = None if self.kind == "gguf" else table_of(self.path / "config.json").get("quantization_config")
        return found if isinstance(found, dict) else {}

    @property
    def is_quantized(self) -> bool:
        """Whether the folder's matrices are held in few bits (a GGUF file's are, but they are read as what they stand for)."""
        return bool(self._quantization)

    @property
    def label(self) -> str:
        """The name that goes into records: no folders of the user's machine."""
        return self.name if self.kind == "hub" else self.path.resolve().name

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""
        if self.kind == "gguf":
            return [self.path]
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            shards = table_of(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise UserError(f"{index}: weight_map must say for every tensor which file holds it; the index is corrupt")
            names = sorted(set(shards.values()))
            if any(Path(name).name != name for name in names):
                raise UserError(f"{index}: a shard's name leaves the folder; the index is corrupt")
            if any(len(name.encode()) > _LONGEST_NAME for name in names):
                raise UserError(f"{index}: a shard's name has more than {_LONGEST_NAME} bytes; the index is corrupt")
            if wrong := [name for name in names if not name.endswith(".safetensors")]:
                raise UserError(f"{index}: its shard {wrong[0]!r} is no safetensors file; the index is corrupt")
            return [self.path / name for name in names]
        return [self.path / "model.safetensors"]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the weight files' bytes; UserError if they are not what was opened, or what prunus wrote there."""
        found = sha256(self.weight_files)
        if self._stamps != [stamp(file) for file in self.weight_files]:
            raise UserError(f"{self.name}: its weights were changed while they were read; run this again")
        told = table_of(self.path / MANIFEST).get("weights_sha256") if (self.path / MANIFEST).is_file() else None
        if told not in (None, found):
            raise UserError(
                f"{self.name}: its weights are not those that prunus wrote there (SHA-256); prune again, or delete its {MANIFEST} "
                "if you changed them yourself"
            )
        return found

    @cached_property
    def _stamps(self) -> list[tuple[int, int, int] | None]:
        return [stamp(file) for file in self.weight_files]

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The Hugging Face config; never runs remote code."""
        from transformers import AutoConfig

        from . import modeling_pruned  # noqa: F401  (registers pruned_<type>)

        try:
            with quiet():
                if self.kind == "gguf":
                    config = AutoConfig.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
                    return _clean(config)
                return AutoConfig.from_pretrained(str(self.path), local_files_only=True, trust_remote_code=False)
        except UNREADABLE as error:
            model_type = self.metadata.get("general.architecture")
            if self.kind != "gguf":
                model_type = table_of(self.path / "config.json").get("model_type")
            if isinstance(model_type, str):
                self._check_family(model_type)  # an unknown one has a better sentence
            raise UserError(f"{self.name}: the config cannot be read: {first_line(error)}") from error

    @cached_property
    def anatomy(self) -> Anatomy:
        """Axes and counts, from the config alone."""
        config = self.config
        try:
            anatomy = Anatomy.of(config)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error
        if self.kind != "gguf" and not self.is_quantized:  # whose tensors have names of the library that packed them
            self._check_shapes(anatomy)
        return anatomy

    def _check_folder(self) -> None:
        config = self.path / "config.json"
        if not config.exists():
            raise UserError(f"{self.name}: no config.json in this folder; a Hugging Face model folder has one")
        check_regular(self.path)
        model_type = table_of(config).get("model_type")
        if not isinstance(model_type, str):
            raise UserError(f"{config}: model_type is {model_type!r}; a model's config names its type")
        self._check_family(model_type)
        for file in self.weight_files:
            if not file.is_file():
                pickled = [p.name for pattern in PICKLED for p in self.path.glob(pattern)]
                why = (
                    f"only {pickled[0]}, which would have to be unpickled; convert it to safetensors" if pickled else "none"
                )
                raise UserError(f"{self.name}: {file.name} is missing, found {why}")
        whole = self.path / "model.safetensors"
        if whole.is_file() and whole not in self.weight_files:  # which transformers would load instead of the shards
            raise UserError(
                f"{self.name}: holds {whole.name} and an index of other shards, and nothing says which weights are meant; remove "
                "one of them"
            )
        self._check_depth()

    def _check_family(self, model_type: str) -> None:
        from .families import family_of

        try:
            family_of(model_type)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    @cached_property
    def _saved(self) -> dict[str, Entry]:
        return {name: entry for file in self.weight_files for name, entry in safetensors_entries(file).items()}

    def _check_depth(self) -> None:
        """UserError for a depth that the files cannot have: transformers and we build a thing a layer before any check."""
        data = table_of(self.path / "config.json")
        text = data.get("text_config")
        depth = (text if isinstance(text, dict) else data).get("num_hidden_layers")
        if isinstance(depth, int) and depth > len(self._saved):
            raise UserError(
                f"{self.name}: config.json asks for {depth:,} layers (num_hidden_layers), but the weight files hold only "
                f"{len(self._saved):,} tensors"
            )

    def _entries(self, anatomy: Anatomy) -> dict[str, Entry]:
        """Declared name -> where its tensor lies, under whichever of its names the files have it; without what they lack."""
        found, aliases = self._saved, anatomy.family.saved_as
        named = any(name in found or aliases.get(name) in found for name in anatomy.tensors)
        prefix = "" if named else anatomy.family.blocks.split(".")[0] + "."
        out = {}
        for name in anatomy.tensors:
            for candidate in (name, aliases.get(name, name), name.removeprefix(prefix)):
                if candidate in found:
                    out[name] = found[candidate]
                    break
        return out

    def _check_shapes(self, anatomy: Anatomy) -> None:
        entries = self._entries(anatomy)
        for name, tensor in anatomy.tensors.items():
            if name not in entries:
                raise UserError(
                    f"{self.name}: the weights lack '{name}', which config.json asks for; the checkpoint is incomplete"
                )
            if entries[name].shape != tensor.shape:
                raise UserError(
                    f"{self.name}: '{name}' has shape {list(entries[name].shape)}, but config.json asks for "
                    f"{list(tensor.shape)}"
                )

    def stored(self, dtype: str = "float32") -> Stored:
        """The weights of a folder by their declared names, each read when it is asked for."""
        assert self.kind != "gguf"
        family, entries = self.anatomy.family, self._entries(self.anatomy)
        head, embedding = self._saved.get(f"{family.head}.weight"), entries[f"{family.embedding}.weight"]
        if self.anatomy.shape.tie_word_embeddings and head is not None and not same_bytes(head, embedding):
            raise UserError(f"{self.name}: config.json ties the head to the embedding, but the files hold another matrix")
        return Stored(entries, DTYPES[dtype], self.name)

    def generation_config(self) -> Any:
        """What the folder says about generation, or what its config implies: as transformers finds it when it loads."""
        from transformers import GenerationConfig

        with quiet():
            read: Callable[..., Any] = GenerationConfig.from_pretrained
            try:
                return read(str(self.path), local_files_only=True)
            except OSError:
                implied = {"config_file_name": "config.json", "_from_model_config": True}
                return read(str(self.path), local_files_only=True, **implied)
            except UNREADABLE as error:
                raise UserError(f"{self.name}: generation_config.json cannot be read: {first_line(error)}") from error

    def load(self, dtype: str = "float32") -> PreTrainedModel:
        """Read the weights; UserError if any is NaN or infinite."""
        from transformers import AutoModelForCausalLM, GgufConfig

        where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        path = str(self.path)
        if self.kind == "gguf":
            where = {"gguf_file": self.path.name, "quantization_config": GgufConfig(dequantize=True)}
            path = str(self.path.parent)
        self.anatomy.checked()
        self.check_dtype(dtype)
        needed, free = self.anatomy.weight_bytes(DTYPES[dtype].itemsize), heap.free_bytes()
        if not self.is_quantized and free is not None and needed > free:
            raise UserError(
                f"{self.name}: its weights take {needed / 1e9:.2f} GB in {dtype}, but {free / 1e9:.2f} GB of memory are free; "
                "use --dtype bfloat16, or --stream where a command has it, or end other programs"
            )
        try:
            with quiet():
                model = AutoModelForCausalLM.from_pretrained(path, config=self.config, dtype=DTYPES[dtype], **where)
        except UNREADABLE as error:
            raise UserError(f"{self.name}: the weights cannot be read: {first_line(error)}") from error
        if self.kind == "gguf":
            model.config = self.config
            model.generation_config._from_model_config = False
        for name, tensor in hf.weights(model, self.anatomy).items():
            if type(tensor) is torch.Tensor:  # few bits cannot hold anything else
                check_finite(tensor, f"{self.name}: '{name}'")
        return model.eval()

    def check_dtype(self, dtype: str) -> None:
        """UserError, before any weight is read, for a dtype in which the weights cannot be had."""
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        if not self.is_quantized:
            return
        method, made = self._quantization.get("quant_method"), str(self.config.dtype).removeprefix("torch.")
        if method != "torchao":
            raise UserError(f"{self.name}: its weights are quantised by {method}; only what prunus quantize wrote is read")
        if find_spec("torchao") is None:
            raise UserError(f"{self.name}: its weights are quantised by torchao; pip install 'prunus[quantize]'")
        if made != dtype:
            raise UserError(f"{self.name}: its scales and its other weights are {made}; give --dtype {made}")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fast tokenizer; UserError if there is none or if it knows more tokens than the model."""
        from transformers import AutoTokenizer

        where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        path = str(self.path)
        if self.kind == "gguf":
            where, path = {"gguf_file": self.path.name}, str(self.path.parent)
        elif (self.path / "tokenizer.json").is_file():
            check_tokenizer(self.path / "tokenizer.json")
        with refusing(f"{self.name}: the tokenizer cannot be read"), quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, **where)
        if not tokenizer.is_fast:
            raise UserError(f"{self.name}: the tokenizer has no tokenizer.json; save a fast one into the folder")
        if self.kind == "gguf":
            _mend_pretokenizer_(tokenizer, self.metadata.get("tokenizer.ggml.pre"))
            _drop_endoftext_(tokenizer, self.anatomy.shape.vocab_size)
        highest, vocab = max(tokenizer.get_vocab().values(), default=-1), self.anatomy.shape.vocab_size
        if highest >= vocab:
            raise UserError(
                f"{self.name}: the tokenizer has token {highest}, but the model's vocabulary ends at {vocab - 1}; "
                "it is another model's tokenizer"
            )
        return tokenizer

    @property
    def all_notes(self) -> list[str]:
        """What to tell the user about this source."""
        pre = self.metadata.get("tokenizer.ggml.pre")
        if pre in _KNOWN_PRE:
            return list(self.notes)
        unsure = f"this GGUF's pre-tokenizer '{pre}' is taken as transformers converts it, which was not checked"
        return [*self.notes, unsure]


def _snapshot(name: str, online: bool) -> Path:
    """The local snapshot of a hub name: from the cache, or downloaded if the user asked to go online."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        with quiet():
            return Path(snapshot_download(name, local_files_only=not online, allow_patterns=patterns))
    except (OSError, ValueError, HFValidationError) as error:
        if online:
            raise UserError(f"{name}: not a local folder, and the hub did not give it: {first_line(error)}") from error
        raise UserError(
            f"{name}: no such file or folder, and not in the local Hugging Face cache; --online would download it"
        ) from error


def _clean(config: PreTrainedConfig) -> PreTrainedConfig:
    """GGUF stores float32: 9.999999747378752e-06 means 1e-05. The title in it is no path."""
    import numpy as np

    eps = getattr(config, "rms_norm_eps", None)
    if isinstance(eps, float):
        config.rms_norm_eps = float(str(np.float32(eps)))
    config._name_or_path = ""
    return config


def _drop_endoftext_(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Changes `tokenizer`: transformers' GGUF conversion adds an end-of-text token of its own behind the vocabulary."""
    from tokenizers import Tokenizer

    if tokenizer.get_vocab().get("<|endoftext|>", -1) >= vocab_size:
        data = json.loads(tokenizer.backend_tokenizer.to_str())
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<|endoftext|>"]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))


def _mend_pretokenizer_(tokenizer: PreTrainedTokenizerBase, pre: str | None) -> None:
    """Changes `tokenizer`: transformers ignores `tokenizer.ggml.pre` and builds a plain byte-level pre-tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if pre in _SPLITS_DIGITS:
        byte_level = ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), byte_level])
