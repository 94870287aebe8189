"""What passes over the dense model found serves every target: the same decision, with no pass; and, where it can, no model."""

from __future__ import annotations

import json

import pipeline
import pytest
from pipeline import cli, plan_for

from prunus import api, findings
from prunus.errors import UserError
from prunus.oneshot import one_shot_
from prunus.source import Source
from prunus.statistics import Sweep

WINDOWS = pipeline.windows(4)
SHARING = {
    "flap": {},
    "llm-pruner": {"options": {"protect": "0,0"}},
    "adapt-pruner": {},
    "prunus": {"multiple_of": 1},
    "minitron-width": {},
    "shortgpt": {},
    "shortened-llama": {"options": {"protect": "0,0"}},
    "sleb": {"options": {"protect": "0,0"}},
    "sublayer-greedy": {},
    "shortgpt+flap": {},
}
PERPLEXITY = {"method": "shortened-llama", "options": {"protect": "0,0", "score": "perplexity"}}


@pytest.mark.parametrize("method", [*SHARING, "perplexity"])
def test_findings_give_the_same_model_at_another_target(method, tmp_path):
    """Through a file, so that what is saved is all there is."""
    request = PERPLEXITY if method == "perplexity" else {"method": method, **SHARING[method]}
    calibrated = {"calibration": str(pipeline.text_file()), "text": api.TextOptions(4, 16)}
    file, source = tmp_path / "found.safetensors", str(pipeline.folder())
    api.prune(source, **request, **calibrated, ratio=0.34, statistics=file)
    again = api.prune(source, **request, **calibrated, ratio=0.6, statistics=file).outcome
    direct = api.prune(source, **request, **calibrated, ratio=0.6).outcome
    assert again.keep == direct.keep
    ours, theirs = pipeline.state(again.model), pipeline.state(direct.model)
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["flap", "llm-pruner", "adapt-pruner", "minitron-width", "shortgpt", "sleb"])
def test_findings_spare_every_pass(method, monkeypatch):
    request = {"method": method, **SHARING[method]}
    first = one_shot_(plan_for(model := pipeline.model("llama"), **request, ratio=0.6), model, WINDOWS)
    monkeypatch.setattr(Sweep, "__init__", lambda *_, **__: pytest.fail("no second pass"))
    model = pipeline.model("llama")
    again = one_shot_(plan_for(model, **request, ratio=0.34), model, WINDOWS, findings=first.findings)
    assert again.keep is not None and again.keep != first.keep


def test_a_greedy_search_goes_on_where_another_stopped():
    request = {"method": "sublayer-greedy"}
    short = one_shot_(plan_for(model := pipeline.model("llama"), **request, ratio=0.2), model, WINDOWS)
    model = pipeline.model("llama")
    longer = one_shot_(plan_for(model, **request, ratio=0.5), model, WINDOWS, findings=short.findings)
    direct = one_shot_(plan_for(model := pipeline.model("llama"), **request, ratio=0.5), model, WINDOWS)
    assert longer.keep == direct.keep and len(longer.findings.rounds) >= len(short.findings.rounds)
    model = pipeline.model("llama")
    back = one_shot_(plan_for(model, **request, ratio=0.2), model, WINDOWS, findings=longer.findings)
    assert back.keep == short.keep and back.findings.rounds[: len(short.findings.rounds)] == short.findings.rounds


@pytest.mark.parametrize("method", ["flap", "llm-pruner", "adapt-pruner", "prunus"])
def test_a_plan_tells_the_sizes_without_the_model(method, tmp_path, monkeypatch):
    file, text = tmp_path / "found.safetensors", ("-c", pipeline.text_file(), "--windows", 4, "--seq-len", 16)
    more = [word for name, value in SHARING[method].get("options", {}).items() for word in ("--option", f"{name}={value}")]
    more += ["--multiple-of", 1] if method == "prunus" else []
    ask = ("-m", method, "-r", 0.4, *more, *text, "--statistics", file)
    code, out, err = cli("prune", pipeline.folder(), *ask, "-o", tmp_path / "out", "--json")
    assert code == 0, err
    done = json.loads(out)
    monkeypatch.setattr(Source, "load", lambda *a, **k: pytest.fail("no weight may be read"))
    code, out, err = cli("plan", pipeline.folder(), *ask, "--json")
    assert code == 0, err
    assert json.loads(out)["after"]["shape"] == done["after"]["shape"]
    assert json.loads(out)["after"]["block_params"] == done["after"]["block_params"]


def test_who_shares_with_whom():
    config = pipeline.config("llama")

    def what(**request):
        return findings.wanted(plan_for(config, **{"ratio": 0.34} | request))

    assert what(method="flap") == what(method="flap", ratio=0.5, compensate="none", uniform=True)
    assert what(method="flap") == what(method="flap", allocate="search")
    assert what(method="prunus", multiple_of=1) == what(method="prunus", multiple_of=4, cost="flops", ratio=0.5)
    assert what(method="prunus", multiple_of=1) != what(method="prunus", multiple_of=1, compensate="least-squares")
    assert what(method="prunus", multiple_of=1) != what(method="prunus", multiple_of=1, options={"unseen": "0.1"})
    taylor = {"method": "llm-pruner", "options": {"protect": "0,0"}}
    assert what(**taylor) != what(method="llm-pruner", options={"protect": "0,0", "score": "second"})
    for sequential in ({"method": "wanda"}, {"method": "wanda-sp"}, {"method": "ziplm"}, {"method": "minitron-depth"}):
        assert what(**sequential) is None
    assert what(method="wanda-sp", order="dense") is not None  # scores of the dense model serve any ratio


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"method": "wanda", "ratio": 0.5}, "statistics: wanda must sweep again for every target; drop --statistics"),
        ({"method": "magnitude-sp", "ratio": 0.5}, "calibration: magnitude-sp reads no text"),
        (
            {"method": "shortgpt", "ratio": 0.4},
            "holds what was gathered for 'fluctuation', not 'block-influence'; give another",
        ),
    ],
)
def test_files_that_do_not_fit(about, message, tmp_path):
    text = {"calibration": str(pipeline.text_file()), "text": api.TextOptions(4, 16)}
    file = tmp_path / "found.safetensors"
    api.prune(str(pipeline.folder()), method="flap", ratio=0.3, statistics=file, **text)
    with pytest.raises(UserError, match=message):
        api.prune(str(pipeline.folder()), **about, statistics=file, **text)


def test_a_damaged_file_is_refused(tmp_path):
    file = tmp_path / "found.safetensors"
    text = {"calibration": str(pipeline.text_file()), "text": api.TextOptions(4, 16)}
    api.prune(str(pipeline.folder()), method="flap", ratio=0.3, statistics=file, **text)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"found\.safetensors: "):
        api.prune(str(pipeline.folder()), method="flap", ratio=0.3, statistics=file, **text)


# -- sequential or dense --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "prunus-sparse", "wanda-sp", "ziplm", "osscar", "flap"])
def test_order_changes_what_later_blocks_see(method, monkeypatch):
    """The first block is cut alike; a sequential one's successors read what is left of it, a dense one's do not."""
    outcomes = {}
    for order in ("sequential", "dense"):
        model = pipeline.model("llama")
        outcomes[order] = one_shot_(plan_for(model, method=method, ratio=0.5, order=order), model, WINDOWS)
    default = one_shot_(plan_for(model := pipeline.model("llama"), method=method, ratio=0.5), model, WINDOWS)
    usual = "dense" if method == "flap" else "sequential"
    states = {order: pipeline.state(outcome.model) for order, outcome in outcomes.items()}
    assert all(value.equal(states[usual][name]) for name, value in pipeline.state(default.model).items())
    same = {name for name, value in states["dense"].items() if value.equal(states["sequential"].get(name, value[:0]))}
    assert len(same) < len(states["dense"])
    first = {name for name in states["dense"] if ".layers.0.self_attn.q_proj" in name}
    assert first <= same


def test_a_dense_order_reads_the_dense_model(monkeypatch):
    """Wanda's masks by hand, from one plain forward of the source."""
    dense, model = pipeline.model("llama"), pipeline.model("llama")
    outcome = one_shot_(plan_for(model, method="wanda", ratio=0.5, order="dense"), model, WINDOWS)
    for name, kept in outcome.mask.kept.items():
        module = name.removesuffix(".weight")
        x = pipeline.inputs_of(dense, WINDOWS.ids_NT, [module])[module].flatten(0, 1)
        scores = dense.get_submodule(module).weight.detach().double().abs() * x.norm(dim=0)
        for row, row_kept in zip(scores, kept, strict=True):
            gone = sorted(range(len(row)), key=lambda j: float(row[j]))[: len(row) // 2]
            assert (~row_kept).nonzero().flatten().tolist() == sorted(gone), name


def test_sequential_flap_keeps_its_sizes_and_biases_what_is_lost():
    """Sizes come from the dense scores, units and biases from behind the cut."""
    made = {}
    for order in ("sequential", "dense"):
        model = pipeline.model("llama")
        made[order] = one_shot_(plan_for(model, method="flap", ratio=0.4, order=order), model, WINDOWS)
    assert made["sequential"].target.anatomy.shape == made["dense"].target.anatomy.shape
    dense = pipeline.model("llama")
    name = "model.layers.0.mlp.down_proj"
    gone = made["sequential"].keep.dropped("layers.0.intermediate", dense.config.intermediate_size)
    # attention of block 0 is cut first, and the MLP's statistics are of the block as it was: both orders give this bias
    mean = pipeline.inputs_of(dense, WINDOWS.ids_NT, [name])[name].flatten(0, 1).mean(0)
    want = dense.get_submodule(name).weight.double()[:, gone] @ mean[gone]
    assert made["sequential"].model.get_submodule(name).bias.double().sub(want).abs().max() < 1e-5
