"""What a training run leaves: a model, a ledger, a record; pictures and the numbers of trackers."""

from __future__ import annotations

import json
import sys
import types

import pipeline
import pytest
import torch
from pipeline import cli
from training import (
    SEQ,
    Killed,
    asked,
    finished,
    killed_saying,
    run,
    same,
    tiny_shape,
    weights,
    weights_of,
)

from prunus import api, record
from prunus.errors import UserError
from prunus.ledger import Ledger
from prunus.train import track
from prunus.train_plots import Curve

# -- what comes out -------------------------------------------------------------------------------------------------------


def test_the_end_is_a_model_a_ledger_and_a_record():
    out = finished()
    figures = record.read(out / "record.jsonl")[-1]["figures"]
    assert figures["verified"]["clean_process"] and figures["verified"]["class"] == "LlamaForCausalLM"
    ledger = Ledger.read(out / "ledger.json")
    assert ledger.tokens == figures["tokens"] == 8 * 4 * SEQ and ledger.flops == sum(figures["flops"].values())
    assert ledger.stages[0].unique_tokens == ledger.tokens
    losses = [line["validation"]["loss"] for line in figures["validation"]]
    assert len(losses) == 2 and losses[-1] < losses[0]


def test_a_record_tells_no_places():
    text = (finished() / "record.jsonl").read_text()
    assert str(pipeline.scratch()) not in text and '"folder": "tokens"' in text and '"tokenizer": "tokenizer"' in text


def test_going_on_from_a_run_keeps_its_ledger(tmp_path):
    recipe = asked(model={"source": str(finished() / "model")}, tokens=2 * 4 * SEQ, data__range="parent")
    run(tmp_path / "run", recipe)
    ledger = Ledger.read(tmp_path / "run" / "ledger.json")
    assert ledger.total_tokens == 10 * 4 * SEQ and ledger.parent is not None and not ledger.missing


@pytest.mark.parametrize("compensate", ["bias", "none"])
def test_a_cut_of_layers_that_differ_is_trained_on(tmp_path, compensate):
    """The main job: what flap leaves is of a type of ours, and so is what comes out; it loads without prunus."""
    text = {"calibration": str(pipeline.text_file()), "text": api.TextOptions(4, 16)}
    cut = api.prune(str(pipeline.folder()), method="flap", ratio=0.3, compensate=compensate, **text)
    cut.save(tmp_path / "cut")
    run(tmp_path / "run", asked(model={"source": str(tmp_path / "cut")}, validate__every=0))
    model = tmp_path / "run" / "model"
    before = json.loads((tmp_path / "cut" / "config.json").read_text())
    after = json.loads((model / "config.json").read_text())
    assert after["model_type"] == before["model_type"] == "pruned_llama" and after["auto_map"] == before["auto_map"]
    assert (model / "modeling_pruned.py").is_file() and weights(tmp_path / "run").keys() == weights_of(
        tmp_path / "cut"
    ).keys()
    assert api.evaluate(str(model), str(pipeline.text_file()), options=api.TextOptions(2, 16))[0].perplexity > 1


def test_a_teacher_is_counted_and_learned_from(tmp_path):
    """The student nears its teacher's distribution on text it was not trained on."""
    teacher = str(finished() / "model")
    recipe = asked(teacher={"source": teacher}, model__shape=tiny_shape(intermediate_size=8), validate__every=0)
    record_ = run(tmp_path / "run", recipe)
    assert record_["figures"]["flops"]["teacher"] > 0
    losses = [line["loss"] for line in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16-autocast"])
def test_zeros_stay_zero(tmp_path, precision):
    folder, _, _ = pipeline.saved("sparse")
    recipe = asked(model={"source": str(folder), "mask": str(folder)}, precision=precision)
    before = weights_of(folder)
    run(tmp_path / "run", recipe)
    after = weights(tmp_path / "run")
    zeros = {name: value == 0 for name, value in before.items() if name.endswith("_proj.weight")}
    assert sum(int(z.sum()) for z in zeros.values()) > 100
    assert all(not bool(after[name][zero].any()) for name, zero in zeros.items())
    assert any(not after[name].equal(before[name]) for name in zeros)


def test_adapters_are_merged_and_nothing_else_moves(tmp_path):
    """The difference to the source is of the adapters' rank in every matrix of a block, and nothing elsewhere."""
    source = finished() / "model"
    recipe = asked(model={"source": str(source)}, lora={"rank": 2}, tokens=4 * 4 * SEQ, save__every=2, validate__every=0)

    with pytest.raises(Killed):
        run(tmp_path / "run", recipe, say=killed_saying(3))
    run(tmp_path / "run", recipe)
    run(tmp_path / "straight", recipe)
    before, after = weights_of(source), weights(tmp_path / "run")
    assert same(after, weights(tmp_path / "straight")) and after.keys() == before.keys()
    for name, value in after.items():
        difference = value - before[name]
        if ".layers." in name and value.dim() == 2:
            values = torch.linalg.svdvals(difference.double())
            assert values[0] > 0 and values[2:].max() < 1e-5 * values[0], name
        else:
            assert not difference.any(), name
    sparse = {"source": str(source), "mask": str(source)}
    with pytest.raises(UserError, match="exclude each other: merged adapters would fill the zeros"):
        asked(model=sparse, lora={})


# -- pictures -------------------------------------------------------------------------------------------------------------


def test_runs_are_drawn_together(tmp_path):
    run(tmp_path / "other", asked(optimizer__lr=1e-3))
    code, out, err = cli("plot", finished(), tmp_path / "other", "--out", tmp_path / "both.svg", "--json")
    assert code == 0 and json.loads(out)["runs"] == ["finished-run", "other"], err
    drawn = (tmp_path / "both.svg").read_text()
    assert "finished-run" in drawn and "learning rate" in drawn
    code, _, err = cli("plot", finished(), tmp_path, "--out", tmp_path / "no.svg")
    assert code == 2 and "or no training run; several folders" in err
    code, _, err = cli("plot", finished(), "--out", tmp_path / "both.svg")
    assert code == 2 and "already exists" in err


def test_curves_have_what_was_logged():
    curve = Curve.read(finished())
    assert [tokens for tokens, *_ in curve.updates] == [64 * n for n in range(1, 9)] and len(curve.validation) == 2
    flops = record.read(finished() / "record.jsonl")[-1]["figures"]["flops"]["train"]
    assert [curve.cost(t, f) for t, _, _, f in curve.updates] == [flops * n // 8 for n in range(1, 9)]
    assert curve.smoothed()[1] == pytest.approx(0.9 * curve.updates[0][1] + 0.1 * curve.updates[1][1])


def test_tensorboard_gets_the_numbers(tmp_path):
    """Once: a run that goes on tells the steps since its checkpoint again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def line(step, loss):
        return {"step": step, "loss": loss, "validation": {"loss": 2.0, "by_domain": {"a": 2.5}, "sequences": 4}}

    before = track.sink("tensorboard", tmp_path)
    assert not list(tmp_path.iterdir())  # opened when there is something to tell, by the process that tells it
    before(line(3, 1.5))
    before(line(4, 1.25))
    again = track.sink("tensorboard", tmp_path)
    again({"note": "of no step, which a run that goes on behind a sweep tells first"})
    again(line(4, 1.75))
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    told = {name: [(event.step, event.value) for event in seen.Scalars(name)] for name in seen.Tags()["scalars"]}
    assert told["loss"] == [(3, 1.5), (4, 1.75)]
    assert told["validation/loss"] == [(3, 2.0), (4, 2.0)] and told["validation/by_domain/a"] == [(3, 2.5), (4, 2.5)]
    with pytest.raises(UserError, match=r"unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\)"):
        track.check("tensorbord")


def test_trackio_goes_on_with_its_run_and_leaves_stdout_alone(tmp_path, monkeypatch, capsys):
    """A stand-in that prints as trackio does: the same run under the same name, although another folder is called alike."""
    calls, lines = [], []

    class Trackio(types.ModuleType):
        def init(self, **asked):
            print("* Trackio project initialized")
            calls.append(asked)

        def log(self, numbers, step):
            lines.append((step, numbers))

        def finish(self):
            pass

    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"trackio is not installed; pip install 'prunus\[trackio\]'"):
        track.check("trackio")
    monkeypatch.setattr(track, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "trackio", Trackio("trackio"))
    for step in (1, 2):
        track.sink("trackio", tmp_path)({"step": step, "loss": 1.5})
    assert lines == [(1, {"loss": 1.5}), (2, {"loss": 1.5})]
    assert calls[0] == calls[1] and calls[0]["resume"] == "allow" and calls[0]["name"].startswith(f"{tmp_path.name}-")
    assert capsys.readouterr().out == ""
