"""Commands on pages are run, page by page, each page in a folder of its own where a tiny model goes by the big one's name.

What is scaled down stands in `SMALLER`; all else is typed as a reader would type it. Of tutorials everything is done: each builds
what it needs, its Python is run, other programs are started, and what it shows is what was said.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import checkpoints
import numpy as np
import pipeline
import pytest
import tiny
import torch
from test_docs import ROOT, blocks, commands, lines_of
from test_tasks import rows_of

from prunus.criteria import UNIT_CRITERIA
from prunus.data.shards import MANIFEST
from prunus.data.tokenizer import fingerprint, open_tokenizer
from prunus.ledger import Ledger
from prunus.methods import METHODS, ONE_SHOT
from prunus.study import run
from prunus.study.file import Study
from prunus.study.steps import Step
from prunus.tasks.table import TASKS

TINY = (
    "{model_type: llama, vocab_size: 320, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 3, "
    "num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 512}"
)
SMALLER = {  # what a page says -> what a model of a ten-thousandth of the size can do in a second
    "--vocab-size 4096": "--vocab-size 320",
    "--ratio 0.2 --calibration": "--ratio 0.2 --windows 8 --seq-len 128 --calibration",
    'ratio=0.2, calibration="help.jsonl"': 'ratio=0.2, calibration="help.jsonl", text=prunus.TextOptions(8, 128)',
    "tests/conformance tests/test_hf.py tests/test_families.py": "tests/conformance/test_counts.py",
    "-k ernie": "-k 'ernie and (conformance or flap or shortgpt)'",
    "-k energy": "-k 'test_energy or energy and (llama_tied or gemma2 or saved)'",
    "SmolLM2-135M --text wiki.txt": "SmolLM2-135M --text wiki.txt --windows 4 --seq-len 256",
    "model.shape: nano": f"model.shape: {TINY}",
    "--parent-params 3.1M --target-params 2M --tokens 500k": "--parent-params 48k --target-params 34k --tokens 8k",
    "--parent-params 3.1M --target-params 2M --tokens 2.5M": "--parent-params 48k --target-params 34k --tokens 24k",
    "train scratch --tokenizer": f"train scratch --set 'model.shape={TINY}' --set data.seq_len=32 --tokenizer",
    "--set precision=float32 --set prune": "--set precision=float32 --set data.seq_len=32 --set prune",
    "--target-params 100M --tokens 500M": "--target-params 300k --tokens 1500k",
    "hidden_size=468": "hidden_size=60",
    "hidden_size=432": "hidden_size=56",
    "intermediate_size=1280": "intermediate_size=112",
    "intermediate_size=1024": "intermediate_size=96",
    "hidden_size: 480, intermediate_size: 1280": "hidden_size: 60, intermediate_size: 112",
    "--tokens 1M": "--tokens 16k --set compile=false",
    "--tokens 4M": "--tokens 8k",
    "--tokens 200k": "--tokens 8k --set compile=false",
    "num_hidden_layers=24": "num_hidden_layers=10",
    "--target-params 100M": "--target-params 380k --tokens 66k --set precision=float32",
    "--out runs/sheared-llama": "--out runs/sheared-llama --tokens 66k --set precision=float32",
    "--documents=-20:": "--documents=-20: --windows 4 --seq-len 256",
    "--group-size 32": "--group-size 8",
    "--coverage 0.99": "--coverage 0.2",
    "tune ./out": "tune ./out --set held_out=4 --set batch=4",
    "teacher.top_k=64": "teacher.top_k=64 --tokens 8k --set compile=false",
    "--cost decode-ms": "--cost prefill-ms",  # to decode with a channel more costs so small a model nothing
    "--multiple-of 8 --allocate": "--multiple-of 2 --allocate",
    "[1000000, 2000000]": "[8192, 16384]",
    "short_tokens=1000000": "short_tokens=8192",
    "2007040": "16384",
    "507904": "8192",
    "2514944": "24576",
    "within: 0.05": "within: 0.5",  # an update is a third of all
    "[flap, minitron-depth], data.seed: [0, 1]": "[flap], data.seed: [1]",
    "generations=10": "generations=2",
    "quickstart": "quickstart --source ./SmolLM2-135M",
    "measure ./out": "measure ./out --threads 1 --batches 1 --contexts 16 --repeats 1",
    "--threads 2 --batches 1 --contexts 512": "",
    "--threads 1,2 --batches 1,4 --contexts 128,512": "",
}
ASK = f"#!{sys.executable}\nimport json, sys\nfor pair in map(json.loads, sys.stdin):\n    print(json.dumps({{'winner': 'tie'}}))\n"
MODELS = ("SmolLM2-135M", "Llama-3.2-1B", "parent", "cut")
WRITES = "prune compare-methods train data quickstart export quantize tune trim".split()  # a place that must be free
TUTORIALS = "docs/tutorials/"
QUICK = ("README.md", "docs/data.md", TUTORIALS)  # the others take minutes in all


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
    (tmp_path / "sbatch").write_text("#!/bin/bash\necho 4711\n", encoding="utf-8")  # takes the job, and that is all
    (tmp_path / "sbatch").chmod(0o755)
    rows = [{"instruction": "the cat", "output": "sat on the mat"}] * 12
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    for name in ("recipes", "studies"):  # some pages are read in a clone
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "scratch").mkdir()
    Ledger(stages=[]).write(tmp_path / "scratch" / "ledger.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")  # a wide window: no table is folded
    monkeypatch.setattr(run, "_Process", Here)
    pipeline.verify_here(monkeypatch)
    return tmp_path


class Here:
    """A step of a study in this process instead of one of its own, which costs seconds."""

    def __init__(self, study: Study, step: Step, out: Path, processes: int, tell: run.Tell) -> None:
        self.code, _, self.said = pipeline.cli("study", "step", study.path, step.name, "--out", out)

    def poll(self) -> int:
        return self.code

    def reason(self, code: int) -> str:
        return self.said


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
    """Pages with commands, and all tutorials; the long ones marked."""
    tutorials = [page.relative_to(ROOT).as_posix() for page in sorted((ROOT / TUTORIALS).glob("*.md"))]
    names = dict.fromkeys([*(page for page, _ in commands()), *tutorials])
    return [pytest.param(name, marks=() if name.startswith(QUICK) else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("page", pages())
def test_commands_run(page, desk):
    """A block that begins with a comment of a file's name is that file; every other one is what its language says."""
    reader = Reader(desk) if page.startswith(TUTORIALS) else None
    for language, text in blocks(page):
        if named := re.match(r"# ([\w./-]+\.\w+)\n", text):
            (desk / named[1]).write_text(scaled(text), encoding="utf-8")
        elif reader is not None:
            reader.does(language, text)
        elif language == "bash":
            for line in lines_of(text):
                if line.startswith("prunus ") and not line.startswith("prunus push"):  # there is no network
                    words = shlex.split(scaled(line))[1:]
                    made_room(words)
                    code, out, said = pipeline.cli(*words)
                    assert code == 0, f"{line}\n{said[-3000:]}"
                    assert out.strip(), line


class Reader:
    """Goes through a tutorial block by block, and remembers what was said last."""

    def __init__(self, desk: Path) -> None:
        for name in ("prunus", "tests"):  # some tutorials work in a clone
            shutil.copytree(ROOT / name, desk / name)
        shutil.copy(ROOT / "pyproject.toml", desk)
        self.said = ""
        self.names: dict[str, Any] = {"__name__": "__main__"}
        ours = {"PATH": f"{desk}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.environment = os.environ | ours | {"PYTHONPATH": os.pathsep.join([str(desk), *filter(None, sys.path)])}

    def does(self, language: str, text: str) -> None:
        """One block; of any other kind there must be none."""
        if language == "python":
            self.said = self.python(scaled(text))
        elif language == "bash":
            self.said = "".join(map(self.command, lines_of(text)))
        else:
            assert language == "text", f"no way to do a block of {language}"
            shown_in(text, self.said)

    def python(self, text: str) -> str:
        """What a block prints; names live on."""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(text, "block", "exec"), self.names)
        return said.getvalue()

    def command(self, line: str) -> str:
        """What a command says, its progress first: ours in this process, where a fresh one costs seconds, any other in a shell."""
        words = shlex.split(scaled(line))
        if words[0] == "prunus":
            code, out, said = pipeline.cli(*words[1:])
        elif words[0] == "python" and words[1].endswith(".py"):
            code, out, said = with_a_file(*words[1:])
        else:
            shell = {"shell": True, "env": self.environment, "timeout": 300}
            done = subprocess.run(scaled(line), capture_output=True, text=True, **shell)
            code, out, said = done.returncode, done.stdout, done.stderr
        assert code == 0, f"{line}\n{out[-3000:]}\n{said[-3000:]}"
        return said + out


def with_a_file(name: str, *words: str) -> tuple[int, str, str]:
    """The command line with what a file adds to its tables, which are afterwards as before."""
    answers = []

    def main() -> None:
        answers.append(pipeline.cli(*words))

    with contextlib.ExitStack() as kept:
        for table in (METHODS, ONE_SHOT, UNIT_CRITERIA):
            kept.enter_context(mock.patch.dict(table))
        kept.enter_context(mock.patch("prunus.cli.main", main))
        runpy.run_path(name, run_name="__main__")
    return answers[0]


def shown_in(text: str, said: str) -> None:
    """Every line that a page shows was said, in this order. A figure stands for any figure, an ellipsis for anything."""
    left = iter(map(without_figures, said.splitlines()))
    for line in text.splitlines():
        pattern = re.escape(without_figures(line)).replace("…", ".*")
        assert pattern == ".*" or any(re.fullmatch(pattern, heard) for heard in left), f"{line}\nwas not said here:\n{said}"


def without_figures(line: str) -> str:
    """Single blanks, and `#` for every number with its prefix of thousands."""
    return re.sub(r"\d(?:[\d,.]*\d)?(?: [kMG](?![a-z]))?", "#", " ".join(line.split()))


def test_what_is_shown_must_have_been_said_in_this_order():
    said = "step 1 of 12\nparameters  521.1 k  at most 421.2 k\nverified in a clean process: logits differ by at most 0\n"
    shown_in("parameters 134.5 M at most 113.3 M\n…\nverified …: logits differ by at most …\n", said)
    for wrong in ("parameters 134.5 M", "verified …\nparameters …", "step … of … steps", "parameters 1 M at least 1 M"):
        with pytest.raises(AssertionError, match="was not said here"):
            shown_in(wrong, said)
