"""Requests are checked against method and model before a weight is read; a plan says the sizes."""

from __future__ import annotations

import math

import pipeline
import pytest
import tiny
from pipeline import plan_for

from prunus.anatomy import Anatomy
from prunus.asked import parse_pattern
from prunus.errors import UserError
from prunus.families import AXES
from prunus.hf import target_for
from prunus.keep import Keep
from prunus.methods import METHODS, method_named
from prunus.planning import Request
from prunus.shaping import proportional_width

LLAMA = pipeline.config("llama")  # hidden 32, 8 heads, 4 groups, 24 channels, 3 layers

FIVE = ("flap", "magnitude", "minitron-depth", "minitron-width", "wanda")


def layer_params(hidden=32, groups=4, per_group=2, head_dim=8, channels=24):
    """Parameters of a llama block without biases, by the formula of algorithms.md 0.2."""
    return 2 * hidden * head_dim * groups * (per_group + 1) + 3 * hidden * channels + 2 * hidden


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"method": "flop", "ratio": 0.2}, r"unknown method 'flop' \(did you mean 'flap'\?\): known are adapt-pruner, flap, "),
        ({"method": "Wanda", "ratio": 0.5}, r"did you mean 'wanda'"),
        ({"method": "flap"}, r"ratio: flap needs to know how much to cut; give --ratio$"),
        ({"method": "wanda"}, r"ratio: wanda needs to know how much to cut; give --ratio$"),
        ({"method": "minitron-width"}, r"ratio: minitron-width needs to know how much to cut; give --ratio or --target"),
        ({"method": "minitron-depth"}, r"give --ratio or --target"),
        ({"method": "flap", "ratio": 0.2, "options": {"metric": "x"}}, r"option 'metric' does not exist for flap; it has gen"),
        (
            {"method": "minitron-width", "ratio": 0.2, "options": {"reducton": "l2"}},
            r"option 'reducton' does not exist for minitron-width \(did you mean 'reduction'\?\); it has reduction",
        ),
        (
            {"method": "minitron-width", "ratio": 0.2, "options": {"reduction": "l1"}},
            r"unknown value for reduction of minitron-width 'l1' \(did you mean 'l2'\?\): known are l2, mean-l2",
        ),
        (
            {"method": "flap", "ratio": 0.2, "compensate": "gain"},
            r"unknown value for compensate of flap 'gain'.*: known are bias, ",
        ),
        ({"method": "wanda", "ratio": 0.2, "compensate": "bias"}, r"compensate of wanda 'bias': known are none"),
        ({"method": "flap", "ratio": 0.2, "multiple_of": 0}, r"multiple_of: 0 is no multiple; it must be 1 or more"),
        ({"method": "minitron-width", "ratio": 0.2, "multiple_of": -8}, r"multiple_of: -8 is no multiple"),
        *(
            ({"method": m, "ratio": 0.2, "uniform": True}, rf"uniform: {m} always leaves uniform layers; drop the option")
            for m in ("magnitude", "wanda", "minitron-width", "minitron-depth")
        ),
        *(
            ({"method": m, "ratio": 0.2, "target": {"hidden_size": 8}}, rf"target: {m} does not take it; drop the option")
            for m in ("magnitude", "wanda", "llm-pruner")
        ),
        *(
            ({"method": m, "ratio": 0.2, "pattern": "2:4"}, rf"pattern: {m} does not take it; drop the option")
            for m in ("flap", "minitron-width", "minitron-depth")
        ),
        *(
            ({"method": m, "ratio": 0.2, "multiple_of": 8}, rf"multiple_of: {m} does not take it; drop the option")
            for m in ("magnitude", "wanda", "minitron-depth")
        ),
    ],
    ids=lambda v: " ".join(map(str, v.values())) if isinstance(v, dict) else "",
)  # fmt: skip
def test_requests_that_are_refused(request_, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_for(LLAMA, **request_)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.2, 1.5, 20, math.nan, math.inf])
def test_ratios_outside_zero_and_one(method, ratio):
    with pytest.raises(UserError, match=rf"ratio: {ratio} is not between 0 and 1 \(0.2 removes a fifth\)"):
        plan_for(LLAMA, method=method, ratio=ratio)


@pytest.mark.parametrize(
    ("method", "ratio", "message"),
    [
        # a row of down_proj has 24 inputs
        ("wanda", 0.04, r"ratio: 0.04 is less than one weight in a row of 24; ask for at least 0.0417"),
        ("magnitude", 0.01, r"less than one weight in a row of 24"),
        # one channel is 3 * 32 of 20,928 block parameters; the biases of three layers, 6 * 32, are more
        ("flap", 0.005, r"ratio: 0.005 is below one unit of this model; ask for more than 0.00"),
        ("minitron-depth", 0.1, r"ratio: 0.1 of 3 layers is less than one layer; ask for at least 0.3333"),
        ("minitron-depth", 0.9, r"ratio: 0.9 would remove all 3 layers; ask for at most 0.6667"),
        ("minitron-width", 0.999, r"ratio: 0.999 cannot be reached by stem and FFN in multiples of 1 \(stem: 8\)"),
    ],
)
def test_ratios_that_no_cut_of_this_model_reaches(method, ratio, message):
    with pytest.raises(UserError, match=message):
        plan_for(LLAMA, method=method, ratio=ratio)


def test_the_floor_that_flap_names_is_enough():
    """The sentence tells what to ask for; what it tells must work."""
    for request in ({}, {"compensate": "none"}, {"uniform": True}, {"multiple_of": 8}):
        with pytest.raises(UserError, match="below one unit") as caught:
            plan_for(LLAMA, method="flap", ratio=1e-4, **request)
        least = float(str(caught.value).rsplit(" ", 1)[1])
        assert plan_for(LLAMA, method="flap", ratio=least + 1e-4, **request).budget > 0


@pytest.mark.parametrize(
    ("method", "target", "message"),
    [
        (
            "minitron-width",
            {"hidden": 16},
            r"unknown size for minitron-width's target 'hidden' \(did you mean 'hidden_size'",
        ),
        (
            "minitron-width",
            {"num_hidden_layers": 2},
            r"unknown size .* 'num_hidden_layers'.*: known are hidden_size, interm",
        ),
        ("minitron-width", {"hidden_size": 0}, r"target: hidden_size=0 is outside 1 to 32 \(the source's size\)"),
        ("minitron-width", {"hidden_size": 33}, r"target: hidden_size=33 is outside 1 to 32"),
        ("minitron-width", {"intermediate_size": 25}, r"target: intermediate_size=25 is outside 1 to 24"),
        ("minitron-width", {"intermediate_size": -1}, r"target: intermediate_size=-1 is outside"),
        (
            "minitron-depth",
            {"hidden_size": 16},
            r"unknown size for minitron-depth's target 'hidden_size'.*num_hidden_layers",
        ),
        ("minitron-depth", {"num_hidden_layers": 3}, r"target: num_hidden_layers=3 is outside 1 to 2"),
        ("minitron-depth", {"num_hidden_layers": 0}, r"target: num_hidden_layers=0 is outside 1 to 2"),
    ],
)
def test_targets_that_are_refused(method, target, message):
    with pytest.raises(UserError, match=message):
        plan_for(LLAMA, method=method, target=target)


@pytest.mark.parametrize("method", ["minitron-width", "minitron-depth"])
def test_a_target_and_a_ratio_contradict_each_other(method):
    target = {"hidden_size": 16} if method == "minitron-width" else {"num_hidden_layers": 2}
    with pytest.raises(UserError, match=r"target: sizes and --ratio contradict each other; give one of them"):
        plan_for(LLAMA, method=method, target=target, ratio=0.2)


def test_a_target_that_is_the_source_cuts_nothing_and_is_said_so():
    """Asking for the sizes that are there already is a mistake, not a plan."""
    for target in ({"hidden_size": 32}, {"intermediate_size": 24}, {"hidden_size": 32, "intermediate_size": 24}):
        with pytest.raises(UserError, match=r"target: .*(source|nothing)"):
            plan_for(LLAMA, method="minitron-width", target=target)


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "4:4", "5:4", "0:4", "2:4:8", "a:b", "-1:4", " 2:4", "2:4\n", "1:2000"]
)
def test_patterns_that_are_none(text):
    with pytest.raises(UserError, match=r"pattern: '.*\s*' is no n:m; write for example 2:4 \(keep 2 of every 4\)"):
        parse_pattern(text)
    with pytest.raises(UserError, match="is no n:m"):
        plan_for(LLAMA, method="wanda", pattern=text)


def test_patterns():
    assert parse_pattern("2:4") == (2, 4) and parse_pattern("1:2") == (1, 2) and parse_pattern("15:16") == (15, 16)
    plan = plan_for(LLAMA, method="wanda", pattern="1:4")
    assert (plan.pattern, plan.sparsity) == ((1, 4), 0.75)
    assert plan_for(LLAMA, method="magnitude", pattern="2:4", ratio=0.5).sparsity == 0.5  # says the same twice


def test_patterns_that_contradict_the_ratio_or_do_not_fit():
    with pytest.raises(UserError, match=r"ratio: 0.6 contradicts pattern 2:4, which is 0.5; drop one"):
        plan_for(LLAMA, method="wanda", pattern="2:4", ratio=0.6)
    message = r"pattern: 2:5 does not fit 'model.layers.0.self_attn.q_proj.weight', whose 32 inputs are no multiple of 5"
    with pytest.raises(UserError, match=message):
        plan_for(LLAMA, method="wanda", pattern="2:5")
    with pytest.raises(UserError, match=r"'model.layers.0.mlp.down_proj.weight', whose 24 inputs are no multiple of 16"):
        plan_for(LLAMA, method="wanda", pattern="8:16")


@pytest.mark.parametrize("case", ["mistral", "qwen2", "qwen3", "gemma2", "olmo2", "phi3"])
def test_uniform_flap_needs_a_place_for_its_biases(case):
    message = rf"uniform: a stock {case} config has no place for flap's biases; add --compensate none, or drop --uniform"
    with pytest.raises(UserError, match=message):
        plan_for(pipeline.config(case), method="flap", ratio=0.3, uniform=True)
    assert plan_for(pipeline.config(case), method="flap", ratio=0.3, uniform=True, compensate="none").out_bias == frozenset()


@pytest.mark.parametrize("case", ["llama", "llama_tied", "smollm3", "seed_oss"])
def test_uniform_flap_where_a_stock_config_has_biases(case):
    plan = plan_for(pipeline.config(case), method="flap", ratio=0.3, uniform=True)
    assert plan.out_bias == {"attention", "mlp"}


@pytest.mark.parametrize("case", ["llama", "mistral"])
def test_flap_to_the_sizes_of_a_target(case):
    config = pipeline.config(case)
    more = {} if case == "llama" else {"compensate": "none"}
    plan = plan_for(config, method="flap", uniform=True, target={"num_key_value_heads": 1, "intermediate_size": 16}, **more)
    assert {(x.num_key_value_heads, x.intermediate_size) for x in plan.target.anatomy.shape.layers} == {(1, 16)}
    assert plan.target.is_stock and plan.step == 3 * plan.anatomy.unit_params("layers.0.intermediate")
    whole = plan_for(config, method="flap", uniform=True, target={"intermediate_size": 16}, **more)
    assert whole.target.anatomy.shape.layers[0].num_key_value_heads == config.num_key_value_heads


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"target": {"intermediate_size": 16}}, "target: it gives every layer of flap's the same sizes; add --uniform"),
        ({"target": {"hidden_size": 24}, "uniform": True}, "unknown size for flap's target 'hidden_size'"),
        ({"target": {"intermediate_size": 16}, "uniform": True, "ratio": 0.2}, "target: sizes and --ratio contradict"),
        ({"target": {"intermediate_size": 16}, "uniform": True, "multiple_of": 8}, "multiple_of: --target says the sizes"),
        ({"target": {"num_key_value_heads": 99}, "uniform": True}, "target: num_key_value_heads=99 is outside 1 to"),
        ({"target": {"num_key_value_heads": 4}, "uniform": True}, "target: these are the source's own sizes"),
        ({"target": {"intermediate_size": 16}, "uniform": True, "allocate": "candidates"}, "target: flap does not take it"),
    ],
)
def test_targets_that_flap_refuses(request_, message):
    with pytest.raises(UserError, match=message):
        plan_for(LLAMA, method="flap", **request_)


def test_uniform_flap_of_layers_that_differ_says_why_not():
    """If it is refused, then for the layers and not for biases that llama has a place for."""
    pruned = target_for(LLAMA, Anatomy.of(LLAMA), Keep({"layers.1.intermediate": (0, 1, 2)})).config
    for compensate in ("bias", "none"):
        try:
            plan_for(pruned, method="flap", ratio=0.3, uniform=True, compensate=compensate)
        except UserError as error:
            assert "no place for flap's biases" not in str(error), compensate  # noqa: PT017


@pytest.mark.parametrize("gone", ["attention", "mlp"])
def test_flap_of_a_model_whose_first_layer_lacks_a_sub_layer(gone):
    pruned = target_for(LLAMA, Anatomy.of(LLAMA), Keep({f"layers.0.{gone}": ()})).config
    plan = plan_for(pruned, method="flap", ratio=0.2)
    assert plan.budget == math.floor(0.8 * Anatomy.of(pruned).block_params)


def test_width_of_a_model_without_a_sub_layer_is_refused():
    pruned = target_for(LLAMA, Anatomy.of(LLAMA), Keep({"layers.0.mlp": ()})).config
    with pytest.raises(UserError, match="minitron-width: a model with removed sub-layers has no single FFN width"):
        plan_for(pruned, method="minitron-width", ratio=0.2)


# -- sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.25, 1 / 3, 0.4, 0.5, 0.6, 0.75])
@pytest.mark.parametrize("multiple_of", [1, 2, 8])
@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "gemma2", "olmo2"])
def test_proportional_width_meets_its_target_within_a_step(case, multiple_of, ratio):
    anatomy = Anatomy.of(pipeline.config(case, hidden_size=64, intermediate_size=176))
    hidden, width = proportional_width(anatomy, ratio, multiple_of)
    after = Keep({"hidden": tuple(range(hidden))} | {f"layers.{i}.intermediate": tuple(range(width)) for i in range(3)})
    params = after.anatomy_after(anatomy).block_params
    target = (1 - ratio) * anatomy.block_params
    assert target - 3 * hidden * multiple_of * 3 < params <= target  # three layers, three matrices
    assert hidden % multiple_of == 0 and width % multiple_of == 0
    assert 0 < hidden <= 64 and 0 < width <= 176
    if case in ("llama", "gemma2"):
        assert hidden % 8 == 0  # a stock config refuses another stem with 8 heads


def test_proportional_width_shrinks_both_by_nearly_the_same_factor():
    anatomy = Anatomy.of(pipeline.config("mistral", hidden_size=64, intermediate_size=176))
    for ratio in (0.2, 0.4, 0.6):
        hidden, width = proportional_width(anatomy, ratio, 1)
        assert hidden / 64 == pytest.approx(width / 176, rel=0.05)
        # and no other lawful pair that uses the budget is nearer
        skew = abs(math.log(hidden / 64 / (width / 176)))
        budget = (1 - ratio) * anatomy.block_params
        for other in range(1, 65):
            rest = 3 * (layer_params(other, channels=0))
            fits = min(math.floor((budget - rest) / (9 * other)), 175)
            if fits >= 1:
                assert skew <= abs(math.log(other / 64 / (fits / 176))) + 1e-12


@pytest.mark.parametrize(("ratio", "run"), [(0.2, 1), (1 / 3, 1), (0.5, 2), (0.6, 2)])
def test_depth_counts_layers(ratio, run):
    plan = plan_for(LLAMA, method="minitron-depth", ratio=ratio)
    assert plan.run == run
    assert plan.target_block_params == (3 - run) * layer_params()
    assert plan.target.config.num_hidden_layers == 3 - run


def test_depth_to_a_target():
    for kept in (1, 2):
        assert plan_for(LLAMA, method="minitron-depth", target={"num_hidden_layers": kept}).run == 3 - kept


def test_flap_s_budget_and_step():
    plan = plan_for(LLAMA, method="flap", ratio=0.3)
    assert plan.budget == math.floor(0.7 * 3 * layer_params()) == plan.target_block_params
    assert plan.step == 3 * 32
    assert plan_for(LLAMA, method="flap", ratio=0.3, multiple_of=8).step == 8 * 3 * 32
    assert plan_for(LLAMA, method="flap", ratio=0.3, uniform=True).step == 3 * (
        3 * 32 + 2
    )  # with the two biases of a channel


def test_widths_of_a_target():
    plan = plan_for(LLAMA, method="minitron-width", target={"hidden_size": 16, "intermediate_size": 20})
    assert plan.counts == {"hidden": 16, **{f"layers.{i}.intermediate": 20 for i in range(3)}}
    assert plan.target_block_params == 3 * layer_params(hidden=16, channels=20)
    assert plan_for(LLAMA, method="minitron-width", target={"hidden_size": 16}).counts["layers.1.intermediate"] == 24


def test_defaults_are_the_first_of_each_choice():
    plan = plan_for(LLAMA, method="minitron-width", ratio=0.3)
    assert (plan.compensator, dict(plan.options), plan.multiple_of) == ("none", {"reduction": "mean-l2"}, 1)
    assert plan_for(LLAMA, method="flap", ratio=0.3).compensator == "bias"


@pytest.mark.parametrize("method", FIVE)
def test_a_plan_says_before_and_after(method):
    """Written out for a model: parameters before and after, from the formula."""
    report = plan_for(LLAMA, method=method, ratio=0.4).describe(16, 4)
    outer = 2 * pipeline.VOCAB * 32 + 32
    assert report["before"]["params"] == 3 * layer_params() + outer
    assert report["before"]["weight_bytes"] == 4 * report["before"]["params"]
    assert report["request"] == {"method": method, "ratio": 0.4}
    after = report["after"]
    if METHODS[method].is_sparse:
        assert after["params"] == report["before"]["params"] and report["sparsity"] == 0.4
        assert report["flops_if_zeros_were_free"]["matrices"] < report["before"]["flops"]
    elif method == "flap":
        assert after["at_most"] is True
        assert after["params"] == after["block_params"] + outer == math.floor(0.6 * 3 * layer_params()) + outer
        assert any("pruned_llama" in note for note in report["notes"])
    else:
        assert after["shape"]["num_hidden_layers"] == (2 if method == "minitron-depth" else 3)
        assert after["block_params"] <= 0.7 * report["before"]["block_params"]


def test_a_request_describes_what_was_said():
    assert Request("flap", 0.2).describe() == {"method": "flap", "ratio": 0.2}
    full = Request("flap", None, "2:4", {"hidden_size": 8}, True, 8, "none", {"a": "b"}).describe()
    assert full == {
        "method": "flap",
        "pattern": "2:4",
        "target": {"hidden_size": 8},
        "uniform": True,
        "multiple_of": 8,
        "compensate": "none",
        "options": {"a": "b"},
    }


@pytest.mark.parametrize("case", sorted(tiny.CASES))
def test_every_family_can_be_planned_from_its_config_alone(case, monkeypatch):
    """No model is built and no weight is read: neither can be."""
    from transformers import PreTrainedModel

    def refuse(*_, **__):
        raise AssertionError("a plan must not touch weights")

    monkeypatch.setattr(PreTrainedModel, "__init__", refuse)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    config = pipeline.config(case)
    refused = getattr(Anatomy.of(config), "refused", {})  # axes that no config of the family can say a cut of
    for method in FIVE:
        if method == "minitron-width" and "hidden" in refused:
            with pytest.raises(UserError, match="minitron-width: it cuts hidden, but "):
                plan_for(config, method=method, ratio=0.2)
            continue
        plan = plan_for(config, method=method, ratio=0.2)
        decided = (plan.budget is not None, bool(plan.counts), plan.run is not None, plan.sparsity is not None)
        assert sum(decided) == 1
        report = plan.describe(16, 2)
        assert report["after"]["params"] <= report["before"]["params"]


def test_methods_answer_for_themselves():
    assert method_named("flap") is METHODS["flap"]
    for name, row in METHODS.items():
        assert row.name == name and row.citation and row.compensators and row.summary
        assert row.needs_text == (row.sweeps > 0) and row.is_sparse == (row.axes == ("weights",))
        assert row.patterns == row.is_sparse  # a pattern is for single weights
    assert not METHODS["magnitude"].needs_text and METHODS["wanda"].needs_text
    assert {a for row in METHODS.values() for a in row.axes} <= {"weights", *AXES}
    assert all(len(set(values)) == len(values) for row in METHODS.values() for values in row.options.values())


@pytest.mark.parametrize(("compensate", "needs"), [(None, False), ("least-squares", True)])
def test_what_refits_needs_text_even_if_its_scores_do_not(compensate, needs):
    plan = plan_for(LLAMA, method="magnitude-sp", ratio=0.3, compensate=compensate)
    assert plan.needs_text is needs
