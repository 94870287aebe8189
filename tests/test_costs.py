"""Prices of units: counted ones against built shapes, timed ones from a made-up table. Budgets are met in what they count."""

from __future__ import annotations

import math

import pipeline
import pytest
import tiny
import torch
from pipeline import cli, plan_for

from prunus import api, latency
from prunus.anatomy import Anatomy
from prunus.costs import SEQ_LEN, is_timed, measured, prices_of, rungs
from prunus.errors import UserError
from prunus.hf import target_for
from prunus.keep import Keep
from prunus.latency import Table, Timing, layer_part
from prunus.oneshot import one_shot_

WINDOWS = pipeline.windows(4)
GLOBAL = {"method": "llm-pruner", "allocate": "global", "options": {"protect": "0,0"}}


def block_flops(anatomy):
    return anatomy.flops(SEQ_LEN) - 2 * SEQ_LEN * anatomy.shape.vocab_size * anatomy.shape.hidden_size


COUNTED = {
    "params": lambda anatomy: anatomy.block_params,
    "flops": block_flops,
    "kv-bytes": lambda anatomy: anatomy.kv_bytes_per_token(),
}


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2", "phi3", "qwen2"])
@pytest.mark.parametrize("cost", sorted(COUNTED))
def test_prices_are_what_cut_shapes_count(case, cost):
    anatomy = Anatomy.of(pipeline.config(case))
    prices = prices_of(anatomy, anatomy, cost, {})
    assert prices.source == prices.whole == COUNTED[cost](anatomy)
    for name, listed in prices.of.items():
        size = anatomy.axes[name].size
        assert len(listed) == size + 1 and listed[0] == 0
        for n in range(1, size):
            after = Keep({name: tuple(range(n))}).anatomy_after(anatomy)
            assert listed[size] - listed[n] == prices.whole - COUNTED[cost](after), (name, n)
    assert prices.fixed(prices.of) == prices.whole - sum(listed[-1] for listed in prices.of.values()) >= 0


def test_a_kv_group_s_flops_by_hand():
    """Of one token at T = 1,024: its four matrices twice, and scores and sums of its query heads over all tokens."""
    anatomy = Anatomy.of(pipeline.config("llama"))
    s = anatomy.shape
    queries = s.layers[0].num_attention_heads // s.layers[0].num_key_value_heads
    rows = s.head_dim * (2 + 2 * queries)  # k and v, q and o
    want = 2 * SEQ_LEN * rows * s.hidden_size + 4 * SEQ_LEN**2 * s.head_dim * queries
    assert prices_of(anatomy, anatomy, "flops", {}).unit("layers.0.kv_heads") == want


@pytest.mark.parametrize("cost", sorted(COUNTED))
@pytest.mark.parametrize("request_", [GLOBAL, {"method": "prunus", "multiple_of": 1}], ids=lambda r: r["method"])
def test_the_budget_is_met_in_what_it_counts(cost, request_):
    if cost == "kv-bytes":
        ratio = 0.5
    else:
        ratio = 0.35
    model = pipeline.model("llama")
    plan = plan_for(model, **request_, cost=cost, ratio=ratio)
    source = COUNTED[cost](plan.anatomy)
    assert plan.budget == math.floor((1 - ratio) * source)
    outcome = one_shot_(plan, model, WINDOWS)
    after = COUNTED[cost](outcome.target.anatomy)
    dearest = max(prices[1] for prices in plan.prices.of.values())
    assert plan.budget - dearest < after <= plan.budget
    assert torch.isfinite(tiny.logits_of(outcome.model, WINDOWS.ids_NT)).all()


def test_what_costs_nothing_stays():
    """Channels have no part in the KV cache, so only groups go."""
    model = pipeline.model("llama")
    plan = plan_for(model, **GLOBAL, cost="kv-bytes", ratio=0.5)
    kept = one_shot_(plan, model, WINDOWS).keep.units
    assert kept and all(name.endswith("kv_heads") for name in kept)


def test_costs_change_what_goes():
    """A channel's weights are fewer than a group's, and so is its price: bare scores and scores for what they cost differ."""
    kept = {}
    for cost in (None, "params", "flops"):
        model = pipeline.model("llama")
        kept[cost] = one_shot_(plan_for(model, **GLOBAL, cost=cost, ratio=0.4), model, WINDOWS).keep
    assert kept[None] != kept["params"]


# -- milliseconds ---------------------------------------------------------------------------------------------------------


def made_up(config, anatomy, layer, dtype, prompt_tokens):
    """A group takes 5 ms, a channel half of one, decoding a tenth; the rest of a layer 1 ms."""
    own = anatomy.shape.layers[layer]
    ms = 1 + 5 * own.num_key_value_heads + 0.5 * own.intermediate_size
    return Timing(ms, ms / 10), Timing(2.0, 0.2)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table, and a clock that knows nothing of this machine."""
    monkeypatch.setattr(latency, "measured", made_up)
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    return Table.open(latency.key("float32", 8))


@pytest.mark.parametrize(("cost", "scale"), [("prefill-ms", 1_000_000), ("decode-ms", 100_000)])
def test_prices_in_milliseconds(table, cost, scale):
    config = pipeline.config("llama")
    anatomy = Anatomy.of(config)
    filled = measured(table, config, anatomy, frozenset())
    prices = prices_of(anatomy, target_for(config, anatomy, Keep(), stock=False).anatomy, cost, filled.entries)
    layers, own = anatomy.shape.num_hidden_layers, anatomy.shape.layers[0]
    assert prices.whole == scale * layers * (1 + 5 * own.num_key_value_heads + 0.5 * own.intermediate_size)
    for n in range(1, own.num_key_value_heads + 1):  # what one unit takes, nobody can tell from the rest: it is fixed
        assert prices.of["layers.0.kv_heads"][n] == scale * 5 * (n - 1)
    for n in range(1, own.intermediate_size + 1):  # a straight line between rungs is exact here
        assert prices.of["layers.1.intermediate"][n] == pytest.approx(scale * (n - 1) / 2, abs=1)


def test_prices_never_fall(table):
    """Where a clock's noise makes a larger layer faster, it costs as much as the smaller one."""
    config = pipeline.config("llama")
    anatomy = Anatomy.of(config)
    entries = dict(measured(table, config, anatomy, frozenset()).entries)
    less = Keep({"layers.0.kv_heads": (0, 1, 2)}).anatomy_after(anatomy)
    entries[layer_part(less, 0)] = Timing(0.5, 0.5)
    listed = prices_of(anatomy, anatomy, "prefill-ms", entries).of["layers.0.kv_heads"]
    assert list(listed) == sorted(listed)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9, 24, 1536])
def test_rungs(size):
    found = rungs(size)
    assert found[0] == 1 and found[-1] == size and len(found) <= 9 and found == sorted(set(found))
    assert is_timed("decode-ms") and not is_timed("flops") and not is_timed(None)


def test_a_cut_by_milliseconds_end_to_end(table, tmp_path):
    """Through the front door: the table is filled first, the budget is in nanoseconds, and a second call measures nothing."""
    ask = {
        "method": "llm-pruner", "options": {"protect": "0,0"}, "allocate": "global", "cost": "prefill-ms", "ratio": 0.4,
        "calibration": str(pipeline.text_file()), "text": api.TextOptions(4, 16),
    }  # fmt: skip
    outcome = api.prune(str(pipeline.folder()), **ask).outcome
    took = sum(made_up(None, outcome.target.anatomy, i, "", 0)[0].prefill_ms for i in range(3))
    assert took * 1e6 <= outcome.plan.budget + 3 and took > 0.5 * outcome.plan.prices.source / 1e6
    again = api.prune(str(pipeline.folder()), **ask).outcome
    assert again.keep == outcome.keep


def flattening(config, anatomy, layer, dtype, prompt_tokens):
    """Beyond two groups and nine channels one more takes hardly anything."""
    own = anatomy.shape.layers[layer]
    groups, channels = own.num_key_value_heads, own.intermediate_size
    ms = 1 + 5 * min(groups, 2) + 0.1 * groups + 2 * min(channels, 9) + 0.1 * channels
    return Timing(ms, ms / 10), Timing(2.0, 0.2)


@pytest.mark.parametrize(("method", "allocate"), [("llm-pruner", "global"), ("flap", "search")])
def test_a_budget_is_kept_where_prices_bend(method, allocate, table, monkeypatch):
    monkeypatch.setattr(latency, "measured", flattening)
    options = {"protect": "0,0"} if method == "llm-pruner" else {"generations": "6", "offspring": "8"}
    ask = {"method": method, "options": options, "allocate": allocate, "cost": "prefill-ms", "ratio": 0.4, "multiple_of": 1}
    text = {"calibration": str(pipeline.text_file()), "text": api.TextOptions(4, 16)}
    outcome = api.prune(str(pipeline.folder()), **ask, **text).outcome
    prices = outcome.plan.prices
    kept = {name: len(outcome.keep.units.get(name, listed[1:])) for name, listed in prices.of.items()}
    took = prices.fixed(kept) + sum(prices.of[name][n] for name, n in kept.items())
    assert 0.9 * outcome.plan.budget < took <= outcome.plan.budget


def test_a_plan_measures_only_when_asked(table):
    words = (
        "plan",
        pipeline.folder(),
        "-m",
        "prunus",
        "--multiple-of",
        1,
        "-r",
        0.3,
        "--cost",
        "decode-ms",
        "--seq-len",
        16,
    )
    code, _, err = cli(*words)
    assert code == 2 and "cost: decode-ms needs what a layer of these sizes takes here" in err and "add --latency" in err
    code, out, err = cli(*words, "--latency")
    assert code == 0, err
    assert "decode-ms" in out


# -- wrong inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"method": "flap", "cost": "flops"}, r"cost: flap's allocation 'global-standardised' weighs no costs; add --al"),
        ({"method": "wanda", "cost": "flops"}, r"cost: wanda's allocation 'per-row' weighs no costs; drop --cost"),
        ({"method": "prunus", "cost": "flop"}, r"unknown cost 'flop' \(did you mean 'flops'\?\)"),
        ({"method": "prunus", "cost": "flops", "uniform": True}, "uniform: layers alike are made to fit a number of parameters"),
        ({"method": "prunus", "cost": "kv-bytes", "ratio": 0.01}, "ratio: 0.01 is below one unit of this model; ask for more"),
        ({"method": "prunus", "cost": "kv-bytes", "ratio": 0.9}, r"takes \d+ kv-bytes, but the target leaves \d+; ask for a small"),
        ({"method": "flap", "allocate": "globl"}, "unknown value for allocate of flap 'globl'"),
        ({"method": "flap", "options": {"generations": "5"}}, "option 'generations': it is of the allocator search; add --allo"),
        ({"method": "flap", "allocate": "search", "options": {"generations": "0"}}, "generations: '0' is no whole number above 0"),
        ({"method": "prunus", "order": "dense"}, "order: prunus is always sequential; drop --dense"),
        ({"method": "flap", "order": "both"}, "unknown order 'both'"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(request_, message):
    usual = {"ratio": 0.3, "multiple_of": 1} if request_["method"] == "prunus" else {"ratio": 0.3}
    with pytest.raises(UserError, match=message) as caught:
        plan_for(pipeline.config("llama"), **(usual | request_))
    assert "\n" not in str(caught.value)
