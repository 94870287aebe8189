"""Commands on pages are run, page by page, each page in a folder of its own where a tiny model goes by the big one's name.

What is scaled down stands in `SMALLER`; all else is typed as a reader would type it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pipeline
import pytest
import tiny
import torch
from test_docs import ROOT, commands
from test_tasks import rows_of

from prunus.data.shards import MANIFEST
from prunus.data.tokenizer import fingerprint, open_tokenizer
from prunus.ledger import Ledger
from prunus.tasks.table import TASKS

SMALLER = {  # what a page says -> what a model of a ten-thousandth of the size can do in a second
    "--target-params 100M --tokens 500M": "--target-params 300k --tokens 1500k",
    "hidden_size=468": "hidden_size=60",
    "hidden_size=432": "hidden_size=56",
    "intermediate_size=1280": "intermediate_size=112",
    "hidden_size: 480, intermediate_size: 1280": "hidden_size: 60, intermediate_size: 112",
    "--tokens 1M": "--tokens 16k --set compile=false",
    "--tokens 4M": "--tokens 8k",
    "--tokens 200k": "--tokens 8k --set compile=false",
    "num_hidden_layers=24": "num_hidden_layers=10",
    "--target-params 100M": "--target-params 380k --tokens 66k --set precision=float32",
    "--out runs/sheared-llama": "--out runs/sheared-llama --tokens 66k --set precision=float32",
    "--group-size 32": "--group-size 8",
    "--coverage 0.99": "--coverage 0.2",
    "tune ./out": "tune ./out --set held_out=4 --set batch=4",
    "teacher.top_k=64": "teacher.top_k=64 --tokens 8k --set compile=false",
    "--cost decode-ms": "--cost prefill-ms",  # to decode with a channel more costs so small a model nothing
    "--multiple-of 8 --allocate": "--multiple-of 2 --allocate",
    "[1000000, 2000000]": "[8192, 16384]",
    "2007040": "16384",
    "507904": "8192",
    "2514944": "24576",
    "within: 0.05": "within: 0.5",  # an update is a third of all
    "[flap, minitron-depth], data.seed: [0, 1]": "[flap], data.seed: [1]",
    "generations=10": "generations=2",
    "quickstart": "quickstart --source ./SmolLM2-135M",
    "--vocab-size 4096": "--vocab-size 320",
    "measure ./out": "measure ./out --threads 1 --batches 1 --contexts 16 --repeats 1",
    "--threads 2 --batches 1 --contexts 512": "",
    "--threads 1,2 --batches 1,4 --contexts 128,512": "",
}
ASK = f"#!{sys.executable}\nimport json, sys\nfor pair in map(json.loads, sys.stdin):\n    print(json.dumps({{'winner': 'tie'}}))\n"
MODELS = ("SmolLM2-135M", "Llama-3.2-1B", "parent", "cut")
WRITES = "prune compare-methods train data quickstart export quantize tune trim".split()  # a place that must be free
QUICK = ("README.md", "docs/data.md")  # the others take minutes in all


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Twelve blocks of heads as SmolLM2 has them, an eighth as wide."""
    config = tiny.tiny_config(
        "llama_tied", vocab_size=pipeline.VOCAB, hidden_size=72, intermediate_size=128, head_dim=8, num_hidden_layers=12,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
    )  # fmt: skip
    dense = tiny.grown(config, dtype=torch.float32)
    return checkpoints.save_folder(tmp_path_factory.mktemp("model") / "tiny", dense, pipeline.tokenizer())


def texts(seed: int, size: int) -> list[str]:
    """Documents of two hundred words."""
    words = " ".join(pipeline.corpus()).split()
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(words, size=200)) for _ in range(size)]


@pytest.fixture
def desk(model, tmp_path, monkeypatch):
    """A folder with what the pages take for granted."""
    for name in MODELS:
        shutil.copytree(model, tmp_path / name)
    (tmp_path / "c4.jsonl").write_text("".join(json.dumps({"text": doc}) + "\n" for doc in texts(0, 400)), encoding="utf-8")
    (tmp_path / "wiki.txt").write_text("\n\n".join(texts(1, 60)), encoding="utf-8")
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(texts(2, 300)), encoding="utf-8")
    for name, task in TASKS.items():
        (tmp_path / "tasks" / name).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows_of(name, 4))
        (tmp_path / "tasks" / name / f"{task.split}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("the cat\nold trees\n", encoding="utf-8")
    (tmp_path / "ask.py").write_text(ASK, encoding="utf-8")
    (tmp_path / "ask.py").chmod(0o755)
    rows = [{"instruction": "the cat", "output": "sat on the mat"}] * 12
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "scratch").mkdir()
    Ledger(stages=[]).write(tmp_path / "scratch" / "ledger.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    pipeline.verify_here(monkeypatch)
    return tmp_path


def scaled(line: str) -> str:
    """A command or file that a tiny model can follow."""
    for large, small in SMALLER.items():
        line = line.replace(large, small)
    return line


def made_room(words: list[str]) -> None:
    """Every command is an example of its own: what it writes anew is not there, and what an earlier page wrote is."""
    for option in ("-o", "--out"):
        if option in words and words[0] in WRITES:
            made = Path(words[words.index(option) + 1])
            shutil.rmtree(made, ignore_errors=True) if made.is_dir() else made.unlink(missing_ok=True)
    if "./out" in words[1:2] and not Path("out").exists():
        must("prune", "SmolLM2-135M", "-m", "flap", "-r", "0.2", "-c", "c4.jsonl", "-o", "out")
    if "runs/other" in words and not Path("runs/other").exists():
        shutil.copytree("runs/nano", "runs/other")
    for before, word in pairwise(words):
        if before in ("-o", "--out"):
            continue
        told = word + (Path(word).read_text() if word.endswith(".yaml") and Path(word).exists() else "")
        if "./tokenizer" in told and not Path("tokenizer").exists():
            must("data", "tokenizer", "stories.txt", "--vocab-size", "320", "-o", "tokenizer")
        if "./tokens" in told and words[0] != "data":
            made_tokens("tokenizer" if "./tokenizer" in " ".join((*words, told)) else "SmolLM2-135M")


def made_tokens(tokenizer: str) -> None:
    """`./tokens` by the tokenizer of the command that reads it: a page may train a model of its own and then cut the big one."""
    made = Path("tokens", MANIFEST)
    if not made.exists() or json.loads(made.read_text())["tokenizer_sha256"] != fingerprint(open_tokenizer(tokenizer)):
        shutil.rmtree("tokens", ignore_errors=True)
        must("data", "prepare", "c4.jsonl", "--tokenizer", tokenizer, "--out", "tokens")


def must(*words: object) -> None:
    code, _, said = pipeline.cli(*words)
    assert code == 0, (words, said[-3000:])


def pages() -> list[Any]:
    """Pages with commands, the long ones marked."""
    names = dict.fromkeys(page for page, _ in commands())
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("page", pages())
def test_commands_run(page, desk):
    shown = (ROOT / page).read_text(encoding="utf-8")
    for yaml, name in re.findall(r"```yaml\n(.*?)```\s*```bash\n[^`]*?([\w-]+\.yaml)", shown, re.S):
        (desk / name).write_text(scaled(yaml), encoding="utf-8")
    for where, line in commands():
        if where == page and not line.startswith("prunus push"):  # there is no network
            words = shlex.split(scaled(line))[1:]
            made_room(words)
            code, out, said = pipeline.cli(*words)
            assert code == 0, f"{line}\n{said[-3000:]}"
            assert out.strip(), line
