"""A checkpoint as one GGUF file that stock llama.cpp runs: alike layers under their own architecture, layers that differ as `deci`.

Tensors are read, turned and written one at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from .. import record
from ..errors import UserError, unknown
from ..hf import PRUNED_PREFIX
from ..place import check_files, staged_files
from ..source import Source
from .vocabulary import Vocabulary

Kind = gguf.GGMLQuantizationType
KINDS: Mapping[str, Any] = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
FILE_KINDS = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's numbers for what most of a file is
BLOCK = 32  # weights that share a scale


@dataclass(frozen=True)
class Architecture:
    """llama.cpp's name, its tensor names, and whether it turns neighbours (q and k rows are then reordered)."""

    name: str
    names: Any
    interleaved: bool


_LLAMA = Architecture("llama", gguf.MODEL_ARCH.LLAMA, True)
ALIKE = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": Architecture("qwen3", gguf.MODEL_ARCH.QWEN3, False),
}
DIFFERENT = Architecture("deci", gguf.MODEL_ARCH.DECI, True)
_AS_DECI = ("llama", "mistral")
_SILU = ("silu", "swish")  # transformers' names of the one activation of all these architectures
_UNBIASED = ("qwen3",)  # llama.cpp reads no biases of its attention


@dataclass(frozen=True)
class Plan:
    """What will be written; made from the config and the tokenizer alone."""

    source: Source
    architecture: Architecture
    vocabulary: Vocabulary
    kind: str

    @classmethod
    def of(cls, source: Source, kind: str) -> Plan:
        """UserError, with the step that would mend it, for what llama.cpp cannot run."""
        if kind not in KINDS:
            raise unknown("type", kind, KINDS)
        if source.kind == "gguf":
            raise UserError(f"gguf: {source.label} is a GGUF file already; give a Hugging Face folder")
        anatomy, config, family = source.anatomy, source.config, source.anatomy.family.name
        if anatomy.shape.is_ragged:
            raise UserError(
                "gguf: llama.cpp knows no query heads that share KV heads unevenly; write prunus.unshared(model) first"
            )
        if getattr(config, "stream_size", None):
            raise UserError(
                "gguf: its layers hand on a turned stream, which llama.cpp has no tensors for; use --uniform methods"
            )
        alike = not config.model_type.startswith(PRUNED_PREFIX)
        known = ALIKE if alike else dict.fromkeys(_AS_DECI, DIFFERENT)
        if family not in known:
            where = "" if alike else " with layers that differ"
            raise UserError(
                f"gguf: {family}{where} is not written; {', '.join(known)} are. Cut with --uniform, or export ONNX"
            )
        if family in _UNBIASED and "attention_bias" in anatomy.flags:
            raise UserError(f"gguf: {family} with attention_bias has biases that llama.cpp has no place for; export ONNX")
        bare = [layer.skipped for layer in anatomy.shape.layers]
        gone = next((i for i, skipped in enumerate(bare) if "mlp" in skipped), None)
        if gone is not None:
            raise UserError(
                f"gguf: layer {gone} has no MLP, and llama.cpp leaves out the attention of such a layer, too; export ONNX, or "
                "cut with a method that leaves every layer its MLP"
            )
        if "attention" in bare[0]:
            raise UserError(
                "gguf: layer 0 has no attention, and llama.cpp takes the size of all heads from there; export ONNX, or cut with "
                "a method that leaves layer 0 its attention"
            )
        if config.hidden_act not in _SILU:
            raise UserError(
                f"gguf: hidden_act is {config.hidden_act}, and llama.cpp takes silu in this architecture; export ONNX"
            )
        rope = dict(getattr(config, "rope_parameters", None) or {})
        if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"gguf: rotary angles of type {rope.get('rope_type')} are not written; export ONNX")
        return cls(source, known[family], Vocabulary.of(source.tokenizer(), anatomy.shape.vocab_size), kind)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the file."""
        out = []
        if self.kind == "q8_0" and (wide := self._unquantised()):
            out.append(
                f"{len(wide)} matrices have rows that are no multiple of {BLOCK} and stay f16 ({wide[0]} and others); cut with "
                f"--multiple-of {BLOCK} for smaller and faster files"
            )
        window = getattr(self.source.config, "sliding_window", None)
        if window:
            out.append(f"llama.cpp sees all tokens in this architecture, so the context is cut to the window of {window}")
        return out

    def _unquantised(self) -> list[str]:
        tensors = self.source.anatomy.tensors
        return [name for name, t in tensors.items() if t.is_matrix and t.shape[-1] % BLOCK]


def export(plan: Plan, out: Path, *, modelfile: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Write the file, whole or not at all, and beside it an ollama Modelfile if it is wanted; what is in it."""
    named = out.with_name(out.name + ".Modelfile")
    same = (
        named.is_file() and not out.exists() and named.read_text(encoding="utf-8") == _modelfile(plan, out)
    )  # left by a kill
    check_files(out, *([named] if modelfile and not same else []), overwrite=overwrite)
    with staged_files(out, *([named] if modelfile else [])) as (stage, *beside):
        sizes = _write(plan, stage)
        for path in beside:
            path.write_text(_modelfile(plan, out), encoding="utf-8")
    return {
        "out": str(out), "format": "gguf", "architecture": plan.architecture.name, "type": plan.kind, "bytes": out.stat().st_size,
        "tensors": sizes, "splits_text_as": plan.vocabulary.rule, "notes": plan.notes,
    }  # fmt: skip


def _modelfile(plan: Plan, out: Path) -> str:
    """For `ollama create NAME -f FILE`: it takes the template from the GGUF, and stops where the tokenizer ends a turn."""
    eos = plan.vocabulary.special.get("eos")
    stop = "" if eos is None else f"PARAMETER stop {json.dumps(plan.vocabulary.tokens[eos], ensure_ascii=False)}\n"
    return f"FROM ./{out.name}\n{stop}"


def _write(plan: Plan, path: Path) -> dict[str, int]:
    """Tensors of each kind."""
    anatomy, arch = plan.source.anatomy, plan.architecture
    writer = gguf.GGUFWriter(str(path), arch.name, use_temp_file=False)
    _describe(writer, plan)
    names = gguf.get_tensor_name_map(arch.names, anatomy.shape.num_hidden_layers)
    stored = plan.source.stored("float32")
    todo = []
    for name, tensor in anatomy.tensors.items():
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert called is not None, f"{name} has no name in {arch.name}"
        kind = _kind(plan.kind, tensor.shape)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind) if kind == Kind.Q8_0 else tensor.shape
        width = {Kind.F32: 4, Kind.F16: 2, Kind.BF16: 2}.get(kind)
        count = int(np.prod(shape)) * (width or 1)
        writer.add_tensor_info(called, shape, np.dtype(np.uint8 if width is None else f"u{width}"), count, raw_dtype=kind)
        todo.append((name, kind))
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, kind in todo:
            writer.write_tensor_data(_data(_turned(plan, name, stored[name]), kind))
    return dict(Counter(kind.name.lower() for _, kind in todo))


def _kind(asked: str, shape: tuple[int, ...]) -> Any:
    """Vectors stay float32; rows that no scale fits stay float16."""
    if len(shape) < 2:
        return Kind.F32
    return Kind.F16 if asked == "q8_0" and shape[-1] % BLOCK else KINDS[asked]


def _data(tensor: Tensor, kind: Any) -> np.ndarray:
    array = tensor.numpy()
    if kind == Kind.F16:
        if float(np.abs(array).max(initial=0.0)) > 65504:
            raise UserError("gguf: a weight is beyond what float16 holds; use --type bf16 or f32")
        return array.astype(np.float16).view(np.uint16)
    if kind == Kind.BF16:
        return tensor.to(torch.bfloat16).view(torch.uint16).numpy()
    return array.view(np.uint32) if kind == Kind.F32 else gguf.quantize(array, kind)


def _turned(plan: Plan, name: str, tensor: Tensor) -> Tensor:
    """Rows of q and k in llama.cpp's order: the two halves that turn together as neighbours."""
    if not plan.architecture.interleaved or not any(part in name for part in (".q_proj.", ".k_proj.")):
        return tensor.contiguous()
    size = plan.source.anatomy.shape.head_dim
    rows, rest = tensor.shape[0], tensor.shape[1:]
    return tensor.reshape(rows // size, 2, size // 2, *rest).swapaxes(1, 2).reshape(rows, *rest).contiguous()


def _describe(writer: gguf.GGUFWriter, plan: Plan) -> None:
    """Everything but tensors."""
    source, shape, config, words = plan.source, plan.source.anatomy.shape, plan.source.config, plan.vocabulary
    layers = shape.layers

    def each(values: list[int]) -> Any:
        return values[0] if len(set(values)) == 1 and plan.architecture is not DIFFERENT else values

    writer.add_name(source.label)
    writer.add_file_type(FILE_KINDS[plan.kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("prunus.version", record.versions()["prunus"])
    known = getattr(config, "max_position_embeddings", 2048)
    writer.add_context_length(min(known, getattr(config, "sliding_window", None) or known))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(each([layer.intermediate_size for layer in layers]))
    writer.add_head_count(each([layer.num_attention_heads for layer in layers]))
    writer.add_head_count_kv(each([layer.num_key_value_heads for layer in layers]))
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.rule)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    writer.add_token_merges(words.merges)
    writer.add_add_bos_token(words.adds_bos)
    writer.add_add_space_prefix(False)
    for name, add in (
        ("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):  # fmt: skip
        if name in words.special:
            add(words.special[name])
    for name, template in words.chat_templates.items():  # the library's own call writes their names in any order
        own = gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name)
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE if name == "default" else own, template)
    if named := sorted(words.chat_templates.keys() - {"default"}):
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, named)
