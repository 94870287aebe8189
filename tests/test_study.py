"""Studies: arms that share what they can, protocols that are promised and proved, steps that are done once."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pipeline
import pytest
import training
import yaml
from pipeline import cli

from prunus import bench, record, units
from prunus.errors import UserError
from prunus.ledger import Ledger
from prunus.study import cluster, protocol
from prunus.study import file as files
from prunus.study import run as running
from prunus.study.plan import plan
from prunus.study.results import keep, load, rows
from prunus.study.run import gather, run
from prunus.study.steps import cut_of, do, model_of, named, resolved, steps
from prunus.train.stopping import StoppedError

EACH = 4 * training.SEQ  # tokens of an update
PARENT, RETRAIN = 8 * EACH, 4 * EACH
SMALLER = {"teacher": None, "prune.target": {"params": 1000}}
BOTH = {"parent": {"tokens": PARENT, "seed": 0}, "retrain": {"tokens": RETRAIN}}


def base(tmp_path, **changes):
    plain = training.asked(validate__every=4, save__every=2, **changes).plain()
    path = tmp_path / f"base{len(changes)}.yaml"
    path.write_text(json.dumps(plain), encoding="utf-8")
    return str(path)


def written(tmp_path, **changes):
    """The comparison of the study in small: a parent, its halves by two methods, and fresh weights of the same shapes."""
    fresh = base(tmp_path)
    onward = tmp_path / "onward.yaml"
    plain = training.asked(validate__every=4, save__every=2).plain()
    plain["model"] = {"source": "model"}
    onward.write_text(json.dumps(plain), encoding="utf-8")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": doc}) + "\n" for doc in pipeline.corpus()), encoding="utf-8")
    data = {
        "name": "half",
        "cut": {"calibration": {"text": str(text), "windows": 3, "seq_len": 16, "documents": ":-20"}, "ratio": 0.5},
        "arms": {
            "P": {"recipe": fresh, "set": {"tokens": PARENT, "data.range": "parent"}, "grid": {}},
            "P-R": {"from": "P", "cut": {}, "recipe": str(onward), "set": {"tokens": RETRAIN}},
            "S": {"shape_of": "P-R", "recipe": fresh, "set": {"tokens": RETRAIN}},
            "S-total": {
                "shape_of": "P-R", "recipe": fresh,
                "set": {"tokens": PARENT + RETRAIN, "data.range": BOTH},
            },
            "S-flops": {"shape_of": "P-R", "recipe": fresh, "flops_of": "P-R", "set": {"data.epochs": 9}},
        },
        "grid": {"cut.method": ["flap", "minitron-depth"]},
        "compare": [
            {"protocol": "training-tokens", "arms": ["P-R", "S"]},
            {"protocol": "total-tokens", "arms": ["P-R", "S-total"]},
            {"protocol": "total-flops", "arms": ["P-R", "S-flops"], "within": 0.15},
        ],
        "evaluate": [{"texts": [str(text)], "windows": 2, "seq_len": 16, "documents": "-20:"}],
    } | changes  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def everything(study, out):
    """All steps here, one behind the other."""
    for step in steps(study).values():
        do(study, step, out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(study, folder) of one that is done."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        pipeline.verify_here(patch)
        study = files.read(written(folder))
        everything(study, folder / "out")
    return study, folder / "out"


def test_arms_share_what_they_can(finished):
    study, out = finished
    known = steps(study)
    kinds = [step.kind for step in known.values()]
    assert (kinds.count("train"), kinds.count("cut"), kinds.count("evaluate")) == (1 + 4 * 2, 2, 1 + 4 * 2)
    assert len([*(out / "cuts").iterdir()]) == 2 and len([*out.glob("P/checkpoints")]) <= 1
    order = list(known)
    assert all(order.index(need) < order.index(name) for name, step in known.items() for need in step.needs)


def test_runs_are_of_the_shape_and_on_the_tokens_that_the_study_says(finished):
    study, out = finished
    for method in ("flap", "minitron-depth"):
        child, fresh, total = (
            next(cell for cell in study.of(arm) if cell.place["cut.method"] == method) for arm in ("P-R", "S", "S-total")
        )
        shapes = {
            str(sorted((k, v.shape) for k, v in training.weights(out / cell.name).items())) for cell in (child, fresh, total)
        }
        assert len(shapes) == 1
        manifest = json.loads((cut_of(child, out) / "prunus.json").read_text())
        assert manifest["method"]["name"] == method and manifest["calibration"]["documents"] == ":-20"
        assert resolved(child, out).model.source == str(cut_of(child, out))
        assert resolved(fresh, out).model.shape == str(cut_of(child, out))
        assert Ledger.read(out / child.name).total_tokens >= PARENT + RETRAIN
    assert model_of(study.of("P")[0], out) == out / "P" / "model"


def test_a_grid_of_named_cuts_and_of_fields_that_have_one_value(tmp_path):
    cuts = {"deep": {"method": "minitron-depth"}, "wide": {"method": "flap", "ratio": 0.25}}
    grid = {"cut": ["deep", "wide"], "seed+data.seed": [0, 3]}
    study = files.read(written(tmp_path, cuts=cuts, grid=grid, compare=[], evaluate=[]))
    names = [f"P-R_cut={name}_seed={seed}" for name in cuts for seed in (0, 3)]
    assert [cell.name for cell in study.of("P-R")] == names
    assert [(c.cut.method, c.cut.ratio, c.recipe.seed, c.recipe.data.seed) for c in study.of("P-R")] == [
        ("minitron-depth", 0.5, 0, 0), ("minitron-depth", 0.5, 3, 3), ("flap", 0.25, 0, 0), ("flap", 0.25, 3, 3)
    ]  # fmt: skip
    assert [step.kind for step in steps(study).values()].count("cut") == 2


def test_protocols_are_proved_from_ledgers(finished):
    study, out = finished
    rows = protocol.proofs(study, out)
    assert len(rows) == 6 and all(row["holds"] for row in rows), [row["why"] for row in rows]
    by = {row["protocol"]: row for row in rows}
    assert f"same: {RETRAIN} tokens in both, 0 and 0 in one alone, in the same order" == by["training-tokens"]["why"]
    total = f"same: {PARENT + RETRAIN} tokens in both, 0 and 0 in one alone"
    assert {row["why"] for row in rows if row["protocol"] == "total-tokens"} == {
        f"{total}; 48 and 0 of calibration text besides", f"{total}; 48 and 0 of calibration text besides"
    }  # fmt: skip
    flops = by["total-flops"]["flops"]
    assert flops[0] * (1 - 0.15) < flops[1] <= flops[0]  # whole updates, of which there are about a dozen


def test_a_ledger_that_says_otherwise_is_no_proof(finished, tmp_path):
    study, out = finished
    cells = {cell.arm: cell for cell in study.cells if cell.place.get("cut.method", "flap") == "flap"}
    one, other = (Ledger.read(out / cells[arm].name) for arm in ("P-R", "S-total"))
    holds, why = protocol._proved("training-tokens", one, other, 0.1)
    assert not holds and "overlapping" in why
    assert not protocol._proved("total-flops", one, other, 1e-6)[0]
    turned = other.model_copy(deep=True)
    turned.stages[0].seed = 7
    assert protocol._proved("total-tokens", one, turned, 0.1)[0]
    same = one.model_copy(deep=True)
    same.stages[0].seed = 7
    holds, why = protocol._proved("training-tokens", one, same, 0.1)
    assert not holds and "in another order" in why


@pytest.mark.parametrize(
    ("name", "protocol_", "tried"), [("P-R", "training-tokens", "512 and 0"), ("P", "total-tokens", "1,024 and 0")]
)
def test_rates_that_one_arm_tried_and_the_other_took_are_named_besides(name, protocol_, tried, tmp_path, monkeypatch):
    """No weight is left of the beginnings at which they were tried, but what they cost was spent."""
    pipeline.verify_here(monkeypatch)
    path = written(tmp_path, grid={"cut.method": ["minitron-depth"]}, evaluate=[])
    data = yaml.safe_load(path.read_text())
    data["arms"] = {arm: data["arms"][arm] for arm in ("P", "P-R", "S", "S-total")}
    data["arms"][name]["set"]["optimizer.lr"] = [0.001, 0.01]
    data["arms"]["S"]["lr_of"] = data["arms"]["S-total"]["lr_of"] = name
    data["compare"] = [part for part in data["compare"] if part["protocol"] == protocol_]
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    study, out = files.read(path), tmp_path / "out"
    protocol.check(study)
    everything(study, out)
    (row,) = protocol.proofs(study, out)
    assert row["holds"] and row["why"].endswith(f"; {tried} of tried rates besides"), row["why"]
    assert row["tokens"][0] >= PARENT + RETRAIN + int(tried.split()[0].replace(",", ""))
    lines = {line["arm"]: line["ledger"] for line in gather(study, out)}
    alone = [stage["flops"]["train"] for stage in lines[name]["stages"] if not stage["parent"]]
    assert alone[0] == 2 * alone[1] and lines[name]["flops"] == sum(alone)


def paid(tmp_path, of):
    """A parent, its half that tries rates, and a half that spends what one of them cost."""
    compare = [{"protocol": "total-flops", "arms": [of, "F"], "within": 0.15}]
    path = written(tmp_path, grid={}, compare=compare, evaluate=[])
    data = yaml.safe_load(path.read_text())
    data["cut"]["method"] = "flap"
    data["arms"] = {name: data["arms"][name] for name in ("P", "P-R")}
    data["arms"]["P-R"]["set"]["optimizer.lr"] = [0.001, 0.01]
    data["arms"]["F"] = data["arms"]["P-R"] | {"flops_of": of, "set": {"data.epochs": 9}}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return files.read(path)


def test_what_an_arm_goes_on_from_is_paid_for_too(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    study, out = paid(tmp_path, "P-R"), tmp_path / "out"
    foreseen = {row["step"]: row for row in plan(study, rate=1e9)["steps"]}
    everything(study, out)
    (row,) = protocol.proofs(study, out)
    each = Ledger.read(out / "F").stages[-1].flops["train"] // resolved(study.of("F")[0], out).steps
    assert row["holds"] and row["flops"][0] - each < row["flops"][1] <= row["flops"][0], row["why"]
    assert foreseen["F"]["tokens"] == pytest.approx(Ledger.read(out / "F").stages[-1].tokens, rel=0.25)


def test_nothing_is_left_to_spend(tmp_path, monkeypatch):
    """Known from the plan where it can be, else once the runs are there."""
    pipeline.verify_here(monkeypatch)
    study, out = paid(tmp_path, "P"), tmp_path / "out"
    said = "F: flops_of: P costs .* FLOPs, and this run's source .*, which leaves less than the .* of one update"
    with pytest.raises(UserError, match=said):
        run(study, out)
    assert not out.exists()
    for name in ("P", next(name for name in steps(study) if name.startswith("cut-"))):
        do(study, named(study, name), out)
    with pytest.raises(UserError, match=said):
        do(study, named(study, "F"), out)


def test_rows_and_records_hold_what_was_measured(finished):
    study, out = finished
    lines = gather(study, out)
    keep(study, out)
    told = rows(load(out))
    assert lines[0]["arm"] == "P" and len(lines) == len(study.cells) == len(told)
    for cell, line, row in zip(study.cells, lines, told, strict=True):
        last, score = row["scores"]
        assert last["value"] == line["figures"]["validation"][-1]["validation"]["loss"]
        assert row["total_flops"] == line["ledger"]["total_flops"] == Ledger.read(out / cell.name).total_flops
        assert score["on"] == "text.jsonl -20:" and score["value"] == line["evaluations"][0]["figures"]["texts"][0]["loss"]
    assert (out / "records.jsonl").read_text().count("\n") == len(lines)


def test_nothing_is_done_twice(finished):
    study, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    result = run(study, out)
    assert result["ran"] == [] and len(result["rows"]) == 9 and all(row["holds"] for row in result["proofs"])
    again = ("records.jsonl", "proofs.json", "study.json", "index.sqlite")
    changed = [str(path) for path, when in before.items() if path.stat().st_mtime_ns != when and path.name not in again]
    assert not changed


def test_another_study_in_the_same_folder_is_refused(finished, tmp_path):
    _, out = finished
    data = yaml.safe_load(written(tmp_path).read_text())
    data["arms"]["P"]["set"]["optimizer.lr"] = 0.02
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(UserError, match=r"P: is of this study as it was before it was changed"):
        run(files.read(tmp_path / "study.yaml"), out)
    stray = tmp_path / "stray"
    (stray / "P").mkdir(parents=True)
    with pytest.raises(UserError, match="P: is there already and is no step of this study"):
        run(files.read(tmp_path / "study.yaml"), stray)


def test_the_plan_foresees_what_is_spent(finished):
    study, out = finished
    made = plan(study, rate=1e9)
    rows = {row["step"]: row for row in made["steps"]}
    for cell in study.cells:
        spent = sum(record.read(out / cell.name / "record.jsonl")[-1]["figures"]["flops"].values())
        # what flap leaves is foreseen as half of the blocks; a KV group of this tiny model is a tenth of one
        assert rows[cell.name]["flops"] == pytest.approx(spent, rel=0.25), cell.name
        weights = sum(t.numel() for t in training.weights(out / cell.name).values())
        assert rows[cell.name]["params"] == pytest.approx(weights, rel=0.25)
    exact = [cell.name for cell in study.cells if "flap" not in cell.name and cell.arm != "S-flops"]
    for name in exact:  # depth: the shape is known beforehand
        spent = sum(record.read(out / name / "record.jsonl")[-1]["figures"]["flops"].values())
        assert rows[name]["flops"] == pytest.approx(spent, rel=1e-6)
    assert made["tokens"] and made["hours"] == pytest.approx(made["flops"] / 1e9 / 3600)
    assert plan(study, out, rate=1e9)["flops"] == 0


def test_sparse_arms_keep_their_mask_and_begin_afresh(tmp_path, monkeypatch):
    """Published scripts leave the parent's embeddings in the arm that is called scratch; here nothing of it is left."""
    pipeline.verify_here(monkeypatch)
    path = written(tmp_path, grid={}, compare=[{"protocol": "training-tokens", "arms": ["P-R", "S"]}], evaluate=[])
    data = yaml.safe_load(path.read_text())
    data["cut"] = {"method": "magnitude", "ratio": 0.5}
    data["arms"] = {arm: data["arms"][arm] for arm in ("P", "P-R", "S")}
    data["arms"]["S"]["set"]["seed"] = 1  # else parent and fresh weights begin alike
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    study, out = files.read(path), tmp_path / "out"
    everything(study, out)
    parent, child, fresh = (training.weights(out / name) for name in ("P", "P-R", "S"))
    zeros = {name: tensor == 0 for name, tensor in child.items() if "proj" in name}
    assert zeros and all(0.4 < float(zero.float().mean()) < 0.6 for zero in zeros.values())
    for name, zero in zeros.items():
        assert (fresh[name] == 0).equal(zero)
    embedding = "model.embed_tokens.weight"
    assert not fresh[embedding].equal(parent[embedding])
    apart = (fresh[embedding] - parent[embedding]).abs().mean()
    assert float(apart) > 5 * float((child[embedding] - parent[embedding]).abs().mean())
    assert all(row["holds"] for row in protocol.proofs(study, out))


def test_a_rate_found_by_another_arm(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    fresh = base(tmp_path)
    arms = {
        "swept": {"recipe": fresh, "set": {"optimizer.lr": "sweep"}, "grid": {}},
        "run": {"recipe": fresh, "lr_of": "swept"},
    }
    study = files.read(written(tmp_path, arms=arms, grid={"seed+data.seed": [1]}, compare=[], evaluate=[]))
    everything(study, tmp_path / "out")
    rates = [record.read(tmp_path / "out" / name / "record.jsonl")[-1]["figures"]["lr"] for name in ("swept", "run_seed=1")]
    assert rates[0] == rates[1]


def test_a_shape_is_timed_once_however_many_runs_have_it(tmp_path, monkeypatch):
    """Parent, cut and fresh weights of its shape: two shapes, which every run is told of, and the pictures are drawn by."""
    pipeline.verify_here(monkeypatch)
    monkeypatch.setattr(bench, "peak_bytes", lambda *_: None)  # a process of its own, which takes seconds
    timing = {"context": 8, "new_tokens": 2, "repeats": 1}
    path = written(
        tmp_path, measure=timing, compare=[], evaluate=[], grid={"cut.method": ["flap"], "seed+data.seed": [0, 1]}
    )
    data = yaml.safe_load(path.read_text())
    data["arms"] = {name: data["arms"][name] for name in ("P", "P-R", "S")}
    path.write_text(yaml.safe_dump(data))
    study, out = files.read(path), tmp_path / "out"
    measured = [step for step in steps(study).values() if step.kind == "measure"]
    (cut,) = [step.name for step in steps(study).values() if step.kind == "cut"]
    assert [step.name for step in measured] == ["measure-P", f"measure-{cut}"]
    assert {row["step"] for row in plan(study, rate=1e9)["steps"]} >= {step.name for step in measured}
    everything(study, out)
    lines = {line["run"]: line for line in running.gather(study, out)}
    sizes = {name: line["measured"]["models"][0]["params"] for name, line in lines.items()}
    assert len(lines) == 5 and sizes["P"] > sizes["P-R_method=flap_seed=0"] == sizes["S_method=flap_seed=1"]
    keep(study, out)
    runs = {run.name: run for run in load(out).runs}
    assert set(runs["P"].milliseconds) == {"first token", "a token"} and min(runs["P"].milliseconds.values()) > 0


def test_shapes_that_are_enlarged_or_pruned_on_the_way_are_planned_and_timed_as_themselves(tmp_path, monkeypatch):
    """Not as the cut that they begin with or whose shape they take."""
    pipeline.verify_here(monkeypatch)
    path = written(tmp_path, grid={}, compare=[], evaluate=[], measure={"context": 8})
    data = yaml.safe_load(path.read_text())
    fresh, onward = (data["arms"][name] for name in ("S", "P-R"))
    plain = json.loads(Path(fresh["recipe"]).read_text())
    given = {name: plain[name] for name in ("batch_tokens", "micro_batch")} | {"tokens": RETRAIN}
    given |= {f"data.{name}": plain["data"][name] for name in ("domains", "seq_len")}
    data["cut"]["method"] = "minitron-depth"
    data["arms"] = {
        "P": data["arms"]["P"],
        "cut": {"from": "P", "cut": {}},
        "wide": {"shape_of": "cut", "recipe": fresh["recipe"], "set": {"tokens": RETRAIN, "model.enlarge": 2}},
        "back": {"shape_of": "cut", "recipe": "idea-prune", "set": given | {"model.enlarge": 2}},
        "less": onward | {"recipe": "adapt-pruner", "set": given | {"prune.target": {"params": 24_000}}},
        "S": {"shape_of": "less", "recipe": fresh["recipe"], "set": {"tokens": RETRAIN}},
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    study, out = files.read(path), tmp_path / "out"
    (cut,) = [name for name, step in steps(study).items() if step.kind == "cut"]
    timed = {cell.arm: cell.shaped.name for cell in study.cells}
    assert timed == {"P": "P", "cut": "cut-cut", "wide": "wide", "back": "back", "less": "less", "S": "less-cut"}
    assert {step.needs for step in steps(study).values() if step.kind == "measure"} == {
        ("P",), (cut,), ("wide",), ("back",), ("less",)
    }  # fmt: skip
    foreseen = {row["step"]: row for row in plan(study, rate=1e9)["steps"]}
    for name in ("P", cut, "wide", "back"):
        do(study, named(study, name), out)
    for name in ("wide", "back"):
        made = Ledger.read(out / name).stages[-1]
        assert (foreseen[name]["params"], foreseen[name]["flops"]) == (made.params, made.flops["train"])


def test_what_is_timed_has_the_machine_to_itself(tmp_path):
    """Two steps at a time, but none beside one that times."""
    study = files.read(written(tmp_path, measure={"context": 8}))
    known = steps(study)
    doing = running._Doing(study, known, tmp_path / "out", 2, lambda text: None)
    timed, trained = known["measure-P"], known["P"]
    assert doing._has_room(timed) and doing._has_room(trained)
    doing.running = {trained.name: None}
    assert not doing._has_room(timed) and doing._has_room(trained)
    doing.running = {timed.name: None}
    assert not doing._has_room(timed) and not doing._has_room(trained)


def test_the_rate_of_the_run_that_ended_lowest(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    fresh = base(tmp_path)
    arms = {
        "tried": {"recipe": fresh, "grid": {"optimizer.lr": [1e-6, 1e-2, 1e-5]}},
        "run": {"recipe": fresh, "lr_of": "tried"},
    }
    study = files.read(written(tmp_path, arms=arms, grid={"data.seed": [1]}, compare=[], evaluate=[]))
    assert sorted(steps(study)["run_seed=1"].needs) == ["tried_lr=0.01", "tried_lr=1e-05", "tried_lr=1e-06"]
    everything(study, tmp_path / "out")
    losses = {
        row["lr"]: row["validation"][-1]["validation"]["loss"]
        for row in (record.read(path)[-1]["figures"] for path in (tmp_path / "out").glob("tried*/record.jsonl"))
    }
    assert len(losses) == 3 and min(losses, key=losses.get) == 1e-2
    assert resolved(study.of("run")[0], tmp_path / "out").optimizer.lr == 1e-2
    for arm in arms.values():
        arm["set"] = {"validate.every": 0}
    with pytest.raises(UserError, match="'run': lr_of: which run of 'tried' is best is told by validation"):
        files.read(written(tmp_path, arms=arms, grid={"data.seed": [1]}, compare=[], evaluate=[]))


# -- processes --------------------------------------------------------------------------------------------------------------


def small(tmp_path, **changes):
    """Three runs from fresh weights, one of which fails and one needs it."""
    fresh, onward = base(tmp_path), tmp_path / "on.yaml"
    plain = training.asked().plain()
    plain["model"] = {"source": "model"}
    onward.write_text(json.dumps(plain), encoding="utf-8")
    arms = {
        "good": {"recipe": fresh, "set": {"tokens": 2 * EACH}},
        "bad": {"recipe": fresh, "set": {"model.shape.vocab_size": 8}},  # fewer than the tokenizer has, which no plan opens
        "below": {"from": "bad", "recipe": str(onward)},
    }
    return written(tmp_path, arms=arms | changes, grid={}, compare=[], evaluate=[])


def test_a_failed_step_takes_down_only_what_needs_it(tmp_path):
    code, out, err = cli("study", "run", small(tmp_path), "--out", tmp_path / "out", "--processes", "2", "--json")
    result = json.loads(out)
    assert code == 1 and result["ran"] == ["good"], err
    assert set(result["failed"]) == {"bad"} and "too small for the tokenizer" in result["failed"]["bad"]
    assert result["left"] == {"below": "bad"} and [row["run"] for row in result["rows"]] == ["good"]
    assert "too small" in (tmp_path / "out" / "logs" / "bad.log").read_text()
    code, out, _ = cli("study", "run", tmp_path / "study.yaml", "--out", tmp_path / "out")
    assert code == 1 and "failed: bad: " in out and "left: below, which needs bad" in out


def test_a_study_that_is_stopped_goes_on_where_it_was(tmp_path):
    fresh = base(tmp_path)
    long = {
        "long": {"recipe": fresh, "set": {"tokens": 400 * EACH, "data.epochs": 200, "save.every": 0, "validate.every": 0}}
    }
    path = written(tmp_path, arms=long, grid={}, compare=[], evaluate=[])
    words = [sys.executable, "-m", "prunus", "study", "run", str(path), "--out", str(tmp_path / "out")]
    begun = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "long" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert begun.poll() is None, begun.communicate()
        time.sleep(0.05)
    begun.send_signal(signal.SIGTERM)
    _, err = begun.communicate(timeout=120)
    assert begun.returncode == 143 and "the same command goes on from there" in err
    assert [*(tmp_path / "out" / "long" / "checkpoints").iterdir()] and not (
        tmp_path / "out" / "long" / "record.jsonl"
    ).exists()
    study = files.read(path)
    with pytest.MonkeyPatch.context() as patch:
        pipeline.verify_here(patch)
        everything(study, tmp_path / "out")
        everything(study, tmp_path / "whole")
    assert training.same(*(training.weights(tmp_path / name / "long") for name in ("out", "whole")))


def test_slurm_jobs_do_the_steps(tmp_path):
    """Through an sbatch that runs its array here, with the variables that Slurm sets."""
    fresh = base(tmp_path)
    onward = tmp_path / "on.yaml"
    plain = training.asked(tokens=2 * EACH).plain()
    plain["model"] = {"source": "model"}
    onward.write_text(json.dumps(plain), encoding="utf-8")
    arms = {
        "one": {"recipe": fresh, "set": {"tokens": 2 * EACH, "data.range": "parent"}},
        "two": {"from": "one", "recipe": str(onward)},
    }
    path, out = written(tmp_path, arms=arms, grid={}, compare=[], evaluate=[]), tmp_path / "a folder"
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f"#!/bin/bash\necho \"$@\" >> {tmp_path}/asked\n"
        "for word in \"$@\"; do case $word in --array=1-*) last=${word#--array=1-};; esac; script=$word; done\n"
        "for i in $(seq $last); do SLURM_ARRAY_TASK_ID=$i bash \"$script\" >&2 || true; done\necho 4711\n"
    )  # fmt: skip
    (tools / "sbatch").chmod(0o755)
    code, said, err = cli("study", "slurm", path, "--out", out, "--sbatch", "--partition=gpu")
    assert code == 0, err
    submit = said.strip().removeprefix("bash ")
    path_ = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(["bash", submit], capture_output=True, text=True, env=os.environ | path_)
    assert done.returncode == 0 and "4711" in done.stdout, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2 and all("--partition=gpu" in line for line in asked)
    assert "--dependency" not in asked[0] and "--dependency=afterany:4711" in asked[1]
    assert (out / "two" / "record.jsonl").is_file(), done.stderr
    assert cluster.levels(steps(files.read(path)), out) == []
    arms["one"]["set"]["optimizer.lr"] = 0.05
    written(tmp_path, arms=arms, grid={}, compare=[], evaluate=[])
    (out / "one" / "record.jsonl").unlink()
    done = subprocess.run(["bash", submit], capture_output=True, text=True, env=os.environ | path_)
    assert "the study was changed since" in done.stderr and not (out / "one" / "record.jsonl").exists()


def test_a_plan_names_a_study_as_it_is_written(tmp_path):
    path = written(tmp_path, name="half [/b] [red]x", arms={"one": {"recipe": base(tmp_path)}}, grid={}, compare=[])
    code, said, err = cli("study", "plan", path, "--rate", "1e9")
    assert code == 0 and "half [/b] [red]x: 1 runs" in said, err


@pytest.mark.parametrize("rate", ["0", "-5", "nan", "inf"])
def test_plans_refuse_rates_that_are_none(rate, tmp_path):
    path = written(tmp_path, arms={"one": {"recipe": base(tmp_path)}}, grid={}, compare=[])
    code, said, err = cli("study", "plan", path, "--rate", rate)
    assert code == 2 and not said and f"rate: {rate} is not above 0 and finite; give the FLOPs a second" in err
    with pytest.raises(UserError, match="is not above 0"):
        plan(files.read(path), rate=float(rate))


def test_no_name_becomes_a_command_of_the_script_that_submits(tmp_path):
    """Neither a study's nor a folder's; what the script says at its end can be done as it stands."""
    inner = tmp_path / "we\"ird $(touch made-1) `touch made-2` 'x' %s"
    inner.mkdir()
    path, name = inner / "study.yaml", "half\ntouch made-3\r\n#"
    path.write_text(json.dumps({"name": name, "arms": {"one": {"recipe": base(tmp_path)}}}), encoding="utf-8")
    tools, here = tmp_path / "bin", tmp_path / "here"
    tools.mkdir()
    here.mkdir()
    (tools / "sbatch").write_text("#!/bin/bash\necho 4711\n")
    (tools / "sbatch").chmod(0o755)
    submit = cluster.write(files.read(path), inner / "out", [])
    path_ = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", submit], capture_output=True, text=True, env=path_, cwd=here)
    assert done.returncode == 0 and not list(here.iterdir()) and not list(tmp_path.rglob("made-*")), done.stderr
    said = done.stdout.removeprefix("submitted as 4711; ").removesuffix(" gathers the records once it has ended\n")
    wanted = [sys.executable, "-m", "prunus", "study", "gather", str(path), "--out", str(inner / "out")]
    assert shlex.split(said) == wanted and done.stderr == ""


def test_a_step_by_itself(tmp_path):
    path = small(tmp_path)
    code, _, err = cli("study", "step", path, "below", "--out", tmp_path / "out")
    assert code == 2 and "below: needs bad, which is not done yet" in err
    code, _, err = cli("study", "step", path, "belo", "--out", tmp_path / "out")
    assert code == 2 and "unknown step 'belo' (did you mean 'below'?)" in err
    study = files.read(path)
    key = named(study, "good").key
    assert named(study, "good", key).kind == "train"
    code, _, err = cli("study", "step", path, "bad", "--out", tmp_path / "out", "--key", key)
    other = named(study, "bad").key
    assert code == 2 and f"study.yaml: bad: key {other} is not the {key} that was begun with" in err
    assert not (tmp_path / "out").exists()


def test_a_study_that_is_changed_while_it_runs_fails_the_steps_that_change(tmp_path, monkeypatch):
    """Each step's process reads the file again; none may do what another file says under a name of the one that runs."""
    arms = {name: {"recipe": base(tmp_path), "set": {"tokens": 2 * EACH}} for name in ("one", "two", "three")}
    path, real = written(tmp_path, arms=arms, grid={}, compare=[], evaluate=[]), running._Process

    def edited(*asked):
        arms["two"]["set"]["optimizer.lr"] = 0.05
        written(tmp_path, arms=arms, grid={}, compare=[], evaluate=[])
        return real(*asked)

    monkeypatch.setattr(running, "_Process", edited)
    result = run(files.read(path), tmp_path / "out")
    assert result["ran"] == ["one", "three"] and "the study was changed since" in result["failed"]["two"]
    assert not (tmp_path / "out" / "two").exists()


# -- wrong inputs -------------------------------------------------------------------------------------------------------------


def arms_of(path):
    return yaml.safe_load(Path(path).read_text())["arms"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["arms"]["S"]["set"].update({"tokens": PARENT}), "training-tokens of P-R, S: P-R reads 256 and S 512"),
        (lambda d: d["arms"]["S"]["set"].update({"data.seed": 3}), r"training-tokens of P-R, S: P-R reads 0 and S 3 \(seed\)"),
        (lambda d: d["arms"]["P"]["set"].update({"data.range": "retrain"}), "it and its parent both read range 'retrain'"),
        (lambda d: d["arms"]["S-total"]["set"].update({"data.range": "parent"}), "P-R and its parents read .* give both the same"),
        (lambda d: d["arms"]["S-total"]["set"].update({"data.seed": 3}), r"'retrain' \(seed 0\), S-total .* \(seed 3\)"),
        (lambda d: d["arms"]["S-flops"].pop("flops_of"), "none of them has flops_of another"),
        (lambda d: d["compare"][0]["arms"].append("Q"), "compare.0: unknown arm 'Q'"),
        (lambda d: d["arms"]["P-R"].update({"from": "Q"}), "arm 'P-R': from: there is no arm 'Q'"),
        (lambda d: d["arms"]["P"].update({"from": "P-R", "grid": None}), "needs itself, by"),
        (lambda d: d["arms"]["P"].pop("recipe"), "arms.P: nothing to do; give recipe, cut, or model"),
        (lambda d: d["arms"]["P"].update({"grid": {"data.seed": [1, 2]}}), "'P' has no run there, .* differ by data.seed"),
        (lambda d: d["grid"].update({"cut.methud": ["x"]}), "cut: field 'methud' does not exist"),
        (lambda d: d["arms"]["S"].pop("shape_of"), "arm 'S': 'cut.method' of the grid changes nothing in it"),
        (lambda d: d["grid"].update({"cut.ratio": [0.3, 0.3]}), "two runs are called"),
        (lambda d: d.update({"grid": {"cut": ["flapp"]}, "cuts": {"flap": {"method": "flap"}}}), "unknown cut 'flapp'"),
        (lambda d: d["grid"].update({"seed+data.sed": [0]}), "field 'data.sed' does not exist"),
        (lambda d: d["evaluate"][0].update({"documents": "-30:"}), "calibrates on documents :-20 .* documents -30:"),
        (lambda d: d["evaluate"][0].update({"documents": None}), "scores on documents all"),
        (lambda d: d["evaluate"][0].update({"texts": []}), "evaluate.0: nothing is asked"),
        (
            lambda d: d["evaluate"][0].update({"texts": ["c4/valid.jsonl", "wiki/valid.jsonl"]}),
            r"evaluate.0: 'wiki/valid.jsonl' would stand under 'valid.jsonl -20:', as 'c4/valid.jsonl' of evaluate.0 does; give",
        ),
        (lambda d: d["evaluate"].append(d["evaluate"][0] | {"windows": 3}), r"evaluate.1: .* as '.*text.jsonl' of evaluate.0 does"),
        (lambda d: d["evaluate"].append({"texts": ["x/validation"]}), "'x/validation' .* as the validation of training does"),
        (
            lambda d: d["evaluate"].extend({"tasks": ["piqa"], "task_data": "x", "limit": limit} for limit in (1, 2)),
            "evaluate.2: 'piqa' would stand under 'piqa', as 'piqa' of evaluate.1 does; .* ask a task once",
        ),
        (
            lambda d: d["evaluate"].extend({"tasks": [name]} for name in ("piqa", "seven")),
            "evaluate.2: 'piqa' would stand under 'piqa', as 'piqa' of evaluate.1 does",
        ),
        (lambda d: d["evaluate"].append({"tasks": ["pica"]}), r"evaluate.1: unknown task 'pica' \(did you mean 'piqa'\?\)"),
        (lambda d: d["arms"].update({"X": {"model": "m", "from": "P"}}), "model is released"),
        (lambda d: d["arms"].update({"X": {"from": "P", "shape_of": "S", "recipe": "scratch"}}), "from goes on with weights"),
        (lambda d: d["arms"].update({"X": {"cut": {"method": "flap"}}}), "cut needs weights"),
        (lambda d: d["arms"].update({"X": {"model": "m", "lr_of": "S"}}), "are of training; give recipe"),
        (lambda d: d.update({"arm": 1}), r"field 'arm' does not exist \(did you mean 'arms'\?\)"),
        (lambda d: d["arms"]["P"]["set"].update({"optimizer.lrr": 1}), "arm 'P': .*field 'optimizer.lrr' does not exist"),
    ],
)  # fmt: skip
def test_studies_that_are_refused(change, message, tmp_path):
    path = written(tmp_path)
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(UserError, match=message):
        protocol.check(files.read(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["cut"].update({"ratio": 0.999}), "P-R: ratio: the least that can stay"),
        (lambda d: d["cut"].pop("calibration"), "flap goes by text; give cut.calibration"),
        (lambda d: d["cut"].update({"method": "flup"}), "flup"),
    ],
)
def test_plans_refuse_cuts_that_cannot_be(change, message, tmp_path):
    path = written(tmp_path, grid={})
    data = yaml.safe_load(path.read_text())
    data["cut"]["method"] = "flap"
    change(data)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(UserError, match=message):
        plan(files.read(path), rate=1e9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d, p: d["arms"]["P"]["set"].update({"tokens": EACH * 10**4}),
            "P: budget: .* tokens are asked for, but domain",
        ),
        (lambda d, p: d["arms"]["P"]["set"].update({"data.domains": [{"folder": str(p / "none")}]}), "none"),
        (lambda d, p: d["evaluate"][0].update({"texts": [str(p / "none.txt")]}), "none.txt: no such text file"),
        (lambda d, p: d["cut"]["calibration"].update({"text": str(p / "none.jsonl")}), "none.jsonl: no such text file"),
        (lambda d, p: d["evaluate"][0].update({"tasks": ["piqa"]}), "tasks: their rows are files or on the hub"),
        (lambda d, p: d["evaluate"][0].update({"dtype": "float31"}), "unknown dtype 'float31'"),
        (lambda d, p: d["cut"].update({"ratio": 0.999}), "P-R_method=flap: ratio: the least that can stay"),
    ],
)
def test_nothing_begins_that_cannot_be_finished(change, message, tmp_path):
    path = written(tmp_path, compare=[])
    data = yaml.safe_load(path.read_text())
    change(data, tmp_path)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(UserError, match=message):
        run(files.read(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["..", ".x", "a/b", "steps", "cuts", "", "a b", "evaluations"])
def test_names_that_are_no_folders(name, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps({"name": "x", "arms": {name: {"recipe": base(tmp_path)}}}))
    with pytest.raises(UserError, match="it names a folder"):
        files.read(path)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"R": {"model": "m"}, "S": {"recipe": "scratch", "shape_of": "R"}}, "shape_of: 'R' is a released model"),
        ({"R": {"model": "m"}, "S": {"recipe": "scratch", "lr_of": "R"}}, "lr_of: 'R' trains nothing"),
        (
            {"R": {"recipe": "scratch"}, "S": {"recipe": "distill", "from": "R", "flops_of": "R"}},
            "a teacher costs FLOPs too",
        ),
        (
            {"R": {"recipe": "scratch"}, "S": {"recipe": "scratch", "flops_of": "R", "set": {"optimizer.lr": "sweep"}}},
            "'S': flops_of counts updates alone, and trying rates costs FLOPs too; name one rate, or give lr_of",
        ),
        (
            {"R": {"recipe": "scratch"}, "S": {"recipe": "adapt-pruner", "from": "R", "flops_of": "R", "set": SMALLER}},
            "'S': flops_of counts updates of one model, and prune makes later ones cheaper; drop one of them",
        ),
    ],
)
def test_arms_named_for_what_they_do_not_have(arms, message, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps({"name": "x", "arms": arms}))
    with pytest.raises(UserError, match=message):
        files.read(path)


def test_steps_of_one_name_are_refused(tmp_path):
    arms = {"x": {"recipe": base(tmp_path)}, "evaluate-x": {"recipe": base(tmp_path), "set": {"seed": 3}}}
    path = written(tmp_path, arms=arms, grid={}, compare=[])
    with pytest.raises(UserError, match="two steps are called 'evaluate-x'"):
        steps(files.read(path))


def test_a_plan_counts_the_teacher(tmp_path):
    plain = training.asked().plain()
    plain["model"], plain["teacher"] = {"source": "model"}, {"source": "teacher"}
    (tmp_path / "taught.yaml").write_text(json.dumps(plain), encoding="utf-8")
    common = {"from": "P", "cut": {"method": "minitron-depth", "ratio": 0.5}, "recipe": str(tmp_path / "taught.yaml")}
    arms = {"P": {"recipe": base(tmp_path)}, "taught": common | {"set": {"teacher.source": "from"}}}
    study = files.read(written(tmp_path, arms=arms, grid={}, compare=[], evaluate=[]))
    made = {row["step"]: row["flops"] for row in plan(study, rate=1e9)["steps"]}
    plain["teacher"] = None
    (tmp_path / "taught.yaml").write_text(json.dumps(plain), encoding="utf-8")
    arms["taught"] = common
    alone = {
        row["step"]: row["flops"]
        for row in plan(files.read(written(tmp_path, arms=arms, grid={}, compare=[], evaluate=[])), rate=1e9)["steps"]
    }
    assert made["taught"] - alone["taught"] == pytest.approx(made["P"] / 3, rel=1e-6)  # forward alone, of the parent


def test_the_size_before_the_cut_of_a_released_model_is_on_record(tmp_path, monkeypatch):
    """No other run has it; what cuts a run's model has it from that run."""
    pipeline.verify_here(monkeypatch)
    ratios(tmp_path, 0.3)
    study, out = files.read(tmp_path / "study.yaml"), tmp_path / "out"
    (line,), (read,) = gather(study, out), load(out).runs
    before = sum(weight.numel() for weight in pipeline.model("llama").parameters())
    assert line["uncut"] == read.uncut == before > read.params
    (cut_of(study.cells[0], out) / "prunus.json").unlink()
    assert gather(study, out) == []


def test_released_parents_have_no_total(tmp_path):
    path = written(tmp_path)
    data = yaml.safe_load(path.read_text())
    data["arms"]["P"] = {"model": "SmolLM2-135M", "grid": {}}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    with pytest.raises(UserError, match="nobody knows the tokens of SmolLM2-135M, which is released; take training-tokens"):
        protocol.check(files.read(path))


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        (":-20", "-20:", False), (":-20", "-21:", True), (":800", "-100:", True), (":5", "-3:", False), (None, "-3:", True),
        ("0:10", "10:20", False), ("0:11", "10:20", True), ("5:", ":5", False), ("-10:-5", "-5:", False),
    ],
)  # fmt: skip
def test_slices_that_share_documents(one, other, meet, tmp_path):
    """Of thirty documents, tried one by one."""
    text, numbers = tmp_path / "thirty.jsonl", range(30)
    text.write_text("".join(json.dumps({"text": f"d{i}"}) + "\n" for i in numbers), encoding="utf-8")
    seen = [set(numbers if which is None else numbers[protocol.slice_of(which)]) for which in (one, other)]
    assert protocol._meet(text, one, other) == meet == bool(seen[0] & seen[1])


def test_a_name_that_is_there_twice(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("name: x\narms:\n  a: {recipe: scratch}\n  a: {recipe: continue}\n")
    with pytest.raises(UserError, match="line 4: 'a' is there twice"):
        files.read(path)
    path.write_text("name: [x\n")
    with pytest.raises(UserError, match="not readable as YAML"):
        files.read(path)
    with pytest.raises(UserError, match="no such file or folder"):
        files.read(tmp_path / "none.yaml")


def test_too_few_processes(tmp_path):
    with pytest.raises(UserError, match="processes: 0 are too few"):
        run(files.read(small(tmp_path)), tmp_path / "out", processes=0)


def test_a_study_that_is_asked_to_stop_twice_leaves_nothing_running(tmp_path, monkeypatch):
    ended = []

    class Sleeps(running._Process):
        def terminate(self):
            ended.append(self.process.pid)
            super().terminate()

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "_Process", Sleeps)
    monkeypatch.setattr(running._Doing, "_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(files.read(small(tmp_path)), tmp_path / "out")
    assert len(ended) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(ended[0], 0)
    assert not load(tmp_path / "out").runs and load(tmp_path / "out").missing  # which can be looked at all the same


def test_a_study_is_gathered_while_it_is_on_its_way(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    path, out = written(tmp_path, compare=[], evaluate=[]), tmp_path / "out"
    study = files.read(path)
    do(study, steps(study)["P"], out)
    code, said, err = cli("study", "gather", path, "--out", out, "--json")
    assert code == 0, err
    assert [row["run"] for row in json.loads(said)["rows"]] == ["P"] == [run.name for run in load(out).runs]
    assert len(load(out).missing) == 8 and (out / "index.sqlite").is_file()
    code, _, err = cli("study", "gather", path, "--out", tmp_path / "nowhere")
    assert code == 2 and "nowhere: no such file or folder; give the --out of prunus study run" in err


def test_stopping_says_how_to_go_on():
    assert str(StoppedError(143, 2, "study")) == "stopped with 2 steps done; the same command goes on from there"


def test_what_a_step_says_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "LOG_BYTES", 200)
    process, told = object.__new__(running._Process), []
    process.log, process.said = tmp_path / "step.log", ""
    process._read(io.StringIO("".join(f"line {i}\n" for i in range(100)) + "\n"), told.append)
    assert process.said == "line 99" and len(told) == 100
    kept = [path.read_text() for path in (tmp_path / "step.log.1", tmp_path / "step.log")]
    assert all(len(text) <= 200 for text in kept) and "".join(kept).endswith("line 98\nline 99\n\n")
    assert len(list(tmp_path.iterdir())) == 2


def ratios(tmp_path, *values):
    """A study of cuts alone that differ by their ratios."""
    tmp_path.mkdir(exist_ok=True)
    calibration = {"text": str(pipeline.text_file()), "windows": 4, "seq_len": 16}
    data = {
        "name": "ratios",
        "cut": {"calibration": calibration, "method": "flap"},
        "arms": {"A": {"model": str(pipeline.folder("llama")), "cut": {}}},
        "grid": {"cut.ratio": list(values)},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    study, out = files.read(tmp_path / "study.yaml"), tmp_path / "out"
    everything(study, out)
    return {
        cell.place["cut.ratio"]: (
            json.loads((cut_of(cell, out) / "keep.json").read_text()),
            [stage.flops for stage in Ledger.read(cut_of(cell, out)).stages],
        )
        for cell in study.cells
    }


def test_cuts_of_several_sizes_share_what_calibration_found(tmp_path, monkeypatch):
    """It is gathered once, counts for each, and is gone when all are done."""
    pipeline.verify_here(monkeypatch)
    gathered, real = [], units._gathered
    monkeypatch.setattr(units, "_gathered", lambda job: gathered.append(1) or real(job))
    together = ratios(tmp_path / "together", 0.2, 0.3, 0.4)
    assert len(gathered) == 1 and not list((tmp_path / "together" / "out" / "statistics").glob("*.safetensors"))
    assert together == ratios(tmp_path / "backwards", 0.4, 0.3, 0.2)
    alone = ratios(tmp_path / "alone", 0.3)
    assert len(gathered) == 3 and alone[0.3] == together[0.3] != together[0.4]
    assert not (tmp_path / "alone" / "out" / "statistics").exists()
