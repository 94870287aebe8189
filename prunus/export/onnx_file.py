"""A checkpoint as one ONNX graph with a KV cache, float32 or with 8-bit weights and activations, checked in ONNX Runtime.

Names are the ones that `optimum` made common: `input_ids` and `attention_mask` in, `past_key_values.N.key|value` in,
`logits` and `present.N.key|value` out. Shapes: B prompts, T new tokens, P tokens behind them, S = P + T.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import record, reload, verification
from ..errors import UserError, VerificationError, unknown
from ..hf import quiet, rotary_types
from ..place import check_files, scratch, unbroken
from ..source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS: Mapping[str, str] = {
    "f32": "float32",
    "int8": "products of 8-bit weights, a scale a column, and 8-bit activations, a scale a product; the head in float32",
    "q8": "products of 8-bit weights and activations, a scale for every 32 of a row; the head in float32",
    "q4": "the same with 4-bit weights",
}
BLOCK = 32  # weights that share a scale in q8 and q4
OUTLIER = 8.0  # a product stays in float32 where one token's largest input is so many times the usual token's: 3 of 8 bits are lost
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_LARGE = 1_900_000_000  # bytes; a protobuf file ends at 2 GB, and larger weights stand in a file beside it
_NEW_TOKENS = 8
_TOLERANCE = 1e-3  # of the largest logit: other kernels, other orders of sums; models here come to 1e-6


@dataclass(frozen=True)
class Plan:
    """What will be written; made from the config alone."""

    source: Source
    kind: str

    @classmethod
    def of(cls, source: Source, kind: str) -> Plan:
        """UserError for what cannot be written, or if a library is missing."""
        if kind not in KINDS:
            raise unknown("type", kind, KINDS)
        if missing := [name for name in _NEEDED if find_spec(name) is None]:
            raise UserError(f"onnx: {', '.join(missing)} is not installed; pip install 'prunus[onnx]'")
        if source.anatomy.shape.is_ragged:
            raise UserError(
                "onnx: query heads that share KV heads unevenly are not written; write prunus.unshared(model) first"
            )
        if "dynamic" in rotary_types(source.config):
            raise UserError(
                "onnx: rotary angles of type dynamic follow the longest text so far, which no graph holds; serve it by transformers"
            )
        return cls(source, kind)

    @property
    def is_large(self) -> bool:
        """Whether weights stand in a file of their own."""
        return self.source.anatomy.weight_bytes(4) > _LARGE


class WithCache(nn.Module):
    """A causal language model as a function of tensors alone: the cache comes in and goes out as a list of pairs."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        config = model.config
        window = getattr(config, "sliding_window", None)
        kinds = list(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
        self.windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """input_ids [B, T] and attention_mask [B, S], both int64, and keys and values [B, heads, P, head_dim] a layer."""
        from transformers import DynamicCache

        tokens = input_ids.shape[1]
        positions_BT = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -tokens:]
        masks = {kind: self._mask(attention_mask, tokens, window) for kind, window in self.windows.items()}
        out = self.model(
            input_ids=input_ids,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=positions_BT,
            past_key_values=DynamicCache(past_key_values),
            use_cache=True,
        )
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]

    def _mask(self, attention_mask: Tensor, tokens: int, window: int | None) -> Tensor:
        """What is added to attention scores [B, 1, T, S]: 0 where a token is seen."""
        whole = attention_mask.shape[1]
        reads_T, told_S = torch.arange(tokens) + (whole - tokens), torch.arange(whole)
        ahead_TS = reads_T[:, None] - told_S[None]
        seen_TS = ahead_TS >= 0 if window is None else (ahead_TS >= 0) & (ahead_TS < window)
        seen = seen_TS[None, None] & attention_mask.bool()[:, None, None, :]
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def export(plan: Plan, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the graph, compare it with the model in ONNX Runtime, and put it in place; VerificationError leaves nothing."""
    beside = out.with_name(out.name + ".data")
    check_files(out, *([beside] if plan.is_large else []), overwrite=overwrite)
    model = plan.source.load("float32")
    try:
        with scratch(out) as folder:
            stage = folder / out.name
            modules, left = write(model, stage, plan), list[str]()
            if plan.kind != "f32":
                left = outliers(model) if plan.kind == "int8" else []
                kept = {name for name, module in modules.items() if module in left}
                stage = _quantised(stage, folder / plan.kind / out.name, plan, kept)
            found = compare(model, Session(stage), exact=plan.kind == "f32")
            size = sum(path.stat().st_size for path in stage.parent.iterdir() if path.is_file())
            with unbroken():
                if plan.is_large:
                    stage.with_name(beside.name).replace(beside)
                stage.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    return {
        "out": str(out),
        "format": "onnx",
        "type": plan.kind,
        "bytes": size,
        "verified": found,
        "notes": _notes(plan, left),
    }


def write(model: PreTrainedModel, path: Path, plan: Plan) -> dict[str, str]:
    """The graph in float32; prompts, new tokens and tokens behind them are free. Says which module each product comes from."""
    import onnx

    shape = plan.source.anatomy.shape
    heads = [layer.num_key_value_heads for layer in shape.layers]
    sizes = [(count, shape.head_dim) if count else (1, 1) for count in heads]  # without attention: the marker of `Skipped`
    past = [tuple(torch.zeros(2, count, 5, size) for _ in range(2)) for count, size in sizes]
    inputs = (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), past)
    free = torch.export.Dim.DYNAMIC
    dims = ({0: free, 1: free}, {0: free, 1: free}, [({0: free, 2: free}, {0: free, 2: free}) for _ in past])
    names = [f"{i}.{part}" for i in range(len(past)) for part in ("key", "value")]
    with _silent(), torch.no_grad():
        program: Any = torch.onnx.export(
            WithCache(model), inputs, dynamo=True, dynamic_shapes=dims, verbose=False,
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
        )  # fmt: skip
        told = {"version": record.versions()["prunus"], "source": plan.source.label, "source_sha256": plan.source.sha256}
        program.model.metadata_props.update({f"prunus.{name}": value for name, value in told.items()})
        program.save(str(path), external_data=plan.is_large)
    proto = onnx.load(str(path), load_external_data=False)
    modules = {}
    for node in proto.graph.node:
        told = {entry.key: entry.value for entry in node.metadata_props}
        if node.op_type == "MatMul" and (scopes := ast.literal_eval(told.get("pkg.torch.onnx.name_scopes", "[]"))):
            modules[node.name] = scopes[-2].removeprefix("model.") if len(scopes) > 1 else ""
        del node.metadata_props[:]  # they quote source files by their places on this machine
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    onnx.save(proto, str(path))
    onnx.checker.check_model(str(path))
    return modules


@torch.no_grad()
def outliers(model: PreTrainedModel) -> list[str]:
    """Linear modules of blocks to which some token brings far larger numbers than others do, as down_proj's massive activations.

    One scale for all tokens would leave the others hardly any of their bits. Looked for on random tokens: what comes first in a
    prompt is large whatever it is (Sun et al. 2024, arXiv:2402.17762).
    """
    ids = torch.randint(0, model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    found: dict[str, float] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def look(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                largest = inputs[0].abs().amax(-1)
                found[name] = float(largest.max() / largest.median().clamp(min=1e-30))

            hooks.append(module.register_forward_pre_hook(look))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, ratio in found.items() if ratio > OUTLIER]


@contextmanager
def _silent() -> Iterator[None]:
    """Exporters tell of what they skip and would rather be told, on every channel there is; what they made is checked here."""
    said, before = StringIO(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(said), redirect_stderr(said), quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _quantised(path: Path, out: Path, plan: Plan, kept: Collection[str]) -> Path:
    """The same graph with products of few bits by ONNX Runtime's own tools; the head, and what is named, stay as they are."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    out.parent.mkdir()
    graph = onnx.load(str(path), load_external_data=False).graph
    left = [node.name for node in graph.node if "logits" in node.output or node.name in kept]
    with _silent():
        if plan.kind == "int8":
            quantize_dynamic(
                str(path), str(out), weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"],
                nodes_to_exclude=left, use_external_data_format=plan.is_large, extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
        else:
            blocks = MatMulNBitsQuantizer(
                onnx.load(str(path)), bits=8 if plan.kind == "q8" else 4, block_size=BLOCK, is_symmetric=True,
                accuracy_level=4, nodes_to_exclude=left,  # 4: activations in int8, too
            )  # fmt: skip
            blocks.process()
            blocks.model.save_model_to_file(str(out), plan.is_large)
    return out


class Session:
    """A graph that was written here, run by ONNX Runtime on as many threads as torch has."""

    def __init__(self, path: Path):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = {entry.name: entry.shape for entry in self.session.get_inputs()}
        self.past = {name: (shape[1], shape[3]) for name, shape in inputs.items() if name.startswith("past_key_values.")}
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def start(self, batch: int) -> dict[str, np.ndarray]:
        """The cache before the first token."""
        return {name: np.zeros((batch, heads, 0, size), np.float32) for name, (heads, size) in self.past.items()}

    def __call__(
        self, ids_BT: np.ndarray, past: Mapping[str, np.ndarray], mask_BS: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits [B, T, V] float32 and the cache behind these tokens."""
        behind = next(iter(past.values())).shape[2]
        mask = np.ones((len(ids_BT), behind + ids_BT.shape[1]), np.int64) if mask_BS is None else mask_BS
        found = dict(
            zip(self.outputs, self.session.run(None, {"input_ids": ids_BT, "attention_mask": mask, **past}), strict=True)
        )
        logits = found.pop("logits")
        return logits, {name.replace("present.", "past_key_values."): value for name, value in found.items()}

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """`count` tokens behind one prompt, by arg-max through the cache."""
        past, step, out = self.start(1), np.array([ids], np.int64), list[int]()
        for _ in range(count):
            logits, past = self(step, past)
            step = logits[:, -1:].argmax(-1).astype(np.int64)
            out.append(int(step[0, 0]))
        return out


@torch.no_grad()
def compare(model: PreTrainedModel, session: Session, *, exact: bool) -> dict[str, Any]:
    """Logits of two prompts, one of them padded on the left, and greedy tokens through the cache, against the model's own."""
    found = verification.probe(model, _NEW_TOKENS)
    ids_BT = torch.tensor(found.ids)[:2]
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, : ids_BT.shape[1] // 3] = 0
    past = session.start(len(ids_BT))
    half = ids_BT.shape[1] // 2  # in two steps, so that the cache counts
    first, past = session(ids_BT[:, :half].numpy(), past, mask_BT[:, :half].numpy())
    second, _ = session(ids_BT[:, half:].numpy(), past, mask_BT.numpy())
    ours = torch.from_numpy(np.concatenate([first, second], axis=1))
    alone = [model(input_ids=row[None, mask.bool()]).logits[0] for row, mask in zip(ids_BT, mask_BT, strict=True)]
    theirs = torch.cat(alone).float()
    ours = ours[mask_BT.bool()]
    difference, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
    prompt = found.ids[0][: len(found.ids[0]) // 2]
    tokens = session.greedy(prompt, _NEW_TOKENS)
    wanted = reload.greedy(model, torch.tensor([prompt]), _NEW_TOKENS)
    if not np.isfinite(difference):
        raise VerificationError("onnx: ONNX Runtime gives NaN or infinite logits")
    if exact and (difference > _TOLERANCE * max(scale, 1.0) or tokens != wanted):
        raise VerificationError(
            f"onnx: ONNX Runtime computes something else than the model: logits differ by {difference:.3g} of {scale:.3g}, "
            f"tokens {tokens} for {wanted}; nothing was written"
        )
    same = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=True)) if a != b), _NEW_TOKENS)
    import onnxruntime

    return {
        "onnxruntime": onnxruntime.__version__, "max_logit_difference": difference, "max_logit": scale,
        "same_tokens": same, "tokens": _NEW_TOKENS,
    }  # fmt: skip


def _notes(plan: Plan, left: Sequence[str]) -> list[str]:
    out = []
    if plan.is_large:
        out.append("its weights stand in a file of the same name with .data behind it; move both together")
    if left:
        out.append(
            f"{len(left)} products stay in float32 ({left[0]} and others): single tokens bring {OUTLIER:g} times and more the "
            "usual numbers to them, and all tokens of a product share a scale; q8 has a scale for every 32 numbers"
        )
    if plan.kind != "f32":
        out.append("few bits change what a model says; score it before it is shipped (docs/quantization.md)")
    return out
