"""Results that are known in closed form, through the whole pipeline: text to tokens, training, cut, evaluation, export, study.

The canary is a model that knows one thing: what follows a token hangs on that token alone, by a table. Its embedding of a token is
a unit vector of its own, its norm stretches that by the square root of the width, and its head is the table's logarithm divided
by that. Attention and MLP are alive but write nothing. So every loss is a mean of the table's logarithms over pairs of tokens,
which are counted here by hand; and a cut of heads, channels, sub-layers or layers changes nothing at all.
"""

import csv
import json
import math

import checkpoints
import numpy as np
import pipeline
import pytest
import tiny
import torch
import training
from pipeline import VOCAB, cli

from prunus import record
from prunus.ledger import Ledger
from prunus.study import file as files
from prunus.study.run import gather
from prunus.study.steps import do, steps
from prunus.train import log

SEQ, WINDOWS = training.SEQ, 12


def table() -> np.ndarray:
    """log P of the next token, of each token: [VOCAB, VOCAB] float64; rows of very different entropy."""
    generator = np.random.default_rng(7)
    logits = generator.standard_normal((VOCAB, VOCAB)) * np.linspace(0, 3, VOCAB)[:, None]
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    """The model as a folder: float32, untied, its width the vocabulary's size rounded up to whole heads."""
    width = -(-VOCAB // 32) * 32
    config = pipeline.config(
        "llama", hidden_size=width, tie_word_embeddings=False, rms_norm_eps=1e-30, max_position_embeddings=64
    )
    model = tiny.grown(config, dtype=torch.float32, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
                weight.zero_()
            elif "norm" in name:
                weight.fill_(1.0)
        model.get_input_embeddings().weight.copy_(torch.eye(VOCAB, width))
        head = torch.zeros(VOCAB, width)
        head[:, :VOCAB] = torch.tensor(table()).T / math.sqrt(width)
        model.get_output_embeddings().weight.copy_(head)
    return checkpoints.save_folder(tmp_path_factory.mktemp("canary") / "model", model, pipeline.tokenizer())


def surprise(ids) -> float:
    """Mean of -log P over the pairs of rows of ids, the plain way."""
    known = table()
    pairs = [(row[i], row[i + 1]) for row in np.asarray(ids).tolist() for i in range(len(row) - 1)]
    return -sum(known[a, b] for a, b in pairs) / len(pairs)


def windows() -> list[list[int]]:
    """Full windows of the whole text: documents joined by blank lines, as docs/protocol.md says."""
    ids = pipeline.tokenizer()("\n\n".join(pipeline.corpus()), add_special_tokens=False)["input_ids"]
    return [ids[i : i + SEQ] for i in range(0, len(ids) - SEQ + 1, SEQ)][:WINDOWS]


# Its float32 head is off by 6e-8 relative, logits of at most 12 by 7e-7, and a loss by less: 1e-6. A wrong window, a dropped
# token or a special one too many moves it by 1e-3 and more.
EXACT = {"abs": 2e-6}


def scored(model, *more) -> float:
    """The loss that `eval` tells, whose perplexity must be of it."""
    where = ("-t", pipeline.text_file(), "--windows", WINDOWS, "--seq-len", SEQ, "--json")
    code, out, err = cli("eval", model, *where, *more)
    assert code == 0, err
    (found,) = json.loads(out)["models"][0]["texts"]
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    return float(found["loss"])


def test_what_it_knows_is_what_eval_tells(canary):
    assert scored(canary) == pytest.approx(surprise(windows()), **EXACT)


CUTS = [("flap", "0.4"), ("wanda-sp", "0.3"), ("minitron-depth", "0.5"), ("wanda", "0.5"), ("sparsegpt", "0.5")]


@pytest.mark.parametrize(("method", "ratio"), CUTS)
def test_a_cut_of_what_says_nothing_changes_nothing(canary, tmp_path, monkeypatch, method, ratio):
    pipeline.verify_here(monkeypatch)
    options = ("-c", pipeline.text_file(), "--windows", 4, "--seq-len", SEQ, "-o", tmp_path / "cut")
    code, _, err = cli("prune", canary, "-m", method, "-r", ratio, *options)
    assert code == 0, err
    assert scored(tmp_path / "cut") == pytest.approx(surprise(windows()), **EXACT)


def test_exported_it_knows_the_same(canary, tmp_path):
    code, _, err = cli("export", canary, "-o", tmp_path / "model.gguf", "--type", "f32")
    assert code == 0, err
    assert scored(tmp_path / "model.gguf") == pytest.approx(surprise(windows()), **EXACT)


def tokens_of(name: str) -> np.ndarray:
    """The ids of a range, straight from its file."""
    (shard,) = json.loads((training.data() / "manifest.json").read_text())["ranges"][name]
    return np.fromfile(training.data() / shard["file"], "<u2").astype(int)


def sequences_of(name: str) -> list[np.ndarray]:
    """All full sequences of a range, each with the id behind it."""
    ids = tokens_of(name)
    return [ids[i : i + SEQ + 1] for i in range(0, len(ids) - SEQ, SEQ)]


def run_of(canary, out, **more):
    """One epoch of all there is, a sequence an update, at a rate that moves no weight that says something."""
    every = sequences_of("retrain")
    fields = {"model": {"source": str(canary)}, "tokens": len(every) * SEQ, "batch_tokens": SEQ, "micro_batch": 1,
              "optimizer": {"lr": 1e-12}, "validate": {"every": len(every), "sequences": len(sequences_of("validation"))},
              "save": {"every": 0}}  # fmt: skip
    training.run(out, training.asked(**(fields | more)))
    return [json.loads(line) for line in log.lines(out)]


def test_an_epoch_of_training_tells_the_mean_of_all_sequences(canary, tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    lines = run_of(canary, tmp_path / "run")
    every = sequences_of("retrain")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == len(every) and np.mean(losses) == pytest.approx(surprise(every), **EXACT)
    assert sorted(losses) == pytest.approx(sorted(surprise([row]) for row in every), **EXACT)
    (found,) = [line["validation"]["loss"] for line in lines if "validation" in line]
    assert found == pytest.approx(surprise(sequences_of("validation")), **EXACT)
    (stage,) = Ledger.read(tmp_path / "run" / "ledger.json").stages
    assert {name: ranges.spans for name, ranges in stage.consumed.items()} == {"tokens": [(0, len(every) * SEQ)]}
    figures = record.read(tmp_path / "run" / "record.jsonl")[-1]["figures"]
    assert figures["tokens"] == len(every) * SEQ and figures["validation"][-1]["validation"]["loss"] == found
    assert scored(tmp_path / "run" / "model") == pytest.approx(surprise(windows()), **EXACT)


def test_a_teacher_that_knows_the_same_has_nothing_to_say(canary, tmp_path, monkeypatch):
    """Half cross-entropy, half divergence from the teacher: what is left is half the cross-entropy."""
    pipeline.verify_here(monkeypatch)
    lines = run_of(canary, tmp_path / "run", teacher={"source": str(canary), "mix": 0.5})
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses) == pytest.approx(surprise(sequences_of("retrain")) / 2, **EXACT)


def test_a_study_tells_it(canary, tmp_path, monkeypatch):
    """Cut, trained and scored by a study's steps; its table's figures are the closed form's."""
    pipeline.verify_here(monkeypatch)
    text = str(pipeline.text_file())
    plain = {
        "name": "canary",
        "cut": {"calibration": {"text": text, "windows": 3, "seq_len": SEQ}, "ratio": 0.3, "method": "flap"},
        "arms": {"A": {"model": str(canary), "cut": {}}, "Base": {"model": str(canary)}},
        "evaluate": [{"texts": [text], "windows": WINDOWS, "seq_len": SEQ}],
    }
    (tmp_path / "study.yaml").write_text(json.dumps(plain), encoding="utf-8")
    study, out = files.read(tmp_path / "study.yaml"), tmp_path / "study"
    waiting = steps(study)
    for step in waiting.values():  # each behind what it needs
        do(study, step, out)
    gather(study, out)
    code, said, err = cli("study", "table", out, "--format", "csv")
    assert code == 0, err
    found = {row["arm"]: row for row in csv.DictReader(said.splitlines())}
    assert {arm: row["metric"] for arm, row in found.items()} == {"A": "loss", "Base": "loss"}
    for row in found.values():
        assert float(row["value"]) == pytest.approx(surprise(windows()), **EXACT)
    assert int(found["A"]["params"]) < int(found["Base"]["params"])
