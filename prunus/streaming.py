"""Weights that stay in files: a model on the meta device whose modules read theirs when they run.

Methods and the sweep go through a model block by block. Here a block's weights (or those of the embedding, the last norm,
the head) are in memory only while it is their turn; what a method changed in them is put aside in a scratch file when the
next one's turn comes. So nobody but the `Store` knows the difference, and memory holds one block, not the model.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import heap, hf, tensorfiles
from .anatomy import Anatomy
from .cut import SlicePlan
from .source import DTYPES, Source
from .tensorfiles import Scratch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Turns(MutableMapping[str, Tensor]):
    """Live weights of a meta model by name, one block (or outer module) at a time: running or asking makes its turn.

    A tensor from here must not be changed once another block's turn has come. `files` holds all that is not live.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, files: MutableMapping[str, Tensor]) -> None:
        self.files = files
        self._live: dict[str, tuple[Tensor, int]] = {}  # with the version that it had when it was read
        self._turn: nn.Module | None = None
        self._owner: dict[str, nn.Module] = {}  # of each weight: the block or outer module whose turn makes it live
        self._homes: dict[str, list[tuple[nn.Module, str, nn.Parameter]]] = {}  # a tied head's is also the embedding's
        self._names: dict[nn.Module, list[str]] = {}
        homes: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                homes.setdefault(id(parameter), []).append((module, leaf))
        for name, tensor in anatomy.tensors.items():
            parameter = model.get_parameter(name)
            self._homes[name] = [(module, leaf, parameter) for module, leaf in homes[id(parameter)]]
            owners = [module for module, _, _ in self._homes[name]]
            if tensor.layer is not None:
                owners = [model.get_submodule(anatomy.block_name(tensor.layer).rstrip("."))]
            self._owner[name] = owners[0]
            for owner in owners:
                self._names.setdefault(owner, []).append(name)
        for owner in self._names:
            owner.register_forward_pre_hook(lambda module, _: self.take(module))
        model.register_forward_hook(lambda *_: self.release())

    def take(self, owner: nn.Module) -> None:
        """All weights of a block or an outer module become live, and no other."""
        if self._turn is not owner:
            self.release()
            self._turn = owner
        for name in self._names[owner]:
            self._read(name)

    def _read(self, name: str) -> Tensor:
        if name not in self._live:
            parameter = nn.Parameter(self.files[name], requires_grad=False)
            for module, leaf, _ in self._homes[name]:
                module._parameters[leaf] = parameter
            live = parameter.detach()
            self._live[name] = (live, live._version)
        return self._live[name][0]

    def release(self) -> None:
        """Nothing is live: what was changed goes to the files, and the modules are empty again."""
        for name, (tensor, version) in self._live.items():
            if tensor._version != version:
                self.files[name] = tensor
            for module, leaf, empty in self._homes[name]:
                module._parameters[leaf] = empty
        self._live, self._turn = {}, None
        heap.give_back()

    def __getitem__(self, name: str) -> Tensor:
        if self._turn is None or name not in self._names[self._turn]:
            self.release()
            self._turn = self._owner[name]
        return self._read(name)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self[name].copy_(tensor)

    def __delitem__(self, name: str) -> None:
        raise TypeError("the weights of a model in files are not taken away one by one")

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


class Sliced(MutableMapping[str, Tensor]):
    """The tensors of a cut model by their new names, each cut when it is asked for; those that are set are held."""

    def __init__(self, tensors: MutableMapping[str, Tensor], recipe: SlicePlan) -> None:
        self.tensors, self.recipe = tensors, recipe
        self.before = {new: old for old, new in recipe.names.items()}
        self.added: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.added:
            return self.added[name]
        old = self.before[name]
        tensor = self.tensors[old]  # read just now, so what is not cut needs no copy
        return self.recipe.apply(old, tensor) if old in self.recipe.rows or old in self.recipe.scale else tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.added[name] = tensor

    def __delitem__(self, name: str) -> None:
        self.before.pop(name, None)
        self.added.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter({**self.before, **self.added})

    def __len__(self) -> int:
        return len({**self.before, **self.added})


class Files:
    """The `Store` of a job whose weights are in files: first those of the source, then those of the cut model."""

    streams = True

    def __init__(self, source: Source, dtype: str, scratch: Path) -> None:
        self.dtype, self.scratch = DTYPES[dtype], scratch
        stored = source.stored(dtype)
        self.model = hf.unfilled(source.config, self.dtype)
        self.model.generation_config = source.generation_config()
        self.weights = Turns(self.model, source.anatomy, ChainMap(self.room(), stored))  # type: ignore[arg-type]

    def room(self) -> MutableMapping[str, Tensor]:
        """A scratch file."""
        return Scratch(self.scratch)

    def slice_(self, tensors: MutableMapping[str, Tensor], recipe: SlicePlan) -> MutableMapping[str, Tensor]:
        """Nothing is cut yet: each tensor will be when it is asked for."""
        self.weights.release()
        return Sliced(self.weights.files, recipe)

    def build(self, config: PreTrainedConfig, tensors: MutableMapping[str, Tensor], generation: Any) -> PreTrainedModel:
        """A meta model again, on the cut tensors."""
        anatomy = Anatomy.of(config)
        assert set(tensors) == set(anatomy.tensors), sorted(set(tensors) ^ set(anatomy.tensors))
        self.model = hf.unfilled(config, self.dtype)
        self.model.generation_config = generation
        self.weights = Turns(self.model, anatomy, ChainMap(self.room(), tensors))
        return self.model

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """The files that transformers would write, the weights one tensor after another."""
        config = model.config
        config.dtype, config.architectures = str(self.dtype).removeprefix("torch."), [type(model).__name__]
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        self.weights.release()
        names = hf.names_in_files(config)
        specs = {names.get(name, name): (self.dtype, t.shape) for name, t in Anatomy.of(config).tensors.items()}
        tensors = ((names.get(name, name), self.weights.files[name]) for name in self.weights)
        tensorfiles.write(folder / "model.safetensors", specs, tensors)
