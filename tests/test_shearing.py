"""`prunus prune --method sheared-llama`: a training run that leaves an ordinary checkpoint."""

from __future__ import annotations

import functools
import json
import re
from unittest import mock

import pipeline
import prepared
import pytest
import tiny
from test_train import Killed

from prunus import api, checkpoint
from prunus.anatomy import Anatomy
from prunus.comparison import request_of
from prunus.errors import UserError
from prunus.keep import Keep
from prunus.ledger import Ledger
from prunus.methods import METHODS, ONE_SHOT
from prunus.planning import Request
from prunus.source import Source
from prunus.train import recipe as recipes
from prunus.train import shearing
from prunus.train.shearing import recipe_of, shear
from prunus.train.shrink.cutting import Cutting

NAME = "sheared-llama"
SIZES = {"hidden_size": 24, "intermediate_size": 12, "num_key_value_heads": 1, "num_hidden_layers": 2}
TARGET = [word for name, size in SIZES.items() for word in ("--target", f"{name}={size}")]
BUDGET = ["--tokens", "256", "--seq-len", "16"]  # eight updates


@functools.cache
def tokens():
    """A folder of prepared tokens with the ranges that the recipe asks for."""
    folder = pipeline.scratch() / "shearing-tokens"
    folder.mkdir()
    return prepared.made(folder, prepared.texts(200))[1]


def cli(out, *words):
    """What is saved is looked at in this process: a clean one takes seconds."""
    with pytest.MonkeyPatch.context() as here:
        pipeline.verify_here(here)
        return pipeline.cli("prune", pipeline.folder(), "-m", NAME, "-o", out, *map(str, words))


@functools.cache
def done():
    out = pipeline.scratch() / "sheared"
    code, _, err = cli(out, *TARGET, *BUDGET, "--data", tokens())
    assert code == 0, err
    return out, err


def test_what_comes_out_is_a_checkpoint_like_any():
    """Of exactly the shape asked for; verified; its decision is of the source's units; nothing else is left behind."""
    out, err = done()
    assert pipeline.cli("verify", out)[0] == 0
    manifest, anatomy = checkpoint.read_manifest(out), Anatomy.of(Source.open(str(out)).config)
    assert all(manifest.after["shape"][name] == size for name, size in SIZES.items())
    assert manifest.method["name"] == NAME and manifest.method["request"]["target"] == SIZES
    assert manifest.after["params"] == anatomy.num_params < manifest.before["params"]
    source = Source.open(str(pipeline.folder()))
    keep = checkpoint.read_keep(out)
    assert isinstance(keep, Keep) and keep.anatomy_after(source.anatomy).shape == anatomy.shape
    assert len(keep.units["hidden"]) == 24 and len(keep.units["layers"]) == 2
    assert not list(out.parent.glob(".sheared.*"))
    assert (
        "did not bring the gates to the target" in " ".join(manifest.notes) and "no gate can close" in err
    )  # eight updates
    assert pipeline.cli("inspect", out)[0] == 0


def test_its_record_and_ledger_are_those_of_the_run():
    out, _ = done()
    record = json.loads((out / "prunus" / "training.json").read_text())
    assert record["figures"]["tokens"] == 256 and record["figures"]["pruning"]["met"]
    assert str(tokens()) not in json.dumps(record)  # places are nobody's business
    log = json.loads((out / "prunus" / "log.json").read_text())
    assert [line["pruned"]["step"] for line in log if "pruned" in line] == [8]  # at the last update: all of the budget
    (stage,) = Ledger.read(out / "ledger.json").stages
    assert stage.name == NAME and stage.params == record["figures"]["params"]
    assert sum(stage.flops.values()) == sum(record["figures"]["flops"].values()) and stage.unique_tokens >= 256


def test_a_run_that_is_stopped_goes_on(monkeypatch):
    """Killed behind the training, before the checkpoint stands: the same command trains no more, and comes to the same."""
    out = pipeline.scratch() / "sheared-on"
    with mock.patch.object(shearing, "_outcome", side_effect=Killed), pytest.raises(Killed):
        cli(out, *TARGET, *BUDGET, "--data", tokens())
    assert not out.exists() and (out.parent / ".sheared-on.training" / "run" / "record.jsonl").exists()
    code, _, err = cli(out, *TARGET, "--tokens", "512", "--seq-len", "16", "--data", tokens())
    assert code == 2 and "holds a run of another recipe (tokens differs)" in err
    monkeypatch.setattr("prunus.train.run._training", None)
    assert cli(out, *TARGET, *BUDGET, "--data", tokens())[0] == 0
    assert checkpoint.read_manifest(out).weights_sha256 == checkpoint.read_manifest(done()[0]).weights_sha256


def test_a_text_is_prepared_and_a_ratio_is_a_shape():
    text = prepared.jsonl(pipeline.scratch() / "shearing.jsonl", prepared.texts(120))
    out = pipeline.scratch() / "sheared-text"
    code, _, err = cli(out, "-r", "0.3", *BUDGET, "-c", text, "--dtype", "bfloat16")
    assert code == 0, err
    report = json.loads(pipeline.cli("plan", pipeline.folder(), "-m", NAME, "-r", "0.3", "--json")[1])
    manifest = checkpoint.read_manifest(out)
    assert manifest.after["shape"] == report["after"]["shape"] and manifest.ratios["removed_of_block"] >= 0.3
    assert manifest.fingerprint["dtype"] == "bfloat16" and any("--train" in note for note in report["notes"])
    assert manifest.after["shape"]["num_hidden_layers"] == 3  # heads and layers stay


def test_the_recipe_is_the_one_that_ships_with_masks_all_along():
    source = Source.open(str(pipeline.folder()))
    plan = shearing.planned(source.config, source.anatomy, Request(NAME, target={"intermediate_size": 12}))
    made, shipped = recipe_of("S", plan, "T", 4096, 64, 3), recipes.read(NAME)
    assert made.prune is not None and shipped.prune is not None
    assert made.prune.masks == shipped.prune.masks.model_copy(update={"end": 1.0})
    assert made.prune.target.sizes == {"intermediate": 12} and made.prune.axes == ["intermediate"]
    assert made.sequences == shipped.sequences and made.optimizer == shipped.optimizer and made.steps == 32
    assert (made.seed, made.data.seed, made.data.seq_len) == (3, 3, 64)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*TARGET], r"tokens: sheared-llama trains with what it cuts; give --tokens"),
        ([*TARGET, "--tokens", "many"], r"--tokens: 'many' is no number"),
        ([*TARGET, *BUDGET], r"data: give the text to train on, as --data FOLDER"),
        ([*TARGET, *BUDGET, "--data", "D", "-c", "x.txt"], r"data: give the text to train on"),
        ([*TARGET, *BUDGET, "--data", "nowhere"], r"nowhere"),
        ([*BUDGET, "--data", "D"], r"ratio: sheared-llama needs to know how much to cut; give --ratio or --target"),
        ([*TARGET, *BUDGET, "--data", "D", "-r", "0.2"], r"target: sizes and --ratio contradict each other"),
        (["--target", "hidden_size=32", *BUDGET, "--data", "D"], r"the source's own sizes"),
        (["--target", "hidden_size=33", *BUDGET, "--data", "D"], r"hidden_size=33 is outside 1 to 32"),
        (["--target", "head_dim=2", *BUDGET, "--data", "D"], r"size for sheared-llama's target 'head_dim'"),
        ([*TARGET, *BUDGET, "--data", "D", "--windows", "4"], r"windows: sheared-llama trains, and does not take it"),
        ([*TARGET, *BUDGET, "--data", "D", "--batch-size", "2"], r"drop --batch-size"),
        ([*TARGET, *BUDGET, "--data", "D", "--stream"], r"stream: sheared-llama trains"),
        ([*TARGET, *BUDGET, "--data", "D", "--field", "body"], r"field: prepared tokens have none"),
        ([*TARGET, *BUDGET, "--data", "D", "--compensate", "gain"], r"compensate"),
        ([*TARGET, *BUDGET, "--data", "D", "--pattern", "2:4"], r"pattern: sheared-llama does not take it"),
    ],
)
def test_wrong_inputs_are_one_sentence_before_weights(words, sentence, monkeypatch, tmp_path):
    monkeypatch.setattr("prunus.train.run._training", None)
    words = [str(tokens()) if word == "D" else word for word in words]
    code, _, err = cli(tmp_path / "out", *words)
    assert code == 2 and re.search(sentence, err) and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()


def test_methods_that_do_not_train_refuse_tokens(tmp_path):
    assert [name for name in METHODS if name not in ONE_SHOT] == [NAME]
    for name in ONE_SHOT:
        for words in (["--tokens", "4M"], ["--data", "x"]):
            code, _, err = pipeline.cli("prune", pipeline.folder(), "-m", name, "-r", "0.4", "-o", tmp_path / "out", *words)
            assert code == 2 and f"{words[0][2:]}: {name} does not train; drop {words[0]}" in err


def test_it_is_no_part_and_no_cut_in_memory(tmp_path):
    for method in (f"{NAME}+wanda", f"shortgpt+{NAME}"):
        code, _, err = pipeline.cli("prune", pipeline.folder(), "-m", method, "-r", "0.4", "-o", tmp_path / "out")
        assert code == 2 and "sheared-llama trains, so it is no part of a combination" in err
    with pytest.raises(UserError, match="trains what it cuts; give prunus prune --tokens"):
        api.prune(str(pipeline.folder()), method=NAME, target={"hidden_size": 24})
    with pytest.raises(UserError, match="sheared-llama trains, so it has no cut to compare"):
        request_of(NAME, 0.3)


@pytest.mark.parametrize("case", tiny.CASES)
def test_every_family_plans_a_shape_or_says_why_not(case):
    """Where it plans, the recipe that follows can be carried out: `Cutting.of` refuses nothing more."""
    config = pipeline.config(case)
    anatomy, said = Anatomy.of(config), ""
    try:
        plan = shearing.planned(config, anatomy, Request(NAME, 0.4))
    except UserError as error:
        said = str(error)
        plan = shearing.planned(config, anatomy, Request(NAME, target={"intermediate_size": 12}))
    declared = anatomy.exactness("hidden") == "inexact" or "hidden" in anatomy.refused
    assert bool(said) == declared == ("hidden_size" in said)
    cutting = Cutting.of(recipe_of("S", plan, "T", 4096, 16, 0), config)
    assert cutting is not None
    assert plan.target.anatomy.num_params == cutting.goal.value


def test_several_processes_want_prepared_tokens(monkeypatch, tmp_path):
    monkeypatch.setattr(shearing, "processes", lambda: 2)
    with pytest.raises(UserError, match="several processes train on prepared tokens; give --data"):
        shear(
            str(pipeline.folder()),
            Request(NAME, 0.3),
            tmp_path / "out",
            tokens=256,
            text=shearing.Text(str(pipeline.text_file())),
        )
