"""Verdicts of engines: by what a checkpoint is, with a source for each, and true where the engine is at hand."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pipeline
import pytest
from pipeline import cli

from prunus.errors import UserError
from prunus.export.gguf_file import Plan
from prunus.export.serving import ENGINES, ZEROS, Facts, _verdict, check
from prunus.source import Source

STOCK = Facts(
    "LlamaForCausalLM", "llama", differ=False, uneven=False, turned=False, no_mlp=False, no_first_attention=False, biased=False,
    head_dim=64, zeros=False,
)  # fmt: skip


def verdicts(facts):
    return {name: _verdict(engine, facts)["verdict"] for name, engine in ENGINES.items()}


def test_rows_have_their_sources():
    for name, engine in ENGINES.items():
        assert engine.source and engine.date >= "2026" and engine.version, name
        assert all(rule.reason and rule.mend and rule.source for rule in engine.rules), name
    assert {name for name, engine in ENGINES.items() if engine.ran} == {"transformers", "llama.cpp", "ONNX Runtime"}


@pytest.mark.parametrize(
    ("changes", "noes"),
    [
        ({}, set()),
        ({"differ": True}, {"vLLM", "SGLang", "TensorRT-LLM"}),
        ({"differ": True, "family": "qwen2"}, {"llama.cpp", "vLLM", "SGLang", "TensorRT-LLM"}),
        ({"differ": True, "uneven": True}, {"llama.cpp", "ONNX Runtime", "vLLM", "SGLang", "TensorRT-LLM"}),
        ({"differ": True, "turned": True}, {"llama.cpp", "vLLM", "SGLang", "TensorRT-LLM"}),
        ({"differ": True, "no_mlp": True}, {"llama.cpp", "vLLM", "SGLang", "TensorRT-LLM"}),
        ({"differ": True, "no_first_attention": True}, {"llama.cpp", "vLLM", "SGLang", "TensorRT-LLM"}),
        ({"biased": True}, set()),
        ({"biased": True, "family": "qwen3"}, {"llama.cpp"}),
        ({"family": "gemma"}, {"llama.cpp"}),
        ({"head_dim": 65}, {"vLLM"}),
        ({"dynamic": True}, {"ONNX Runtime"}),
    ],
)
def test_what_hinders_whom(changes, noes):
    found = verdicts(replace(STOCK, **changes))
    assert {name for name, verdict in found.items() if verdict == "no"} == noes
    assert {found[name] for name in ("vLLM", "SGLang", "TensorRT-LLM")} <= {"no", "read, not run"}


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen3", "gemma", "phi", "gpt_neox"])
def test_llama_cpps_verdict_is_what_export_does(case):
    source = Source.open(str(pipeline.folder(case)))
    refused = check(source)["engines"]["llama.cpp"]["verdict"] == "no"
    with pytest.raises(UserError) if refused else nullcontext():
        Plan.of(source, "f16")


def test_on_the_command_line(tmp_path):
    out = tmp_path / "out"
    assert (
        cli(
            "prune",
            pipeline.folder(),
            "-m",
            "wanda",
            "-r",
            0.5,
            "-c",
            pipeline.text_file(),
            "--windows",
            2,
            "--seq-len",
            16,
            "-o",
            out,
        )[0]
        == 0
    )
    code, said, _ = cli("export", out, "--check")
    assert code == 0 and "read, not run" in said and "multiplied like other weights" in said
    told = json.loads(cli("export", out, "--check", "--json")[1])
    assert told["notes"] == [ZEROS] and told["architecture"] == "LlamaForCausalLM"
    assert cli("export", out)[::2] == (2, "prunus: Missing option '--out', the file to write; --check writes none\n")
