"""Recipes, and grids of them: whole as they ship, refused where something is wrong."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pipeline
import pytest
import torch
from pipeline import cli
from training import (
    asked,
    finished,
    tiny_shape,
    tokenizer,
)

from prunus.errors import UserError
from prunus.train import recipe as recipes
from prunus.train.opening import prepare as opened

# -- recipes and wrong inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(recipes.shipped()))
def test_recipes_that_ship_are_whole(name):
    made = recipes.read(name, ["optimizer.lr=1e-4", "save.every=7"])
    assert made.optimizer.lr == 1e-4 and made.save.every == 7 and recipes.parse(made.plain(), name) == made
    assert made.hash != recipes.read(name).hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optimiser.lr=1"], r"field 'optimiser' does not exist \(did you mean 'optimizer'\?\)"),
        (["optimizer.lrr=1"], r"field 'optimizer.lrr' does not exist \(did you mean 'lr'\?\)"),
        (["optimizer.lr=-1"], "optimizer: lr -1.0 is no learning rate"),
        (["optimizer.lr=x"], "field 'optimizer.lr"),
        (["optimizer.betas=[0.9, 1.5]"], r"optimizer: betas \[0.9, 1.5\] must both lie in \[0, 1\)"),
        (["optimizer.clip=.inf"], "field 'optimizer.clip': Infinity is wrong: input should be a finite number"),
        (["skip_spikes=.inf"], "field 'skip_spikes': Infinity is wrong: input should be a finite number"),
        (["data.mixing={references: {a: 1}, floor: 0}"], "field 'data.mixing.floor': 0 is wrong: input should be greater"),
        (["tokens=100"], "tokens 100 are fewer than one update of 8,192"),
        (["batch_tokens=1000"], "batch_tokens 1000 is no multiple of data.seq_len 256"),
        (["schedule.total=1000"], "schedule.total 1,000 ends before the run does"),
        (["model.source=a"], "give either source"),
        (["data.domains.3.folder=x"], "names place 3 of a list of 1"),
        (["tokens"], "--set: 'tokens' is not NAME=VALUE"),
        (["tokens.x=1"], "goes through 'tokens', which is no table"),
    ],
)
def test_recipes_that_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        recipes.read("scratch", changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__range": "train"}, "unknown range of"),
        ({"tokens": 10**6}, "budget: .* tokens are asked for, but domain 'tokens' is used up after"),
        ({"data__domains": [{"folder": "/nowhere"}]}, r"data.domains.0: .*nowhere: no such"),
        ({"data__seq_len": 128, "batch_tokens": 256, "tokens": 512}, "data.seq_len: 128 is more than the 64 positions"),
        ({"model": {"source": "nowhere"}}, "nowhere"),
        ({"model": {"shape": "nanno", "tokenizer": "T"}}, "unknown shape 'nanno'"),
        ({"model__tokenizer": "/nowhere"}, "/nowhere: no such file or folder; give a folder with tokenizer.json"),
        ({"model__shape": {"hidden_size": 8}}, "model.shape: it has no model_type"),
        ({"model__shape": {**tiny_shape(), "vocab_size": 20}}, "a vocabulary of 20 is too small for the tokenizer's 300"),
        ({"model__mask": "/nowhere"}, "model.mask: /nowhere has no prunus/mask.safetensors"),
        ({"teacher": {"source": "OTHER"}}, "teacher.source: .* has another vocabulary"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, changes, message):
    changes = json.loads(json.dumps(changes).replace('"T"', json.dumps(str(tokenizer()))))
    if changes.get("teacher"):
        changes["teacher"]["source"] = str(other_vocabulary())
    with pytest.raises(UserError, match=message):
        opened(asked(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@functools.cache
def other_vocabulary() -> Path:
    import checkpoints

    made = pipeline.model("llama", dtype=torch.float32, vocab_size=290)
    return checkpoints.save_folder(pipeline.scratch() / "other-vocabulary", made, pipeline.tokenizer(290))


def test_one_mask_for_layers_that_see_less_is_refused(tmp_path):
    shape = tiny_shape() | {"model_type": "mistral", "sliding_window": 8}
    with pytest.raises(UserError, match=r"data\.separate_documents: this model sees 8 tokens back in some layers"):
        opened(asked(model__shape=shape, data__separate_documents=True), tmp_path / "run")


def test_a_folder_of_another_run_is_not_touched(tmp_path):
    with pytest.raises(UserError, match=r"holds a run of another recipe \(optimizer.lr differs\)"):
        opened(asked(optimizer__lr=0.5), finished())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is there already and holds no run of prunus"):
        opened(asked(), tmp_path / "there")


def test_the_command_line(tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(asked(validate__every=0).plain()))
    code, out, err = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "runs" / "a", "--tokens", 256, "--json")
    assert code == 0, err
    assert json.loads(out)["figures"]["tokens"] == 256
    code, out, err = cli("runs", tmp_path / "runs")
    assert code == 0 and "done" in out and "a" in out
    code, out, _ = cli("runs", tmp_path / "runs", "--json")
    assert json.loads(out)["runs"][0]["tokens"] == 256
    assert cli("recipe", "schema")[0] == 0 and cli("recipe", "list")[0] == 0
    assert cli("recipe", "show", "scratch", "--set", "tokens=16384")[0] == 0
    code, _, err = cli("train", "scrach", "--out", tmp_path / "b")
    assert code == 2 and "recipe 'scrach' does not exist (did you mean 'scratch'?)" in err
    code, _, err = cli("train", "scratch", "--out", tmp_path / "b", "--tokens", "4X")
    assert code == 2 and "--tokens: '4X' is no number" in err
    code, _, err = cli("train", "scratch", "--out", tmp_path / "b", "--tokens", "1e999k")
    assert code == 2 and "--tokens: '1e999k' is no number" in err


def test_recipes_that_nobody_could_have(tmp_path):
    """A name that is longer than any file's; an FFN that is infinitely wide."""
    with pytest.raises(UserError, match=r"no such recipe file"):
        recipes.read(f"{'x' * 300}.yaml")
    with pytest.raises(UserError, match=r"model.enlarge"):
        recipes.read("idea-prune", ("model.enlarge=.inf",))
