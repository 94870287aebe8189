"""Methods that cut heads and channels block by block, and SparseGPT and OWL through the whole pipeline."""

from __future__ import annotations

import copy

import numpy as np
import pipeline
import pytest
import tiny
import torch
from pipeline import plan_for
from test_solve import naive_admm, naive_sparsegpt

from prunus.anatomy import Anatomy
from prunus.criteria import UNIT_CRITERIA
from prunus.cut import zero_
from prunus.eliminate import stay_after_swaps, stay_one_by_one
from prunus.errors import UserError
from prunus.keep import Keep
from prunus.oneshot import one_shot_
from prunus.statistics import Moments

IDS = pipeline.windows()


def cut(case, **request):
    dense = pipeline.model(case)
    plan = pipeline.plan_for(dense, **request)
    return one_shot_(plan, copy.deepcopy(dense), IDS, batch_size=2), dense


def naive_wanda_sp(dense, counts):
    """Whole-model forward passes with hooks, one layer after the other, zeroing as it goes; float64."""
    model, config = copy.deepcopy(dense), dense.config
    head, per_group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    kept = {}
    for i, layer in enumerate(model.model.layers):
        names = {"kv_heads": f"model.layers.{i}.self_attn.o_proj", "intermediate": f"model.layers.{i}.mlp.down_proj"}
        inputs = pipeline.inputs_of(model, IDS.ids_NT, names.values())
        for kind, name in names.items():
            weight = model.get_submodule(name).weight.detach()
            x = inputs[name].reshape(-1, weight.shape[1])
            channel = weight.abs().mean(0) * x.square().sum(0).sqrt()
            width = per_group * head if kind == "kv_heads" else 1
            score = channel.view(-1, width).sum(1)
            key = f"layers.{i}.{kind}"
            kept[key] = tuple(sorted(score.argsort(descending=True)[: counts[key]].tolist()))
            gone = [u for u in range(len(score)) if u not in kept[key]]
            with torch.no_grad():
                for u in gone:
                    weight[:, u * width : (u + 1) * width] = 0
        assert layer is model.model.layers[i]
    return kept


@pytest.mark.parametrize("case", ["llama", "llama_tied", "llama_mha", "llama_gqa4", "llama_mqa", "mistral", "qwen3"])
def test_wanda_sp_is_the_formula_on_pruned_inputs(case):
    outcome, dense = cut(case, method="wanda-sp", ratio=0.15 if case == "llama_mqa" else 0.4)
    expected = naive_wanda_sp(dense, outcome.plan.counts)
    for name, units in outcome.keep.units.items():
        assert units == expected[name], name
    assert outcome.target.is_stock == (outcome.model.config.model_type in ("llama", "mistral", "qwen3", "seed_oss"))


@pytest.mark.parametrize("method", ["wanda-sp", "magnitude-sp", "ziplm", "osscar"])
@pytest.mark.parametrize("ratio", [0.2, 0.45, 0.7])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_uniform_methods_meet_the_target(method, ratio, multiple_of):
    outcome, dense = cut("mistral", method=method, ratio=ratio, multiple_of=multiple_of)
    before = sum(p.numel() for n, p in dense.named_parameters() if ".layers." in n)
    after = sum(p.numel() for n, p in outcome.model.named_parameters() if ".layers." in n)
    budget = (1 - ratio) * before
    assert budget - outcome.plan.step - 1 < after <= budget
    assert len(set(outcome.target.anatomy.shape.layers)) == 1
    assert outcome.model.config.intermediate_size % multiple_of == 0


@pytest.mark.parametrize("order", ["dense", "sequential"])
def test_flap_cuts_to_a_target_by_the_scores_that_it_ranks_by(order):
    outcome, _ = cut(
        "llama", method="flap", uniform=True, target={"num_key_value_heads": 1, "intermediate_size": 16}, order=order
    )
    assert outcome.target.anatomy == outcome.plan.target.anatomy
    assert outcome.model.config.intermediate_size == 16 and outcome.model.config.num_key_value_heads == 1
    for name, units in outcome.keep.units.items():
        best = outcome.scores.values[name].argsort(descending=True)[: len(units)]
        assert sorted(best.tolist()) == list(units)
    assert outcome.model.model.layers[0].mlp.down_proj.bias.abs().max() > 0


@pytest.mark.parametrize("case", ["llama", "llama_tied", "llama_mha", "llama_gqa4", "llama_mqa", "llama_bias"])
def test_magnitude_sp_is_the_norm_of_all_that_a_unit_owns(case):
    outcome, dense = cut(case, method="magnitude-sp", ratio=0.15 if case == "llama_mqa" else 0.3)
    weights, config = pipeline.state(dense), dense.config
    per_group = config.num_attention_heads // config.num_key_value_heads

    def squares(name, dim, rows):
        return sum(float(w) ** 2 for n, w in weights.items() if n.startswith(name) for w in take(w, dim, rows))

    def take(tensor, dim, rows):
        return (tensor if tensor.dim() == 1 else tensor.transpose(0, dim))[rows].flatten().tolist()

    for layer in range(tiny.LAYERS):
        block, d = f"model.layers.{layer}.", config.head_dim
        channels = [
            squares(f"{block}mlp.gate_proj", 0, [c])
            + squares(f"{block}mlp.up_proj", 0, [c])
            + squares(f"{block}mlp.down_proj.w", 1, [c])
            for c in range(config.intermediate_size)
        ]
        groups = []
        for g in range(config.num_key_value_heads):
            own = list(range(g * d, (g + 1) * d))
            queries = list(range(g * per_group * d, (g + 1) * per_group * d))
            of_keys = squares(f"{block}self_attn.k_proj", 0, own) + squares(f"{block}self_attn.v_proj", 0, own)
            of_queries = squares(f"{block}self_attn.q_proj", 0, queries) + squares(f"{block}self_attn.o_proj.w", 1, queries)
            groups.append(of_keys + of_queries)
        for kind, values in {"intermediate": channels, "kv_heads": groups}.items():
            name = f"layers.{layer}.{kind}"
            if len(values) == 1:
                continue
            expected = [v**0.5 for v in values]
            assert outcome.scores.values[name].tolist() == pytest.approx(expected, rel=1e-6)  # float32
            gone = pipeline.lowest([(v, -i) for i, v in enumerate(expected)], len(expected) - outcome.plan.counts[name])
            assert set(outcome.keep.units.get(name, range(len(expected)))) == {*range(len(expected))} - set(gone)


def by_hand(criterion, weights, x):
    """Scores of two FFN channels in a model of one layer: `weights` of gate, up and down, and what comes to down."""
    anatomy = Anatomy.of(tiny.tiny_config("llama", intermediate_size=2, num_hidden_layers=1))
    tensors = {name: torch.zeros(t.shape) for name, t in anatomy.tensors.items()}
    for name, rows in weights.items():
        tensor = tensors[f"model.layers.0.mlp.{name}_proj.weight"]
        tensor[tuple(slice(n) for n in torch.tensor(rows).shape)] = torch.tensor(rows)
    seen = {}
    for name, values in {"mlp.intermediate": x, "attention.q": [[0.0] * 64]}.items():
        seen[f"layers.0.{name}"] = Moments(frozenset({"sumsq"}))
        seen[f"layers.0.{name}"].update(torch.tensor([values]))
    return UNIT_CRITERIA[criterion].score_layer(anatomy, tensors, seen, 0).values["layers.0.intermediate"].tolist()


def test_wanda_sp_by_hand():
    """Norms of x: 5 and 2. Columns of down: means of |W| over the 32 outputs 3 / 32 and 8 / 32. The larger input loses."""
    scores = by_hand("wanda-units", {"down": [[1.0, -4.0], [-2.0, 4.0]]}, [[3.0, 0.0], [-4.0, 2.0]])
    assert scores == pytest.approx([15 / 32, 16 / 32], rel=1e-6)


def test_magnitude_sp_by_hand():
    """Channel 0 owns 1, 2 and 2, channel 1 owns 2, 3 and 6: norms 3 and 7, whatever their inputs are."""
    rows = {"gate": [[1.0], [2.0]], "up": [[-2.0], [3.0]], "down": [[2.0, -6.0]]}
    assert by_hand("magnitude-units", rows, [[9.0, 0.0]]) == pytest.approx([3.0, 7.0], rel=1e-6)


@pytest.mark.parametrize("request_", [{"method": "flap", "ratio": 0.4}, {"method": "wanda-sp", "ratio": 0.4}])
@torch.no_grad()
def test_least_squares_brings_the_first_layer_s_output_nearer(request_):
    """On layer 0 the inputs are the dense ones, so the refit minimises exactly the error that is compared here."""
    plain, dense = cut("llama", **(request_ | ({"compensate": "none"})))
    fitted, _ = cut("llama", **(request_ | {"compensate": "least-squares"}))
    name = "model.layers.0.self_attn.o_proj"
    wanted = pipeline.inputs_of(dense, IDS.ids_NT, [name])[name] @ dense.get_submodule(name).weight.T
    errors = []
    for outcome in (plain, fitted):
        assert outcome.keep.units["layers.0.kv_heads"] == plain.keep.units["layers.0.kv_heads"]
        x = pipeline.inputs_of(outcome.model, IDS.ids_NT, [name])[name]
        errors.append(float((x @ outcome.model.get_submodule(name).weight.T - wanted).square().sum()))
    assert errors[1] < errors[0]


@torch.no_grad()
def test_least_squares_is_lstsq_on_what_the_cut_model_reads():
    outcome, dense = cut("llama", method="flap", ratio=0.4, compensate="least-squares")
    name = "model.layers.0.self_attn.o_proj"
    x = pipeline.inputs_of(outcome.model, IDS.ids_NT, [name])[name]
    x = x.reshape(-1, x.shape[-1])
    weight = dense.get_submodule(name).weight
    wanted = pipeline.inputs_of(dense, IDS.ids_NT, [name])[name].reshape(-1, weight.shape[1]) @ weight.T
    expected = torch.linalg.lstsq(x, wanted).solution.T
    # the refit damps by 1e-4 of the mean diagonal, and its Gram matrix is summed in float32 within a window
    got = outcome.model.get_submodule(name).weight
    assert float((x @ got.T - wanted).square().sum()) < 1.001 * float((x @ expected.T - wanted).square().sum()) + 1e-9


@pytest.mark.parametrize(("method", "choose"), [("ziplm", stay_one_by_one), ("osscar", stay_after_swaps)])
@pytest.mark.parametrize("case", ["llama_tied", "llama_mha", "llama_gqa4", "llama_mqa", "qwen2", "gemma2", "phi"])
@torch.no_grad()
def test_units_are_chosen_and_readers_solved_behind_the_cut(method, choose, case):
    """Block after block by plain forward passes: the choice on X^T X, and lstsq on what stays. Both are tested by themselves."""
    ratio = 0.15 if case == "llama_mqa" else 0.4
    outcome, dense = cut(case, method=method, ratio=ratio)
    model, anatomy, moved = copy.deepcopy(dense), outcome.plan.anatomy, 0.0
    for i in range(tiny.LAYERS):
        axes = [anatomy.axes[f"layers.{i}.{kind}"] for kind in ("kv_heads", "intermediate")]
        spans = [anatomy.reader(axis.name) for axis in axes]
        inputs = pipeline.inputs_of(model, IDS.ids_NT, [span.param.removesuffix(".weight") for span in spans])
        for axis, span in zip(axes, spans, strict=True):
            name = span.param.removesuffix(".weight")
            linear, x = model.get_submodule(name), inputs[name].flatten(0, 1)
            rows = torch.tensor([tiny.spans_rows(span, [u]) for u in range(axis.size)])
            stays = choose(linear.weight, x.T @ x, rows, outcome.plan.counts[axis.name])
            assert outcome.keep.units.get(axis.name, tuple(range(axis.size))) == stays
            kept, wanted = rows[list(stays)].reshape(-1), x @ linear.weight.T
            got = outcome.model.get_submodule(name).weight
            best = torch.linalg.lstsq(x[:, kept], wanted).solution
            # the refit damps by 1e-4 of the mean diagonal, which costs no more than this; activations are taken in float32
            damped = 1e-4 * x[:, kept].square().sum(0).mean() * best.square().sum()
            error, least = ((x[:, kept] @ w - wanted).square().sum() for w in (got.T, best))
            assert error <= least + damped + 1e-8 * wanted.square().sum()
            moved += float((got - linear.weight[:, kept]).abs().max())
            zero_(dict(model.named_parameters()), anatomy, Keep({axis.name: stays}))
            linear.weight[:, kept] = got
    assert moved > 0.1 and outcome.plan.compensator == "least-squares" and outcome.target.is_stock
    outcome.model.set_attn_implementation("eager")
    expected = tiny.logits_of(model, IDS.ids_NT)
    torch.testing.assert_close(tiny.logits_of(outcome.model, IDS.ids_NT), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["ziplm", "osscar"])
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, r"ratio: \w+ needs to know how much to cut; give --ratio$"),
        ({"ratio": 0.001}, r"ratio: 0.001 is below one unit of this model; ask for at least"),
        ({"ratio": 0.999}, r"leave no room for one FFN channel in each of 3 layers; ask for a smaller ratio"),
        ({"ratio": 0.2, "compensate": "none"}, r"unknown value for compensate of \w+ 'none'"),
        ({"ratio": 0.2, "uniform": True}, r"uniform: "),
        ({"ratio": 0.2, "target": {"hidden_size": 8}}, r"target: \w+ does not take it; drop the option"),
    ],
)
def test_requests_that_are_refused(method, request_, message):
    with pytest.raises(UserError, match=message) as caught:
        pipeline.plan_for(pipeline.config("llama"), method=method, **request_)
    assert "\n" not in str(caught.value)


def test_osscar_is_saved_and_loaded_in_a_clean_process(tmp_path):
    code, _, err = pipeline.cli(
        "prune", pipeline.folder("mistral"), "-m", "osscar", "-r", 0.3, "-c", pipeline.text_file(), "--windows", 4,
        "--seq-len", 16, "-o", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert pipeline.cli("verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize("case", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("request_", [{"ratio": 0.5}, {"pattern": "2:4"}, {"pattern": "4:8"}])
def test_sparsegpt_end_to_end(case, request_):
    outcome, dense = cut(case, method="sparsegpt", **request_)
    live = dict(outcome.model.named_parameters())
    for name, kept in outcome.mask.kept.items():
        assert bool((live[name][~kept] == 0).all())
        if "pattern" in request_:
            n, m = map(int, request_["pattern"].split(":"))
            assert bool((kept.view(kept.shape[0], -1, m).sum(-1) == n).all())
    assert outcome.ratios["sparsity"] == pytest.approx(0.5, abs=0.01)
    changed = [
        n for n, kept in outcome.mask.kept.items() if not torch.equal(live[n][kept], dict(dense.named_parameters())[n][kept])
    ]
    assert changed  # what stays takes over what went


@pytest.mark.parametrize("case", ["llama_tied", "llama_mha", "llama_gqa4", "llama_mqa", "phi3"])
@pytest.mark.parametrize(("method", "naive"), [("sparsegpt", naive_sparsegpt), ("prunus-sparse", naive_admm)])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
@torch.no_grad()
def test_sparse_updates_are_their_loops_on_pruned_inputs(case, method, naive, pattern):
    """Against hooks on the whole model: a block's matrices are solved on what the pruned blocks before it give; float64."""
    outcome, model = cut(case, method=method, **({"pattern": "2:4"} if pattern else {"ratio": 0.5}))
    kind = {"pattern": pattern} if pattern else {"sparsity": 0.5}
    tipped = total = 0
    for layer in range(tiny.LAYERS):
        names = [n.removesuffix(".weight") for n in outcome.mask.kept if f".layers.{layer}." in n]
        inputs = pipeline.inputs_of(model, IDS.ids_NT, names)
        for name in names:
            x, linear = inputs[name].flatten(0, 1), model.get_submodule(name)
            expected, kept = naive(linear.weight, x.T @ x, **kind)
            got = outcome.model.get_submodule(name).weight
            same = outcome.mask.kept[f"{name}.weight"] == kept
            tipped, total = tipped + int((~same).sum()), total + same.numel()
            rows = same.all(1)  # where a choice tipped, the rest of its row made up for something else
            assert float((got - expected)[rows].norm()) < 1e-3 * float(expected[rows].norm()), name
            linear.weight.copy_(got)
    assert tipped < 0.005 * total  # float32 in the library: of scores as near as 1e-5 the other may go


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_owl_gives_layers_different_sparsities_around_the_same_mean(method):
    outcome, _ = cut("llama", method=method, ratio=0.5, options={"allocation": "owl"})
    levels = []
    for i in range(outcome.plan.anatomy.shape.num_hidden_layers):
        masks = [k for n, k in outcome.mask.kept.items() if f".layers.{i}." in n]
        levels.append(1 - sum(int(k.sum()) for k in masks) / sum(k.numel() for k in masks))
    assert max(levels) - min(levels) > 0.05
    assert max(levels) - min(levels) < 0.16 + 0.05  # 2 lambda, and rows hold whole weights
    assert sum(levels) / len(levels) == pytest.approx(0.5, abs=0.02)


@torch.no_grad()
def test_width_s_least_squares_is_lstsq_on_the_dense_inputs_that_stay():
    """Every matrix that reads the cut stem or FFN, against numpy's solver; the layer's error is never worse than unrepaired."""
    dense, model = pipeline.model("llama"), pipeline.model("llama")
    plan = plan_for(model, method="minitron-width", ratio=0.4, compensate="least-squares")
    outcome = one_shot_(plan, model, IDS)
    stem = list(outcome.keep.units["hidden"])
    for layer in range(tiny.LAYERS):
        ffn = list(outcome.keep.units[f"layers.{layer}.intermediate"])
        for module, inputs, rows in (
            ("self_attn.q_proj", stem, None), ("self_attn.v_proj", stem, None), ("mlp.gate_proj", stem, ffn),
            ("mlp.up_proj", stem, ffn), ("mlp.down_proj", ffn, stem),
        ):  # fmt: skip
            name = f"model.layers.{layer}.{module}"
            x = pipeline.inputs_of(dense, IDS.ids_NT, [name])[name].flatten(0, 1)
            wanted = x @ dense.get_submodule(name).weight.T
            solved = torch.from_numpy(np.linalg.lstsq(x[:, inputs].numpy(), wanted.numpy(), rcond=None)[0]).T
            found = outcome.model.get_submodule(name).weight
            solved = solved if rows is None else solved[rows]
            assert (found - solved).abs().max() < 0.02 * solved.abs().max(), name  # damping of 1e-4 of the mean diagonal
            plain = dense.get_submodule(name).weight[:, inputs]
            left = [float((x[:, inputs] @ w.T - (wanted if rows is None else wanted[:, rows])).square().sum())
                    for w in (found, plain if rows is None else plain[rows])]  # fmt: skip
            assert left[0] <= left[1] * (1 + 1e-9), name


def test_width_s_least_squares_is_refused_where_no_gain_mends_the_norms():
    with pytest.raises(UserError, match="compensate: least-squares mends RMSNorms, but the norms of phi subtract the mean"):
        plan_for(pipeline.config("phi"), method="minitron-width", ratio=0.4, compensate="least-squares")
