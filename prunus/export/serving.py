"""Who can serve a checkpoint: engines, what each asks of a shape, and the step that would mend a no. A table with its sources.

What was not run here is said to be read, and no more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError
from ..families import PRUNED_PREFIX
from ..hf import rotary_types
from ..source import Source
from . import gguf_file

Verdict = Literal["yes", "no", "read, not run"]


@dataclass(frozen=True)
class Facts:
    """What engines ask after."""

    architecture: str  # the class named in config.json
    family: str
    differ: bool  # layers differ in size
    uneven: bool  # query heads share KV heads unevenly
    turned: bool  # the stream changes its basis at every sub-layer
    no_mlp: bool  # some layer has no MLP
    no_first_attention: bool  # layer 0 has no attention
    biased: bool  # the config asks for attention_bias
    head_dim: int
    zeros: bool  # single weights are cut
    dynamic: bool = False  # rotary angles follow the text's length
    no_gguf: str = ""  # why no GGUF file of it is written

    @classmethod
    def of(cls, source: Source) -> Facts:
        """Of a config; no weight is read."""
        config, shape = source.config, source.anatomy.shape
        differ = config.model_type.startswith(PRUNED_PREFIX)
        named = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        turned = bool(getattr(config, "stream_size", None))
        zeros = (source.path / "prunus" / "mask.safetensors").is_file()
        bare = [layer.skipped for layer in shape.layers]
        return cls(
            named, source.anatomy.family.name, differ, shape.is_ragged, turned, any("mlp" in gone for gone in bare),
            "attention" in bare[0], "attention_bias" in source.anatomy.flags, shape.head_dim, zeros,
            "dynamic" in rotary_types(config), _no_gguf(source),
        )  # fmt: skip


def _no_gguf(source: Source) -> str:
    """What export would say: activation, rotary angles and tokenizer are looked at there."""
    if source.kind == "gguf":  # it is one
        return ""
    try:
        gguf_file.Plan.of(source, "f16")
    except UserError as error:
        return str(error).removeprefix("gguf: ")
    return ""


@dataclass(frozen=True)
class Rule:
    """What an engine cannot do, why, what would mend it, and where that is written."""

    forbids: Callable[[Facts], bool]
    reason: str  # "{fact}" stands for a fact
    mend: str
    source: str


@dataclass(frozen=True)
class Engine:
    """An engine at a version: run here, or read about on a date."""

    version: str
    ran: bool
    how: str  # to serve what it can
    rules: tuple[Rule, ...]
    source: str
    date: str


_UNIFORM = "cut with --uniform, so that all layers are alike"
_DIFFER: Callable[[Facts], bool] = lambda facts: facts.differ  # noqa: E731
_GGUF_ALIKE, _GGUF_DIFFER = ("llama", "mistral", "qwen2", "qwen3"), ("llama", "mistral")
_FLASH_HEADS = (32, 64, 96, 128, 160, 192, 224, 256)

ENGINES: Mapping[str, Engine] = {
    "transformers": Engine(
        "5.23.0", True, "from_pretrained; of layers that differ with trust_remote_code=True, or prunus imported",
        (), "every checkpoint is loaded in a clean process when it is saved", "2026-11-23",
    ),
    "llama.cpp": Engine(
        "xllamacpp 2026.10.11549", True, "prunus export --format gguf",
        (
            Rule(lambda f: f.uneven, "it knows no KV heads shared unevenly", "prunus.unshared(model)", "the fields of gguf 0.19"),
            Rule(lambda f: f.turned, "it has no tensors for a turned stream", "cut by another method", "the tensors of gguf 0.19"),
            Rule(
                lambda f: f.biased and f.family == "qwen3", "it has no place for the biases of Qwen3's attention_bias",
                "serve it by transformers or ONNX Runtime", "tests/test_gguf.py",
            ),
            Rule(
                lambda f: f.no_mlp, "it leaves out the attention of a layer without an MLP, too",
                "cut with a method that leaves every layer its MLP", "tests/test_gguf.py (slow)",
            ),
            Rule(
                lambda f: f.no_first_attention, "it takes the size of all heads from layer 0, which has no attention",
                "cut with a method that leaves layer 0 its attention", "tests/test_gguf.py (slow)",
            ),
            Rule(
                lambda f: f.family not in (_GGUF_DIFFER if f.differ else _GGUF_ALIKE),
                "prunus writes no GGUF of this family", f"{_UNIFORM}, or serve it by transformers", "prunus/export/gguf_file.py",
            ),
            Rule(
                lambda f: bool(f.no_gguf), "{no_gguf}", "else serve it by transformers or ONNX Runtime",
                "prunus/export/gguf_file.py",
            ),
        ),
        "tests/test_gguf.py (slow)", "2026-11-23",
    ),
    "ONNX Runtime": Engine(
        "1.32.0", True, "prunus export --format onnx; --type q8 for a processor",
        (
            Rule(
                lambda f: f.uneven, "KV heads shared unevenly are not written", "prunus.unshared(model)",
                "prunus/export/onnx_file.py",
            ),
            Rule(
                lambda f: f.dynamic, "no graph holds rotary angles of type dynamic", "serve it by transformers",
                "prunus/export/onnx_file.py",
            ),
        ),
        "every graph is run and compared when it is written; tests/test_onnx.py", "2026-11-23",
    ),
    "vLLM": Engine(
        "read 2026-11", False, "vllm serve DIR, if its list of models has the architecture",
        (
            Rule(
                _DIFFER, "all layers share one config (AnyModel, which would lift that, is an open pull request)", _UNIFORM,
                "github.com/vllm-project/vllm/pull/36512",
            ),
            Rule(
                lambda f: f.head_dim not in _FLASH_HEADS, "its FlashAttention backend knows certain head sizes only",
                "VLLM_ATTENTION_BACKEND=FLEX_ATTENTION, which its message recommends",
                "docs.vllm.ai/en/v0.10.1.1/api/vllm/v1/attention/backends/flash_attn",
            ),
        ),
        "docs.vllm.ai", "2026-11-23",
    ),
    "SGLang": Engine(
        "read 2026-11", False, "python -m sglang.launch_server --model-path DIR, if its list of models has the architecture",
        (Rule(_DIFFER, "a pruned_ type is none of its architectures", _UNIFORM, "github.com/sgl-project/sglang/issues/18458"),),
        "github.com/sgl-project/sglang/issues/18458", "2026-11-23",
    ),
    "TensorRT-LLM": Engine(
        "as of 2024-05", False, "trtllm-build, if it knows the architecture",
        (Rule(_DIFFER, "layers of different sizes are not supported", _UNIFORM, "github.com/NVIDIA/TensorRT-LLM/issues/1600"),),
        "github.com/NVIDIA/TensorRT-LLM/issues/1600", "2026-11-23",
    ),
}  # fmt: skip
ZEROS = (
    "its zeros are stored and multiplied like other weights by all of these; vLLM removed its 2:4 support "
    "(github.com/vllm-project/vllm/pull/36799)"
)


def check(source: Source) -> dict[str, Any]:
    """A verdict an engine, with the reason and the mend of every no."""
    facts = Facts.of(source)
    rows = {name: _verdict(engine, facts) for name, engine in ENGINES.items()}
    return {
        "model": source.label,
        "architecture": facts.architecture,
        "engines": rows,
        "notes": [ZEROS] if facts.zeros else [],
    }


def _verdict(engine: Engine, facts: Facts) -> dict[str, Any]:
    told: dict[str, Any] = {"version": engine.version, "source": engine.source, "date": engine.date}
    found = next((rule for rule in engine.rules if rule.forbids(facts)), None)
    if found is not None:
        return told | {
            "verdict": "no",
            "reason": found.reason.format_map(vars(facts)),
            "mend": found.mend,
            "source": found.source,
        }
    verdict: Verdict = "yes" if engine.ran else "read, not run"
    return told | {"verdict": verdict, "how": engine.how}
