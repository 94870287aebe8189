"""SliceGPT: turn the residual stream into its principal directions, then cut those that carry least.

An RMSNorm without gain commutes with an orthogonal Q, norm(x Q) = norm(x) Q, so once the gains are folded into the matrices
that read them every matrix can be turned and the model computes what it did. Its place says in which basis a tensor stands:
place 2 l is the stream that enters attention of block l, 2 l + 1 its MLP, and 2 L what leaves the last block.

Shapes: B windows, T tokens, D the stem's size d, K the directions kept d'. A basis is [D, K]: directions in its columns.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .anatomy import SHORTCUTS, Anatomy, Tensor_
from .distributed import World
from .hf import build
from .job import Job, Outcome
from .keep import Keep
from .statistics import Sweep

_STEM = ("hidden",)


@torch.no_grad()
def run_(job: Job) -> Outcome:
    """Carry out a plan: find the directions, turn and cut every tensor, build. Consumes the job's model."""
    plan, model = job.plan, job.model
    assert plan.target is not None
    size = plan.counts["hidden"]
    with job.timed("score"):
        bases = _per_block(job, size) if plan.target.anatomy.is_sliced else _shared(job, size)
    with job.timed("cut"):
        generation = model.generation_config
        torch.nn.Module.to(model, device="meta")  # lets go of the weights: the job now holds the only references
        turned = turned_(plan.anatomy, job.tensors, bases, plan.target.anatomy.shape.hidden_size)
        cut = build(plan.target.config, turned, generation)
    keep = Keep({"hidden": tuple(range(size))})
    return Outcome(plan, cut, plan.target, keep=keep, seconds=job.seconds, notes=tuple(job.notes))


# -- where the stream goes ------------------------------------------------------------------------------------------------


@dataclass
class Gram:
    """X^T X [D, D] over all tokens of a signal, float64: its smallest directions matter here as much as its largest.

    With an `eps` every token is divided by its root mean square first, as the norm that reads it does.
    """

    eps: float | None = None
    total_DD: Tensor | None = None

    def update(self, x_BTD: Tensor) -> None:
        """Add a batch."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1]).double()
        if self.eps is not None:
            x_ND = x_ND * (x_ND.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        if self.total_DD is None:
            self.total_DD = x_ND.T @ x_ND
        else:
            self.total_DD.addmm_(x_ND.T, x_ND)

    def settle(self, world: World) -> None:
        """Bring in what the other processes saw."""
        assert self.total_DD is not None
        world.sum_(self.total_DD)


def _gram(job: Job) -> Gram:
    return Gram(job.model.config.rms_norm_eps if job.plan.options["signal"] == "normed" else None)


def directions(gram_DD: Tensor, size: int) -> Tensor:
    """The `size` principal directions [D, K] of a signal, largest eigenvalue first, float64."""
    return torch.linalg.eigh(gram_DD).eigenvectors.flip(1)[:, :size].contiguous()


def _shared(job: Job, size: int) -> list[Tensor | None]:
    """One basis for all places: of the sum over them of X^T X / tr(X^T X), so that late layers do not drown early ones."""
    sweep, norms = job.sweep(), stem_norms(job.plan.anatomy)
    count = len(sweep.blocks)
    total_DD = torch.zeros(job.plan.anatomy.shape.hidden_size, job.plan.anatomy.shape.hidden_size, dtype=torch.float64)
    for layer in range(count):
        grams = {norms[place]: _gram(job) for place in (2 * layer, 2 * layer + 1) if place in norms}
        if layer + 1 < count:
            with sweep.collecting(grams):
                sweep.run(layer)
        else:
            sweep.observe(layer, grams)
        for gram in grams.values():
            assert gram.total_DD is not None
            total_DD += gram.total_DD / gram.total_DD.trace()
        job.progress("score", layer + 1, count)
    basis: Tensor | None = directions(total_DD, size)
    return [basis] * (2 * count + 1)


def _per_block(job: Job, size: int) -> list[Tensor | None]:
    """A basis for every place, of the signal that comes there through the sliced places before it (SliceGPT section 3.3).

    The dense blocks run in the original basis: to slice a stream is to project it on the directions kept. The last place
    has none: what leaves the last block stands in the original basis.
    """
    sweep, norms = job.sweep(), stem_norms(job.plan.anatomy)
    count = len(sweep.blocks)
    bases: list[Tensor | None] = []
    for layer in range(count):
        entry, between = _gram(job), _gram(job)
        for hidden_BTD in sweep.hidden:
            entry.update(hidden_BTD)
        entry.settle(sweep.world)
        assert entry.total_DD is not None
        bases.append(directions(entry.total_DD, size))
        sweep.hidden = [_projected(hidden_BTD, bases[-1]) for hidden_BTD in sweep.hidden]
        sweep.observe(layer, {norms[2 * layer + 1]: between})
        assert between.total_DD is not None
        bases.append(directions(between.total_DD, size))
        if layer + 1 < count:
            _run_projected(sweep, layer, norms[2 * layer + 1], bases[-1])
        job.progress("score", layer + 1, count)
    return [*bases, None]


def _projected(x_BTD: Tensor, basis_DK: Tensor | None) -> Tensor:
    assert basis_DK is not None
    q_DK = basis_DK.to(x_BTD.dtype)
    return x_BTD @ q_DK @ q_DK.T


def _run_projected(sweep: Sweep, layer: int, norm: str, basis_DK: Tensor | None) -> None:
    """All windows through one block, whose stream is projected where `norm` reads it.

    The block itself adds its MLP's output to the stream as it was before: what the projection took is taken off behind it.
    """
    taken: list[Tensor] = []

    def project(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept_BTD = _projected(args[0], basis_DK)
        taken.append(args[0] - kept_BTD)
        return (kept_BTD, *args[1:])

    def take_off(_: Tensor, after_BTD: Tensor) -> None:
        after_BTD.sub_(taken.pop())

    handle = sweep.model.get_submodule(norm).register_forward_pre_hook(project)
    try:
        sweep.run(layer, each=take_off)
    finally:
        handle.remove()


# -- turning --------------------------------------------------------------------------------------------------------------


def place_of(anatomy: Anatomy, tensor: Tensor_) -> int:
    """The place whose basis a tensor reads (the embedding, which reads none: the one that it writes)."""
    if tensor.layer is None:
        is_embedding = tensor is anatomy.tensors[f"{anatomy.family.embedding}.weight"]
        return 0 if is_embedding else 2 * anatomy.shape.num_hidden_layers
    return 2 * tensor.layer + (tensor.sublayer == "mlp")


def _is_stem_norm(tensor: Tensor_) -> bool:
    return tensor.param.norm and tensor.param.dims == (_STEM,)


def stem_norms(anatomy: Anatomy) -> dict[int, str]:
    """Place -> the module of the norm that reads the stream there."""
    norms = {name: t for name, t in anatomy.tensors.items() if _is_stem_norm(t)}
    return {place_of(anatomy, t): name.removesuffix(".weight") for name, t in norms.items()}


def turned_(
    anatomy: Anatomy, tensors: MutableMapping[str, Tensor], bases: Sequence[Tensor | None], hidden_size: int
) -> dict[str, Tensor]:
    """Every tensor in the bases of its places: readers W -> W diag(gain) Q, writers W -> Q^T W, the embedding E -> E Q.

    Takes the tensors out of `tensors` as it goes. A place without a basis stays as it is. Where the basis changes from one
    place to the next the shortcut matrices Q'^T Q are added; the head is untied. `hidden_size` is what the new config says.
    """
    family, stem = anatomy.family, anatomy.shape.hidden_size
    offset = 1.0 if family.gain == "one_plus_weight" else 0.0
    gains = {place: tensors[f"{norm}.weight"].double() + offset for place, norm in stem_norms(anatomy).items()}
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    untied = anatomy.with_shape(replace(anatomy.shape, tie_word_embeddings=False))
    if head not in tensors:
        tensors[head] = tensors[embedding]
    dtype = tensors[embedding].dtype
    out = _shortcuts(anatomy, bases, dtype)
    for name, spec in untied.tensors.items():
        tensor, place = tensors.pop(name), place_of(untied, spec)
        reads, writes = bases[place], bases[min(place + 1, len(bases) - 1)]
        if _is_stem_norm(spec):
            # a stock norm divides by the number of its channels, d'; what was cut counts as zeros among d
            if reads is not None:
                size = reads.shape[1]
                tensor = torch.full((size,), math.sqrt(stem / size) - offset, dtype=dtype)
            out[name] = tensor
            continue
        dims = spec.param.dims
        if len(dims) == 2 and dims[1] == _STEM and reads is not None:
            scale = math.sqrt(stem / hidden_size) if family.embedding_scaled else 1.0
            tensor = tensor.double() * (scale if name == embedding else gains[place]) @ reads
        if dims[0] == _STEM and writes is not None:
            tensor = writes.T @ tensor.double()
        out[name] = tensor.to(dtype)
    return out


def _shortcuts(anatomy: Anatomy, bases: Sequence[Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """Shortcut matrices [K', K] of all sub-layers; none where all places share one basis."""
    out: dict[str, Tensor] = {}
    if all(basis is bases[0] for basis in bases):
        return out
    for layer in range(anatomy.shape.num_hidden_layers):
        for place, leaf in enumerate(SHORTCUTS, start=2 * layer):
            reads, writes = bases[place], bases[place + 1]
            assert reads is not None
            out[anatomy.block_name(layer) + leaf] = (reads if writes is None else writes.T @ reads).to(dtype)
    return out
