"""Two processes that work on one run, against one that does it alone: real ones, by torchrun and gloo."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pipeline
import pytest
import torch
from training import SEQ, Killed, asked, killed_saying, run, tiny_shape, weights, weights_of

from prunus.distributed import ALONE, World
from prunus.errors import UserError
from prunus.train import export, saved
from prunus.train.opening import prepare as opened
from prunus.train.parts import RATES
from prunus.train.run import execute

WORKER = Path(__file__).with_name("worker.py")  # a file, so that it is checked as the rest is


def torchrun(*arguments: object, processes: int = 2) -> list[str]:
    base = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return base + [str(a) for a in arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def work(folder: Path, jobs: list[dict], processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Jobs one after another in the same processes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([{**job, "recipe": job["recipe"].plain()} for job in jobs], default=str))
    command = torchrun(WORKER, folder / "jobs.json", processes=processes)
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment())


def tied(**changes):
    return asked(model__shape=tiny_shape() | {"tie_word_embeddings": True}, **changes)


def uneven(**changes):
    """Five sequences, three and two; the second micro-batch is empty in one process, and so it is in validation."""
    more = {
        "batch_tokens": 5 * SEQ, "tokens": 6 * 5 * SEQ, "micro_batch": 2, "validate__sequences": 3,
        "data__separate_documents": True, "log_every": 1,
    }  # fmt: skip
    return asked(**{**more, **changes})


def sparse(**changes):
    folder, _, _ = pipeline.saved("sparse")
    return asked(model={"source": str(folder), "mask": str(folder)}, **changes)


def pruned(**changes):
    """Cut in every axis while it trains: matrices are summed weight by weight, by rows of which every process has some."""
    part = {"target": {"ratio": 0.4}, "pace": {"start": 0.1, "end": 0.8}, "slice_at": 0.1}
    return tied(**{"prune": part} | changes)


def pruned_each(**changes):
    """Units by themselves, of every matrix; sums over rows are shared at once."""
    part = {
        "target": {"ratio": 0.4}, "axes": ["kv_heads", "intermediate"], "alike": False,
        "saliency": {"matrices": "all", "metric": "second"},
    }  # fmt: skip
    return tied(**{"prune": part, "micro_batch": 4} | changes)


def repaired(**changes):
    """Each process sums what its own sequences show, until something goes; with five sequences, one is idle at times."""
    part = {
        "target": {"ratio": 0.4}, "pace": {"start": 0.1, "end": 0.8}, "slice_at": 0.1,
        "repair": {"kind": "least-squares", "stem": "least-squares"}, "activations": {"average": 0.9, "every": 3},
    }  # fmt: skip
    return tied(**{"prune": part, "batch_tokens": 5 * SEQ, "tokens": 6 * 5 * SEQ} | changes)


def taught(**changes):
    """Every process holds the whole of what the model was before its last cut; query heads go one by one."""
    part = {
        "target": {"ratio": 0.4}, "axes": ["heads", "intermediate", "hidden"],
        "pace": {"start": 0.2, "end": 0.7, "rounds": 2}, "slice_at": 0.0,
    }  # fmt: skip
    return tied(**{"prune": part, "teacher": {"snapshot": True, "mix": 0.5}} | changes)


def masked(**changes):
    """Gates' gradients are summed over processes; gates are folded into rows of which every process has some."""
    sizes = {"hidden_size": 20, "intermediate_size": 12, "num_hidden_layers": 2}
    part = {"target": sizes, "axes": ["hidden", "intermediate", "layers"], "masks": {}}
    return tied(**{"prune": part} | changes)


def swept(**changes):
    """Every rate on the whole run, and then the best one."""
    return tied(**{"optimizer__lr": "sweep", "tokens": 4 * 4 * SEQ} | changes)


def adapted(**changes):
    """Frozen weights beside trained ones in every block; embedding and norms are frozen altogether."""
    return asked(**{"model": {"source": str(pipeline.folder("llama_tied"))}, "lora": {"rank": 3}} | changes)


RECIPES = {
    "tied": tied,
    "uneven": uneven,
    "sparse": sparse,
    "pruned": pruned,
    "pruned-each": pruned_each,
    "repaired": repaired,
    "taught": taught,
    "masked": masked,
    "swept": swept,
    "adapted": adapted,
}
MORE = {
    "autocast": functools.partial(tied, precision="bfloat16-autocast"),
    "adapted-narrow": functools.partial(adapted, precision="bfloat16"),
    "recomputed": functools.partial(uneven, checkpoint_activations=True),
}


@functools.cache
def alone(name: str) -> Path:
    out = pipeline.scratch() / f"alone-{name}"
    with mock.patch.object(export, "check_saved", return_value={}):
        run(out, (RECIPES | MORE)[name]())
    return out


@functools.cache
def by_two() -> Path:
    """All that the fast tests look at, from one launch."""
    out = pipeline.scratch() / "by-two"
    jobs = [{"recipe": make(), "out": out / name, "verify": name == "tied"} for name, make in RECIPES.items()]
    jobs += [{"recipe": tied(), "out": out / name, "at": 5, "how": "raise"} for name in ("stopped", "on-by-one")]
    jobs += [{"recipe": repaired(), "out": out / "repaired-stopped"} | more for more in ({"at": 5, "how": "raise"}, {})]
    stop_alone(out / "on-by-two", tied())
    jobs += [{"recipe": tied(), "out": out / name} for name in ("stopped", "on-by-two")]
    done = work(out, jobs)
    assert done.returncode == 0, done.stderr[-20_000:]
    return out


def stop_alone(out: Path, recipe) -> None:
    with pytest.raises(Killed):
        run(out, recipe, say=killed_saying(5))


def lines(out: Path) -> list[dict]:
    return [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path, tolerance: float = 1e-5) -> dict[str, float]:
    """Largest relative differences of losses and norms, and the largest one of weights, each below the tolerance.

    Float32 sums over two halves are in another order: 1e-7 a step, which a handful of AdamW steps at rate 0.01 make 1e-6.
    """
    mine, theirs = lines(one), lines(other)
    assert [(m["step"], m["tokens"], m.get("lr")) for m in mine] == [(t["step"], t["tokens"], t.get("lr")) for t in theirs]
    worst = {"loss": 0.0, "grad_norm": 0.0, "validation": 0.0}
    for m, t in zip(mine, theirs, strict=True):
        if "pruned" in m:
            for key in ("groups", "gone", "units", "params", "shape"):
                assert m["pruned"][key] == t["pruned"][key]
        elif "validation" in m:
            assert m["validation"]["sequences"] == t["validation"]["sequences"]
            worst["validation"] = max(worst["validation"], abs(m["validation"]["loss"] / t["validation"]["loss"] - 1))
        elif "note" in m:
            assert "note" in t  # its figures are rounded, and may fall to either side
        else:
            for key in ("loss", "grad_norm"):
                worst[key] = max(worst[key], abs(m[key] / t[key] - 1))
    a, b = weights(one), weights(other)
    assert list(a) == list(b) and all(a[name].dtype == b[name].dtype for name in a)
    worst["weights"] = max(float((a[name].float() - b[name].float()).abs().max()) for name in a)
    print(one.name, worst)
    assert max(worst.values()) < tolerance, worst
    assert (one / "ledger.json").read_bytes() == (other / "ledger.json").read_bytes()
    return worst


# -- arithmetic without processes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once(size):
    for count in range(20):
        shares = [World(rank, size).share(count) for rank in range(size)]
        assert [i for share in shares for i in range(share.start, share.stop)] == list(range(count))
        assert max(share.stop - share.start for share in shares) == World(0, size).largest_share(count)


def test_parts_cover_dimension_0():
    tensor = torch.arange(10).reshape(5, 2)
    for size in (1, 2, 3, 4, 7):
        assert torch.cat([World(rank, size).part(tensor) for rank in range(size)]).equal(tensor)


def test_alone_everything_is_its_own():
    assert ALONE.share(5) == slice(0, 5) and ALONE.total(2.5) == ALONE.most(2.5) == 2.5
    assert ALONE.agree("x") == "x" and ALONE.together([1]) == [1] and ALONE.first
    assert [name for name, _ in ALONE.to_first({"a": torch.zeros(2)})] == ["a"]


def test_alone_nothing_of_it_is_imported(monkeypatch, tmp_path):
    """transformers itself imports these modules; with their names taken away, only an import of our own could fail."""
    for name in ("fsdp", "device_mesh"):
        monkeypatch.setitem(sys.modules, f"torch.distributed.{name}", None)
    run(tmp_path / "run", asked(tokens=2 * 4 * SEQ))
    assert not torch.distributed.is_initialized()


def test_what_several_cannot_share_is_refused(monkeypatch, tmp_path):
    import contextlib

    monkeypatch.setattr(World, "joined", lambda: contextlib.nullcontext(World(0, 8)))
    with pytest.raises(UserError, match="8 processes cannot share updates of 4 sequences; give at least 128"):
        execute(opened(asked(), tmp_path / "run"))
    few = {"target": {"ratio": 0.4}, "pace": {"kind": "once", "samples": 3}}
    with pytest.raises(UserError, match=r"prune\.pace\.samples: 8 processes cannot share 3 sequences; give at least 8"):
        execute(opened(asked(prune=few, batch_tokens=8 * SEQ), tmp_path / "few"))
    with pytest.raises(UserError, match="compile: is for one process only"):
        execute(opened(asked(compile=True, batch_tokens=8 * SEQ), tmp_path / "other"))


# -- two processes --------------------------------------------------------------------------------------------------------


# A fit damped by 1e-4 makes up to 1e4 times a difference of its sums' last bits: 1.6e-5 of a weight was measured.
FITTED = 1e-4


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_two_are_one(name):
    assert_same_run(by_two() / name, alone(name), tolerance=FITTED if name == "repaired" else 1e-5)


def test_two_choose_the_rate_that_one_chooses():
    one, two = (json.loads((out / "sweep.json").read_text()) for out in (alone("swept"), by_two() / "swept"))
    assert [rate for rate, _ in two["losses"]] == [rate for rate, _ in one["losses"]] == list(RATES)
    assert [loss for _, loss in two["losses"]] == pytest.approx([loss for _, loss in one["losses"]], rel=1e-6)


def test_adapters_of_two_are_in_the_weights():
    before, after = weights_of(pipeline.folder("llama_tied")), weights(by_two() / "adapted")
    assert after.keys() == before.keys()
    moved = {name for name in before if not after[name].equal(before[name])}
    assert moved == {name for name in before if ".layers." in name and before[name].dim() == 2}


def test_zeros_stay_zero_in_parts():
    before, after = weights_of(pipeline.saved("sparse")[0]), weights(by_two() / "sparse")
    zeros = {name: value == 0 for name, value in before.items() if name.endswith("_proj.weight")}
    assert sum(int(z.sum()) for z in zeros.values()) > 100
    assert all(not bool(after[name][zero].any()) for name, zero in zeros.items())


def test_what_is_cut_has_no_moments():
    from safetensors.torch import load_file

    before, moments = weights_of(pipeline.saved("sparse")[0]), {}
    for file in saved.folder_of(alone("sparse") / "checkpoints", 8).glob("*.safetensors"):
        moments |= load_file(file)
    zeros = {name: value == 0 for name, value in before.items() if name.endswith("_proj.weight")}
    for slot in ("exp_avg", "exp_avg_sq"):
        assert all(not bool(moments[f"{slot}.{name}"][zero].any()) for name, zero in zeros.items())
    assert any(bool(moments[f"exp_avg.{name}"].any()) for name in zeros)


def test_stopped_two_go_on_bit_for_bit():
    out = by_two()
    for stopped, whole in (("stopped", "tied"), ("repaired-stopped", "repaired")):
        a, b = weights(out / stopped), weights(out / whole)
        assert all(a[name].equal(b[name]) for name in b)
    pick = [{k: line.get(k) for k in ("step", "loss", "grad_norm", "validation")} for line in lines(out / "stopped")]
    assert pick == [{k: line.get(k) for k in ("step", "loss", "grad_norm", "validation")} for line in lines(out / "tied")]


def test_another_number_of_processes_goes_on():
    out = by_two()
    assert len(list(saved.folder_of(out / "on-by-one" / "checkpoints", 4).glob("*.safetensors"))) == 2
    run(out / "on-by-one", tied())
    for name in ("on-by-one", "on-by-two"):
        assert_same_run(out / name, alone("tied"))


def test_what_two_write_is_what_one_writes():
    """The same files, the same header; and no half-written thing is left."""
    one, two = alone("tied") / "model", by_two() / "tied" / "model"
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    header = [p.joinpath("model.safetensors").read_bytes()[:8] for p in (one, two)]
    assert header[0] == header[1]
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
    assert not [p for p in by_two().rglob(".*") if p.name != ".lock"]


def test_the_command_line_under_torchrun(tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(tied(validate__every=0, tokens=2 * 4 * SEQ).plain()))
    command = torchrun("-m", "prunus.cli", "train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment())
    assert done.returncode == 0, done.stderr[-20_000:]
    figures = json.loads(done.stdout)["figures"]  # one object, from one process
    assert figures["processes"] == 2 and figures["verified"]["clean_process"] and figures["tokens"] == 2 * 4 * SEQ


# -- slow -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_are_one_in_bfloat16_and_with_activations_computed_again(tmp_path):
    """A product in bfloat16 rounds at 2^-8, and rows in another micro-batch may round the other way."""
    done = work(tmp_path, [{"recipe": make(), "out": tmp_path / name} for name, make in MORE.items()])
    assert done.returncode == 0, done.stderr[-20_000:]
    assert_same_run(tmp_path / "recomputed", alone("recomputed"))
    for name in ("autocast", "adapted-narrow"):
        assert_same_run(tmp_path / name, alone(name), tolerance=2e-2)


@pytest.mark.slow
def test_three_are_one(tmp_path):
    """More processes than some tensors have rows to share evenly; one is idle in every second micro-batch.

    With micro-batches of one, a weight's first gradient is of the size of AdamW's eps (1.79e-8 in one order of sums, 1.74e-8 in
    the other), where the first step's size depends on it: that one weight of 45,000 ends 3e-5 away.
    """
    done = work(tmp_path, [{"recipe": uneven(micro_batch=1), "out": tmp_path / "run"}], processes=3)
    assert done.returncode == 0, done.stderr[-20_000:]
    run(tmp_path / "alone", uneven(micro_batch=1))
    assert_same_run(tmp_path / "run", tmp_path / "alone", tolerance=1e-4)


@pytest.mark.slow
def test_one_that_dies_takes_the_other_along(tmp_path):
    """With a reason, within a minute; the last checkpoint counts."""
    since = time.monotonic()
    recipe = tied(save__every=2, validate__every=0)
    done = work(tmp_path, [{"recipe": recipe, "out": tmp_path / "run", "at": 5, "how": "die", "rank": 1}])
    assert done.returncode != 0 and time.monotonic() - since < 90
    assert re.search(r"one of 2 processes was lost|exitcode +: 7", done.stderr), done.stderr[-20_000:]
    assert saved.steps(tmp_path / "run" / "checkpoints") == [2, 4]
    run(tmp_path / "run", recipe)
    assert weights(tmp_path / "run")


@pytest.mark.slow
def test_sigterm_saves_where_all_stand(tmp_path):
    recipe = tied(tokens=60 * 4 * SEQ, data__epochs=3, save__every=0, validate__every=0)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.plain()))
    command = torchrun("-m", "prunus.cli", "train", tmp_path / "r.yaml", "--out", tmp_path / "run")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()) as child:
        for line in child.stderr:
            if line.startswith("step      9"):
                child.send_signal(signal.SIGTERM)
                break
        said = child.stderr.read()
    steps = saved.steps(tmp_path / "run" / "checkpoints")
    assert len(steps) == 1 and 9 <= steps[0] < 60 and "the same command goes on from there" in said
