"""Taylor scores of units against plain autograd over the whole model, and llm-pruner, which cuts by them."""

from __future__ import annotations

import copy
from itertools import combinations

import pipeline
import pytest
import tiny
import torch
from pipeline import plan_for

from prunus import api, taylor
from prunus.anatomy import Anatomy
from prunus.axes import Axis, Span, kind_of
from prunus.criteria import AGGREGATES, TAYLOR_RULES
from prunus.cut import zero_
from prunus.errors import UserError
from prunus.job import Job
from prunus.oneshot import one_shot_
from prunus.statistics import Sweep
from prunus.taylor import UnitSums, _unread, unit_taylor

WINDOWS = pipeline.windows(5)
# the families' norms compute in float32 whatever the model's dtype, so gradients agree to some 1e-7 of their size
TIGHT = 1e-5
CHANNELS_ALONE = ("llama_mqa", "phi_qk", "gpt_neox", "gpt_neox_sequential")  # one KV group, or none that can go


def options(**given):
    return {"protect": "0,0"} | given


def job_for(model, ratio=0.3, batch_size=2, **given):
    plan = plan_for(model, method="llm-pruner", ratio=ratio, options=options(**given))
    return Job(plan, model, dict(model.named_parameters()), WINDOWS, batch_size)


def prune(model, ratio=0.3, windows=WINDOWS, **request):
    consumed = copy.deepcopy(model)
    request = {"options": options()} | request
    plan = plan_for(consumed, method="llm-pruner", ratio=ratio, **request)
    return one_shot_(plan, consumed, windows, batch_size=2)


# -- the formula ----------------------------------------------------------------------------------------------------------


def window_gradients(model, ids):
    """Name -> gradients of every window's mean loss [N, ...], float64, by autograd over the whole model."""
    model = copy.deepcopy(model)
    found = {name: [] for name, _ in model.named_parameters()}
    for ids_T in ids:
        model.zero_grad()
        logits = model(input_ids=ids_T[None], use_cache=False).logits[0].double()
        torch.nn.functional.cross_entropy(logits[:-1], ids_T[1:]).backward()
        for name, p in model.named_parameters():
            found[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return {name: torch.stack(grads).double() for name, grads in found.items()}


def naive(model, gradients, score, aggregate):
    """Axis name -> scores, unit by unit and matrix by matrix: section 2.11 as it is written there."""
    out, weights = {}, pipeline.state(model)
    for name, axis in Anatomy.of(model.config).axes.items():
        if kind_of(name) not in ("kv_heads", "intermediate"):
            continue
        out[name] = []
        for unit in range(axis.size):
            by_matrix = []
            for span in axis.spans:
                w, g = weights[span.param].double(), gradients[span.param]
                if w.dim() != 2:
                    continue
                joint, fisher = g.mean(0), g.square().mean(0)
                rows = torch.tensor(tiny.spans_rows(span, [unit]))
                element = {
                    "first": (w * joint).abs(),
                    "second": (w**2 * fisher).abs(),
                    "mix": (w * joint - 0.5 * w**2 * fisher).abs(),
                    "vector": w * joint,
                }[score].index_select(span.dim, rows)
                by_matrix.append(abs(float(element.sum())))
            total = {"sum": sum, "max": max, "first": lambda found: found[0]}
            product = torch.tensor(by_matrix, dtype=torch.float64).prod()
            out[name].append(float(product) if aggregate == "prod" else total[aggregate](by_matrix))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in out.items()}


def same_scores(found, expected, rel=TIGHT):
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values, rtol=rel, atol=rel * float(values.max()), msg=name)


@pytest.mark.parametrize("case", sorted(tiny.CASES))
def test_every_family_s_scores_are_their_formula(case):
    """GQA with 1, 2 and 4 query heads a group, MQA, fused projections, biases, tied and untied heads are all among them."""
    model = pipeline.model(case)
    found = unit_taylor(job_for(model, 0.1)).values
    same_scores(found, naive(model, window_gradients(model, WINDOWS.ids_NT), "first", "sum"))


@pytest.mark.parametrize("case", ["llama_gqa4", "phi3"])
def test_every_score_and_aggregate_is_its_formula(case):
    model = pipeline.model(case)
    gradients = window_gradients(model, WINDOWS.ids_NT)
    for score in TAYLOR_RULES:
        for aggregate in AGGREGATES:
            found = unit_taylor(job_for(model, score=score, aggregate=aggregate)).values
            # a total over a channel cancels, and four factors multiply their errors
            same_scores(found, naive(model, gradients, score, aggregate), 10 * TIGHT)


def test_the_scores_differ():
    """What the reference could not tell apart would prove nothing."""
    model = pipeline.model("llama")
    gradients = window_gradients(model, WINDOWS.ids_NT)
    asked = [(score, "sum") for score in TAYLOR_RULES] + [
        ("first", aggregate) for aggregate in AGGREGATES if aggregate != "sum"
    ]
    kinds = [naive(model, gradients, *ask)["layers.0.intermediate"] for ask in asked]
    kinds = [values / values.sum() for values in kinds]
    assert all(float(((a - b) / b).abs().max()) > 50 * TIGHT for a, b in combinations(kinds, 2))


@pytest.mark.parametrize("score", list(TAYLOR_RULES))
def test_the_batch_size_does_not_matter(score):
    model = pipeline.model("qwen3")
    one, two, five = (unit_taylor(job_for(model, batch_size=b, score=score)).values for b in (1, 2, 5))
    same_scores(two, {name: v.double() for name, v in one.items()})
    same_scores(five, {name: v.double() for name, v in one.items()})


# -- by hand --------------------------------------------------------------------------------------------------------------

W = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
G = torch.tensor([[0.5, -1.0], [-1.0, 0.2]])


def by_hand(score, aggregate="sum", gradients=((G, 1.0),), weights=(W,)):
    """Scores of the two columns of one matrix, or of several."""
    tensors = {f"w{i}": weight for i, weight in enumerate(weights)}
    axis = Axis("layers.0.intermediate", 2, tuple(Span(name, 1) for name in tensors))
    sums = UnitSums([axis], tensors, TAYLOR_RULES[score])
    for gradient, share in gradients:
        for name in tensors:
            sums.take(name, gradient, share)
    return sums.scores(aggregate).values[axis.name].tolist()


@pytest.mark.parametrize(
    ("score", "expected"), [("first", [2.0, 1.6]), ("vector", [0.0, 0.4]), ("second", [2.0, 1.36]), ("mix", [2.0, 1.92])]
)
def test_the_example_of_section_2_11(score, expected):
    assert by_hand(score) == pytest.approx(expected, rel=1e-6, abs=1e-6)  # float32


def test_squares_are_each_window_s():
    """B15: gradients 1 and 3 have a mean square of 5; the last alone has 9, their mean 4."""
    one = torch.ones(2, 2)
    assert by_hand("second", gradients=((one, 0.5), (3 * one, 0.5)), weights=(one,)) == [10.0, 10.0]
    assert by_hand("mix", gradients=((one, 0.5), (3 * one, 0.5)), weights=(one,)) == [1.0, 1.0]  # 2 |2 - 5 / 2|
    assert by_hand("first", gradients=((one, 0.5), (-one, 0.5)), weights=(one,)) == [0.0, 0.0]  # summed before abs


def test_aggregates_by_hand():
    """Two matrices: columns score [2, 1.6] and [4, 3.2]."""
    for aggregate, expected in {"sum": [6.0, 4.8], "prod": [8.0, 5.12], "max": [4.0, 3.2], "first": [2.0, 1.6]}.items():
        assert by_hand("first", aggregate, weights=(W, 2 * W)) == pytest.approx(expected, rel=1e-6)


def test_products_of_small_scores_do_not_become_zero():
    tiny_ = torch.full((2, 2), 1e-7)  # squares of 1e-7 * 1e-7 underflow in float32 once two matrices multiply
    assert min(by_hand("second", "prod", ((1e-3 * torch.ones(2, 2), 1.0),), (tiny_, tiny_))) > 0


# -- dead and duplicate units -----------------------------------------------------------------------------------------------


@torch.no_grad()
def kill_(model, axis, units):
    """Every row of units becomes zero: they do nothing."""
    tensors = dict(model.named_parameters())
    for span in Anatomy.of(model.config).axes[axis].spans:
        tensors[span.param].index_fill_(span.dim, torch.tensor(tiny.spans_rows(span, units)), 0)


@pytest.mark.parametrize("score", list(TAYLOR_RULES))
@pytest.mark.parametrize("case", ["llama_mha", "llama", "llama_gqa4", "qwen2", "phi3"])
def test_a_dead_unit_scores_exactly_zero_and_goes(case, score):
    model = pipeline.model(case)
    groups = Anatomy.of(model.config).axes["layers.1.kv_heads"].size
    kill_(model, "layers.1.kv_heads", [groups - 2])
    kill_(model, "layers.1.intermediate", [5, 17])
    outcome = prune(model, 0.4, options=options(score=score))
    channels = outcome.scores.values["layers.1.intermediate"]
    assert (channels == 0).nonzero().flatten().tolist() == [5, 17]
    assert (outcome.scores.values["layers.1.kv_heads"] == 0).nonzero().flatten().tolist() == [groups - 2]
    assert not {5, 17} & set(outcome.keep.units["layers.1.intermediate"])
    assert groups - 2 not in outcome.keep.units["layers.1.kv_heads"]


@torch.no_grad()
def test_of_duplicates_the_first_stays():
    model = pipeline.model("llama")
    mlp = model.model.layers[0].mlp
    for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
        matrix[1:] = matrix[0]
    mlp.down_proj.weight[:, 1:] = mlp.down_proj.weight[:, :1]
    outcome = prune(model)
    values = outcome.scores.values["layers.0.intermediate"]
    # the same sums, but a matmul may add them in another order in each column
    torch.testing.assert_close(values, values[:1].expand(24), rtol=1e-9, atol=0)
    assert by_hand("first", weights=(torch.ones(2, 2),), gradients=((torch.ones(2, 2), 1.0),)) == [2.0, 2.0]


# -- the cut ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(tiny.CASES))
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_every_family_comes_out_as_planned(case, multiple_of):
    """The best units stay, the target is met within a step, and the small model is the zeroed one."""
    model = pipeline.model(case)
    anatomy = Anatomy.of(model.config)
    ratio = 0.15 if case in CHANNELS_ALONE else 0.35
    outcome = prune(model, ratio, multiple_of=multiple_of)
    after, plan = outcome.target.anatomy, outcome.plan
    budget = (1 - ratio) * anatomy.block_params
    assert budget - plan.step < after.block_params <= budget
    assert after.shape.is_uniform and after.block_params == plan.target_block_params
    for name, kept in outcome.keep.units.items():
        values = outcome.scores.values[name].tolist()
        gone = pipeline.lowest([(v, -i) for i, v in enumerate(values)], len(values) - len(kept))
        assert sorted({*range(len(values))} - set(gone)) == list(kept)
    zero_(dict(model.named_parameters()), anatomy, outcome.keep)
    if case == "olmo2":  # its norms run over all heads, so the sliced gains are folded: exact but for their epsilon
        tolerance = 1e-4
    else:
        tolerance = 1e-9
    outcome.model.set_attn_implementation("eager")
    dense = tiny.logits_of(model, WINDOWS.ids_NT)
    torch.testing.assert_close(tiny.logits_of(outcome.model, WINDOWS.ids_NT), dense, rtol=tolerance, atol=tolerance)


def test_protected_layers_stay_whole_and_the_others_bear_it_all():
    model = pipeline.model("llama", num_hidden_layers=9)
    outcome = prune(model, 0.15, options={})
    shapes = outcome.target.anatomy.shape.layers
    whole = Anatomy.of(model.config).shape.layers[0]
    assert all(shapes[i] == whole for i in (0, 1, 2, 3, 7, 8))
    assert len(set(shapes[4:7])) == 1 and shapes[4].intermediate_size < 0.8 * whole.intermediate_size
    budget = 0.85 * outcome.plan.anatomy.block_params
    assert budget - outcome.plan.step < outcome.target.anatomy.block_params <= budget
    assert set(outcome.scores.values) == {f"layers.{i}.{kind}" for i in (4, 5, 6) for kind in ("kv_heads", "intermediate")}
    assert outcome.model.config.model_type == "pruned_llama"
    assert "with --option protect=0,0 all layers come out alike" in outcome.plan.notes
    # 0.15 * 9 / 3 of a free layer goes: 0.55 of four groups is two
    assert {layer.num_key_value_heads for layer in shapes[4:7]} == {2}


@pytest.mark.parametrize("protect", ["4,2", "0,0"])
@pytest.mark.parametrize("score", ["first", "mix"])
def test_the_plan_knows_what_scoring_takes(protect, score, monkeypatch):
    """Forward through all blocks; back only to the first free one, with weights' gradients only in the free ones."""
    model = pipeline.model("llama", num_hidden_layers=9)
    plan = plan_for(model, method="llm-pruner", ratio=0.1, options={"protect": protect, "score": score})
    passes, forward, through = [], Sweep.forward, taylor._through

    def counted(sweep, layer, hidden, gradient, wanted, outputs):
        gradient, found = through(sweep, layer, hidden, gradient, wanted, outputs)
        passes.append(len(hidden) * (3 if found else 2))
        assert set(found) <= plan.graded_tensors
        return gradient, found

    monkeypatch.setattr(Sweep, "forward", lambda s, n, h, p=None: passes.append(len(h)) or forward(s, n, h, p))
    monkeypatch.setattr(taylor, "_through", counted)
    one_shot_(plan, model, WINDOWS, batch_size=2)
    head = 2 * 16 * plan.anatomy.shape.vocab_size * plan.anatomy.shape.hidden_size
    block = (plan.anatomy.flops(16) - head) / 9
    real = sum(passes) * block + 5 * 2 * head
    assert plan.scoring_flops(5, 16) == pytest.approx(real, rel=1e-9)


def test_the_plan_knows_what_gradients_take():
    """Sums as large as the matrices only where the absolute value is a weight's; none for methods without gradients."""
    config = pipeline.config("llama", num_hidden_layers=9)

    def extra(**given):
        return plan_for(config, method="llm-pruner", ratio=0.1, options=given).gradient_bytes(4, 16)

    matrices = 3 * 4 * (2 * 32 * 32 + 2 * 32 * 64 + 3 * 32 * 24)  # of three free layers, in float32
    assert extra(score="first") - extra(score="vector") == matrices
    assert extra(score="mix") - extra(score="second") == matrices
    assert extra(score="first", protect="0,0") - extra(score="first") == 2 * matrices
    assert plan_for(config, method="wanda-sp", ratio=0.1).gradient_bytes(4, 16) == 0
    layers = plan_for(config, method="shortened-llama", ratio=0.2)
    assert layers.gradient_bytes(4, 16) > 4 * layers.anatomy.block_params
    deleted = plan_for(config, method="shortened-llama", ratio=0.2, options={"score": "perplexity"})
    assert deleted.gradient_bytes(4, 16) == 0


@torch.no_grad()
def test_least_squares_refits_what_reads_the_survivors():
    """On layer 0 the inputs are the dense ones, so the refit minimises exactly the error that is compared here."""
    dense = pipeline.model("llama")
    name = "model.layers.0.mlp.down_proj"
    wanted = pipeline.inputs_of(dense, WINDOWS.ids_NT, [name])[name] @ dense.get_submodule(name).weight.T
    errors, kept = [], []
    for compensate in ("none", "least-squares"):
        outcome = prune(dense, 0.4, compensate=compensate)
        kept.append(outcome.keep)
        x = pipeline.inputs_of(outcome.model, WINDOWS.ids_NT, [name])[name]
        if compensate == "none":
            x_plain, columns = x, list(outcome.keep.units["layers.0.intermediate"])
            assert torch.equal(outcome.model.get_submodule(name).weight, dense.get_submodule(name).weight[:, columns])
        errors.append(float((x @ outcome.model.get_submodule(name).weight.T - wanted).square().sum()))
    assert kept[0] == kept[1] and errors[1] < errors[0] and x_plain.shape == x.shape


# -- precision ------------------------------------------------------------------------------------------------------------


def test_what_nobody_reads_has_its_gradients_all_the_same():
    """Of the last matrix of a block, in float64 against autograd; where a norm stands behind it, its value is read."""
    x, weight = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    bias, back = torch.randn(4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    linear = torch.nn.Linear(3, 4, dtype=torch.float64)
    linear.weight.data, linear.bias.data = weight, bias
    leaves = [x.requires_grad_(), linear.weight, linear.bias]
    out = _unread(linear, x)
    assert torch.equal(out, bias.expand(2, 5, 4))
    for got, expected in zip(
        torch.autograd.grad(out, leaves, back), torch.autograd.grad(linear(x), leaves, back), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_way_back_leaves_no_gradients_and_no_flags():
    model = pipeline.model("llama_tied")
    for p in model.parameters():
        p.requires_grad_(False)
    unit_taylor(job_for(model))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype):
    exact = pipeline.model("llama", dtype=torch.float32)
    rounded = copy.deepcopy(exact).to(dtype)
    for score in ("first", "second"):
        a, b = (unit_taylor(job_for(m, score=score)).values for m in (exact, rounded))
        for name in a:
            # a weight's gradient of bfloat16 is off by a per cent or so; a unit's sum of its absolute values by less
            torch.testing.assert_close(b[name], a[name], rtol=0.1, atol=0.05 * float(a[name].max()))


@torch.no_grad()
def test_small_gradients_do_not_vanish_in_float16(monkeypatch):
    """The final gain makes every gradient some 1e-7, where float16 has steps of 6e-8; the scaled loss lifts them."""
    exact = pipeline.model("llama", dtype=torch.float32)
    exact.model.norm.weight.fill_(2.0**-17)
    rounded = copy.deepcopy(exact).to(torch.float16)
    wanted = unit_taylor(job_for(exact)).values["layers.0.intermediate"]
    found = unit_taylor(job_for(rounded)).values["layers.0.intermediate"]
    monkeypatch.setattr(taylor, "_LOSS_SCALE", 1.0)
    unscaled = unit_taylor(job_for(rounded)).values["layers.0.intermediate"]
    errors = [float((v - wanted).abs().max() / wanted.max()) for v in (found, unscaled)]
    assert errors[0] < 0.05 < errors[1]


# -- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "request_", "message"),
    [
        (3, {"ratio": 0.2}, r"protect: llm-pruner keeps the first 4 and the last 2 of 3 layers, so none can be cut; give --op"),
        (3, {}, r"ratio: llm-pruner needs to know how much to cut; give --ratio$"),
        (9, {"ratio": 0.32}, r"block parameters leave no room for one FFN channel in each of 3 layers; ask for a smaller ratio"),
        (9, {"ratio": 0.001}, r"ratio: 0.001 is below one unit of this model; ask for at least 0.0038"),
        (9, {"ratio": 0.1, "uniform": True}, r"uniform: protected layers stay whole \(--option protect=0,0 makes all alike\);"),
        (9, {"ratio": 0.1, "target": {"hidden_size": 8}}, r"target: llm-pruner does not take it; drop the option"),
        (9, {"ratio": 0.1, "options": {"score": "third"}}, r"unknown value for score of llm-pruner 'third'"),
        (9, {"ratio": 0.1, "options": {"protect": "4-2"}}, r"unknown value for protect of llm-pruner '4-2'"),
        (9, {"ratio": 0.1, "options": {"agregate": "sum"}}, r"option 'agregate' does not exist .* \(did you mean 'aggregate'\?\)"),
        (9, {"ratio": 0.1, "compensate": "bias"}, r"unknown value for compensate of llm-pruner 'bias'"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(layers, request_, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_for(pipeline.config("llama", num_hidden_layers=layers), method="llm-pruner", **request_)
    assert "\n" not in str(caught.value)


def test_scores_that_are_no_numbers_are_refused():
    model = pipeline.model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(
        UserError, match=r"scores: 'layers.0.kv_heads' has units whose score is no number; try another --dtype"
    ):
        prune(model)


def test_text_is_needed():
    ask = {"ratio": 0.3, "options": options()}
    with pytest.raises(UserError, match="calibration: llm-pruner needs text"):
        api.prune(str(pipeline.folder()), method="llm-pruner", **ask)


def test_saved_and_loaded_in_a_clean_process(tmp_path):
    """Stock, since the layers stay alike."""
    code, _, err = pipeline.cli(
        "prune", pipeline.folder("mistral"), "-m", "llm-pruner", "-r", 0.3, "--option", "protect=0,0", "-c",
        pipeline.text_file(), "--windows", 4, "--seq-len", 16, "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert pipeline.cli("verify", tmp_path / "out")[0] == 0
