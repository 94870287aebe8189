"""SliceGPT: against forwards written out in the original basis, with projections where the stream is sliced; float64."""

from __future__ import annotations

import copy
import json

import pipeline
import pytest
import tiny
import torch
from torch import nn

from prunus import hf
from prunus.anatomy import Anatomy
from prunus.cut import slice_plan, slice_tensors
from prunus.errors import UserError
from prunus.families import FAMILIES
from prunus.keep import Keep
from prunus.kv_copies import unshared
from prunus.oneshot import one_shot_
from prunus.rotation import directions, stem_norms, turned_
from prunus.source import Source
from prunus.train.learner import recompute_

IDS = pipeline.windows()
UNSEEN = tiny.tokens(3, 13, seed=9, vocab=pipeline.VOCAB)
VARIANTS = ("per-block", "shared")
PLAIN = ("llama", "llama_tied", "llama_bias", "llama_mha", "llama_gqa4", "llama_mqa", "mistral", "qwen2", "qwen3", "smollm3")
TURNABLE = (*PLAIN, "phi3", "seed_oss_bias", "gemma", "gemma_untied")
ONE_A_FAMILY = ("llama_bias", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma")
# What is left in float64 once the norms below and SDPA have replaced what transformers does in float32. The folded gains and
# turned matrices are rounded to 1e-16 each, over some ten matrices deep.
EXACT = 1e-9


class Norm64(nn.Module):
    """RMSNorm without transformers' detour through float32."""

    def __init__(self, norm, offset):
        super().__init__()
        self.weight, self.offset = norm.weight, offset
        self.eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.weight + self.offset)


def exact(model):
    """The model with float64 norms and an attention whose softmax is not rounded to float32. Changes it."""
    model.set_attn_implementation("sdpa")
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, leaf = name.rpartition(".")
            offset = 1.0 if "Gemma" in type(module).__name__ else 0.0
            setattr(model.get_submodule(parent), leaf, Norm64(module, offset))
    return model


def cut(dense, rotation="per-block", batch_size=2, signal="stream", **request):
    plan = pipeline.plan_for(dense, method="slicegpt", options={"rotation": rotation, "signal": signal}, **request)
    return one_shot_(plan, copy.deepcopy(dense), IDS, batch_size=batch_size)


def orthogonal(size, seed):
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def target_of(dense, rotation, size):
    """The target at any size, also the whole one, which a plan refuses."""
    anatomy = Anatomy.of(dense.config)
    if rotation == "per-block":
        return hf.sliced_target(dense.config, anatomy, size)
    untied = copy.copy(dense.config)
    untied.tie_word_embeddings = False
    return hf.target_for(dense.config, Anatomy.of(untied), Keep({"hidden": tuple(range(size))}))


# -- turning alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", VARIANTS)
@pytest.mark.parametrize("case", TURNABLE)
def test_turning_alone_changes_nothing(case, rotation):
    """Any orthogonal bases, nothing cut: the same logits (algorithms.md X17)."""
    dense = exact(pipeline.model(case))
    anatomy = Anatomy.of(dense.config)
    size, places = anatomy.shape.hidden_size, 2 * anatomy.shape.num_hidden_layers
    bases = [orthogonal(size, i) for i in range(places)] + [None]
    if rotation == "shared":
        bases = [bases[0]] * (places + 1)
    target = target_of(dense, rotation, size)
    turned = turned_(anatomy, hf.weights(dense, anatomy), bases, target.anatomy.shape.hidden_size)
    assert {n: tuple(t.shape) for n, t in turned.items()} == {n: t.shape for n, t in target.anatomy.tensors.items()}
    model = exact(hf.build(target.config, turned))
    assert target.is_stock == (rotation == "shared")
    assert tiny.relative(tiny.logits_of(model, UNSEEN), tiny.logits_of(dense, UNSEEN)) < EXACT


@pytest.mark.parametrize("anew", ["vocab", "kv_heads"])
def test_a_sliced_model_is_sliced_with_another_vocabulary_or_kv_heads(anew):
    """No stock config says the size of its stream."""
    sliced = cut(pipeline.model("llama"), ratio=0.1, multiple_of=2).model
    ids = IDS.ids_NT % 100
    wanted = tiny.logits_of(sliced, ids)
    if anew == "vocab":
        anatomy, keep = Anatomy.of(sliced.config), Keep({"vocab": tuple(range(100))})
        config = hf.target_for(sliced.config, anatomy, keep).config
        made = hf.build(config, slice_tensors(hf.weights(sliced, anatomy), slice_plan(anatomy, keep)))
        wanted = wanted[..., :100]
    else:
        made = unshared(sliced)
        assert {layer.num_key_value_heads for layer in Anatomy.of(made.config).shape.layers} == {tiny.HEADS}
    assert made.config.model_type == "pruned_llama" and made.config.stream_size == sliced.config.stream_size
    assert tiny.relative(tiny.logits_of(made, ids), wanted) < 1e-12


@pytest.mark.parametrize("compensate", ["none", "bias"])
def test_a_model_whose_layers_differ_can_be_turned(compensate):
    """What flap leaves, its output biases among them."""
    source = pipeline.model("llama")
    plan = pipeline.plan_for(source, method="flap", ratio=0.3, compensate=compensate)
    dense = exact(one_shot_(plan, source, IDS).model)
    anatomy = Anatomy.of(dense.config)
    bases = [orthogonal(32, i) for i in range(6)] + [None]
    target = hf.sliced_target(dense.config, anatomy, 32)
    model = exact(hf.build(target.config, turned_(anatomy, hf.weights(dense, anatomy), bases, 32)))
    assert tiny.relative(tiny.logits_of(model, UNSEEN), tiny.logits_of(dense, UNSEEN)) < EXACT


# -- against plain forwards in the original basis -------------------------------------------------------------------------


def eigenspace(signal, size):
    x = signal.reshape(-1, signal.shape[-1])
    values, vectors = torch.linalg.eigh(sum(torch.outer(row, row) for row in x))
    best = sorted(range(len(values)), key=lambda i: -values[i])[:size]
    return vectors[:, best] @ vectors[:, best].T


def seen_as(signal, dense, x):
    """What the covariance is taken of."""
    if signal == "stream":
        return x
    return x / (x.square().mean(-1, keepdim=True) + dense.config.rms_norm_eps).sqrt()


@torch.no_grad()
def plain(dense, ids, at_place, writes=lambda out: out):
    """Logits of a Llama written out; `at_place(k, x)` gives the stream that goes on from place k, both norm and residual."""
    x = writes(dense.model.embed_tokens(ids))
    angles = dense.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    for i, layer in enumerate(dense.model.layers):
        x = at_place(2 * i, x)
        x = x + writes(layer.self_attn(layer.input_layernorm(x), position_embeddings=angles, attention_mask=None)[0])
        x = at_place(2 * i + 1, x)
        x = x + writes(layer.mlp(layer.post_attention_layernorm(x)))
    return dense.lm_head(dense.model.norm(x))


@pytest.mark.parametrize("signal", ["stream", "normed"])
@pytest.mark.parametrize("case", ["llama", "llama_bias", "llama_tied", "llama_mqa", "qwen3"])
@pytest.mark.parametrize("size", [8, 20])
def test_per_block_is_pca_of_what_comes_through_the_sliced_places(case, size, signal):
    dense = exact(pipeline.model(case))
    projections = {}

    def learn(place, x):
        projections[place] = eigenspace(seen_as(signal, dense, x), size)
        return x @ projections[place]

    plain(dense, IDS.ids_NT, learn)
    expected = plain(dense, UNSEEN, lambda place, x: x @ projections[place])
    outcome = cut(dense, signal=signal, target={"hidden_size": size})
    assert tiny.relative(tiny.logits_of(exact(outcome.model), UNSEEN), expected) < EXACT
    assert tiny.relative(expected, tiny.logits_of(dense, UNSEEN)) > 1e-3


@pytest.mark.parametrize("signal", ["stream", "normed"])
@pytest.mark.parametrize("case", ["llama", "llama_bias", "llama_tied", "llama_mqa", "qwen3"])
@pytest.mark.parametrize("size", [8, 20])
def test_shared_is_pca_of_the_trace_normalised_sum(case, size, signal):
    """Qwen3's norms over heads share the epsilon, so it cannot be scaled with the stem: 1e-12 here, so nothing is seen."""
    dense = exact(pipeline.model(case))
    grams = []

    def learn(place, x):
        x_ND = seen_as(signal, dense, x).reshape(-1, x.shape[-1])
        grams.append(x_ND.T @ x_ND / x_ND.square().sum())
        return x

    plain(dense, IDS.ids_NT, learn)
    vectors = torch.linalg.eigh(sum(grams)).eigenvectors[:, -size:]
    expected = plain(dense, UNSEEN, lambda place, x: x, writes=lambda out: out @ vectors @ vectors.T)
    outcome = cut(dense, "shared", signal=signal, target={"hidden_size": size})
    assert outcome.target.is_stock and not outcome.model.config.tie_word_embeddings
    assert tiny.relative(tiny.logits_of(exact(outcome.model), UNSEEN), expected) < EXACT


@pytest.mark.parametrize("case", ONE_A_FAMILY)
def test_signals_stand_in_their_principal_directions(case):
    """In the sliced model the Gram matrix of every signal that a norm reads is diagonal, and falls."""
    outcome = cut(exact(pipeline.model(case)), target={"hidden_size": 16})
    model = exact(outcome.model)
    norms = stem_norms(Anatomy.of(pipeline.config(case)))
    seen = pipeline.inputs_of(model, IDS.ids_NT, norms.values())
    for place in range(2 * tiny.LAYERS):
        x = seen[norms[place]].reshape(-1, 16)
        gram = x.T @ x
        energy = gram.diagonal()
        assert float((gram - energy.diag()).abs().max()) < EXACT * float(energy[0])
        assert bool((energy[1:] <= energy[:-1] * (1 + EXACT)).all())


def test_eps_is_all_that_the_stock_variant_misses():
    """Where the config's one epsilon also serves norms over heads it stays, and the fold misses by about eps / mean square."""
    dense = exact(pipeline.model("qwen3", rms_norm_eps=1e-3))
    per_block = low_rank(dense, 16)
    exactly = tiny.logits_of(per_block, UNSEEN)
    stock = tiny.logits_of(exact(cut(per_block, "shared", target={"hidden_size": 16}).model), UNSEEN)
    ours = tiny.logits_of(exact(cut(per_block, "per-block", target={"hidden_size": 16}).model), UNSEEN)
    assert EXACT < tiny.relative(stock, exactly) < 1e-2
    assert tiny.relative(ours, exactly) < EXACT


# -- what must stay -------------------------------------------------------------------------------------------------------


def low_rank(dense, rank):
    """The model with a stream that never leaves `rank` directions. Changes it."""
    basis = orthogonal(dense.config.hidden_size, 7)[:, :rank]
    inside = basis @ basis.T
    with torch.no_grad():
        for name, p in dense.named_parameters():
            if "embed_" in name:
                p.copy_(p @ inside)
            elif "o_proj" in name or "down_proj" in name:
                p.copy_(inside @ p)
    return dense


@pytest.mark.parametrize("rotation", VARIANTS)
@pytest.mark.parametrize("case", TURNABLE)
def test_a_stream_of_rank_r_sliced_to_r_is_the_same_model(case, rotation):
    """Also on text that was not seen: nothing else could be there (algorithms.md X17)."""
    dense = low_rank(exact(pipeline.model(case)), 16)
    outcome = cut(dense, rotation, target={"hidden_size": 16})
    # the tied head reads the embedding's rows inside the 16 directions; what it reads of the stream lies there too
    assert tiny.relative(tiny.logits_of(exact(outcome.model), UNSEEN), tiny.logits_of(dense, UNSEEN)) < EXACT


@pytest.mark.parametrize("rotation", VARIANTS)
def test_what_does_not_touch_the_stream_is_untouched(rotation):
    for case, leaves in (("qwen3", ("q_norm", "k_norm")), ("qwen2", ("q_proj.bias", "k_proj.bias", "v_proj.bias"))):
        dense = pipeline.model(case)
        before = pipeline.state(dense)
        after = pipeline.state(cut(dense, rotation, ratio=0.3, multiple_of=4).model)
        names = [n for n in before if any(leaf in n for leaf in leaves)]
        assert names and all(torch.equal(before[n], after[n]) for n in names)


@pytest.mark.parametrize("rotation", VARIANTS)
def test_the_batch_changes_rounding_alone(rotation):
    dense = exact(pipeline.model("llama"))
    one, many = (cut(dense, rotation, batch_size=b, ratio=0.3, multiple_of=4).model for b in (1, 5))
    assert tiny.relative(tiny.logits_of(exact(one), UNSEEN), tiny.logits_of(exact(many), UNSEEN)) < EXACT


def test_directions_of_a_matrix_whose_eigenvectors_are_known():
    gram = torch.diag(torch.tensor([1.0, 5.0, 0.0, 3.0], dtype=torch.float64))
    assert torch.equal(directions(gram, 2).abs(), torch.eye(4, dtype=torch.float64)[:, [1, 3]])


# -- counts ---------------------------------------------------------------------------------------------------------------


def block_params(model):
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)


@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen2", "qwen3", "phi3", "gemma"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize("rotation", VARIANTS)
def test_the_target_is_met_by_the_largest_lawful_size(case, ratio, rotation):
    """Shortcut matrices are counted as block parameters."""
    dense = pipeline.model(case)
    outcome = cut(dense, rotation, ratio=ratio, multiple_of=2)
    size, budget = outcome.plan.counts["hidden"], (1 - ratio) * block_params(dense)
    assert size % 2 == 0
    assert block_params(outcome.model) == outcome.target.anatomy.block_params <= budget
    assert sum(p.numel() for p in outcome.model.parameters()) == outcome.target.anatomy.num_params
    assert target_of(dense, rotation, size + 2).anatomy.block_params > budget
    assert outcome.ratios["removed_of_block"] == pytest.approx(1 - block_params(outcome.model) / block_params(dense))


def test_parameters_by_the_formula():
    d, k, L, q, kv, f, V = 32, 8, 3, 64, 32, 24, pipeline.VOCAB
    outcome = cut(pipeline.model("llama_tied"), target={"hidden_size": k})
    attention, mlp = k * (2 * q + 2 * kv) + k, 3 * k * f + k
    blocks = L * (attention + mlp + 2 * k * k) + (d - k) * (f + k)  # down_proj and the last shortcut write d channels
    assert outcome.target.anatomy.block_params == blocks
    assert outcome.target.anatomy.num_params == blocks + V * k + d + V * d
    assert outcome.target.anatomy.matrix_params == blocks - 2 * L * k
    shared = cut(pipeline.model("llama_tied"), "shared", target={"hidden_size": k}).target.anatomy
    assert shared.num_params == L * (attention + mlp) + k + 2 * V * k


def test_sizes_are_multiples_of_eight_by_default():
    assert pipeline.plan_for(pipeline.config("llama"), method="slicegpt", ratio=0.2).counts["hidden"] % 8 == 0


def test_the_default_is_the_published_variant():
    plan = pipeline.plan_for(pipeline.config("llama_tied"), method="slicegpt", ratio=0.3)
    assert plan.options == {"rotation": "per-block", "signal": "stream"} and plan.target.config.model_type == "pruned_llama"
    assert any("prunus export --check" in note for note in plan.notes) and any("untied" in note for note in plan.notes)
    one, two = (
        pipeline.plan_for(pipeline.config("llama"), method="slicegpt", ratio=0.3, options={"rotation": r}) for r in VARIANTS
    )
    assert one.scoring_flops(4, 16) == 2 * two.scoring_flops(4, 16)


# -- the model type -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ONE_A_FAMILY)
def test_the_sliced_type_decodes_trains_and_sees_no_future(case):
    model = cut(pipeline.model(case), target={"hidden_size": 12}).model
    ids, changed = UNSEEN, UNSEEN.clone()
    changed[:, 7] = (changed[:, 7] + 1) % pipeline.VOCAB
    logits = {}
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        logits[backend] = tiny.logits_of(model, ids)
        moved = (tiny.logits_of(model, changed) - logits[backend]).abs().amax(-1)
        assert not moved[:, :7].any() and (moved[:, 7:].amax(-1) > 1e-3).all()
    # eager attention rounds its softmax to float32 (6e-8), SDPA does not
    assert tiny.relative(logits["sdpa"], logits["eager"]) < 1e-5
    assert torch.equal(tiny.greedy_stepwise(model, ids[:1, :5], 6), tiny.greedy_by_hand(model, ids[:1, :5], 6))
    model.train()
    recompute_(model)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    widths = [h.shape[-1] for h in model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states]
    assert widths == [12] * tiny.LAYERS + [tiny.HIDDEN]


def test_a_sliced_model_made_from_its_config_alone_has_the_sizes():
    from transformers import AutoModelForCausalLM

    target = target_of(pipeline.model("llama"), "per-block", 16)
    made = AutoModelForCausalLM.from_config(target.config)
    assert {n: tuple(p.shape) for n, p in made.named_parameters()} == {n: t.shape for n, t in target.anatomy.tensors.items()}
    assert torch.isfinite(tiny.logits_of(made, UNSEEN)).all()


def test_bfloat16_stays_bfloat16():
    for rotation in VARIANTS:
        model = cut(pipeline.model("llama", dtype=torch.bfloat16), rotation, ratio=0.3, multiple_of=4).model
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.isfinite(tiny.logits_of(model, UNSEEN)).all()


@pytest.mark.parametrize("rotation", VARIANTS)
def test_saved_verified_and_read_again(rotation, monkeypatch):
    if rotation == "shared":  # a stock type: clean processes read these elsewhere
        pipeline.verify_here(monkeypatch)
    out = pipeline.scratch() / f"slicegpt-{rotation}"
    options = ("-m", "slicegpt", "-r", 0.3, "--multiple-of", 4, "--option", f"rotation={rotation}")
    text = ("-c", pipeline.text_file(), "--seq-len", 16, "--windows", 6)
    code, said, err = pipeline.cli("prune", pipeline.folder("llama_tied"), *options, *text, "-o", out, "--json")
    assert code == 0, err
    made = json.loads(said)
    assert made["verified"]["generated_equal"] and made["verified"]["params_on_disk"] == made["after"]["params"]
    assert made["after"]["model_type"] == ("pruned_llama" if rotation == "per-block" else "mistral")
    assert made["method"]["options"] == {"rotation": rotation, "signal": "stream"}
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and ("stream_size" in config) == (rotation == "per-block")
    assert Source.open(str(out)).anatomy.num_params == made["after"]["params"]
    code, said, err = pipeline.cli("inspect", out, "--json")
    assert code == 0 and json.loads(said)["kept_units"]["hidden"] == made["after"]["shape"].get(
        "stream_size", made["after"]["shape"]["hidden_size"]
    )


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("gemma2", "post_attention_layernorm of gemma2 multiplies what goes into the stream channel by channel"),
        ("gemma3", "post_attention_layernorm of gemma3 multiplies"),
        ("olmo2", "post_attention_layernorm of olmo2 multiplies"),
        ("olmo", "the norms of olmo subtract the mean"),
        ("phi", "the norms of phi subtract the mean"),
        ("gpt_neox", "it cuts hidden, but a gpt_neox config makes the size of a head"),
    ],
)
@pytest.mark.parametrize("rotation", VARIANTS)
def test_families_whose_stream_cannot_be_turned(case, why, rotation):
    with pytest.raises(UserError, match=f"slicegpt: .*{why}") as caught:
        pipeline.plan_for(pipeline.config(case), method="slicegpt", ratio=0.2, options={"rotation": rotation})
    assert "\n" not in str(caught.value)


def test_every_family_that_is_not_refused_is_turned_above():
    """So a new family whose norms stand behind its sub-layers cannot forget to say so."""
    for family in FAMILIES:
        assert set(family.norms_behind) <= {*family.attention, *family.mlp}
    for case in tiny.CASES:
        config = pipeline.config(case)
        anatomy = Anatomy.of(config)
        if anatomy.family.unrotatable is None and "hidden" not in anatomy.refused:
            assert case in TURNABLE or case == "seed_oss", case


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, r"ratio: slicegpt needs to know how much to cut; give --ratio or --target"),
        ({"ratio": 0.9}, r"ratio: 0.9 leaves no room for 8 directions of the stream; ask for a smaller ratio"),
        ({"ratio": 0.2, "pattern": "2:4"}, r"pattern: slicegpt does not take it"),
        ({"ratio": 0.2, "uniform": True}, r"uniform: slicegpt always leaves uniform layers"),
        ({"ratio": 0.2, "target": {"hidden_size": 8}}, r"target: sizes and --ratio contradict each other"),
        ({"target": {"intermediate_size": 8}}, r"unknown size for slicegpt's target 'intermediate_size'"),
        ({"target": {"hidden_size": 33}}, r"target: hidden_size=33 is outside 1 to 32"),
        ({"target": {"hidden_size": 8}, "multiple_of": 8}, r"multiple_of: --target says the sizes themselves"),
        ({"target": {"hidden_size": 31}}, r"target: 31 of 32 directions with the shortcut matrices take [\d,]+ block para"),
        ({"target": {"hidden_size": 32}, "options": {"rotation": "shared"}}, r"target: 32 of 32 directions take"),
        ({"ratio": 0.2, "options": {"rotation": "one"}}, r"unknown value for rotation of slicegpt 'one'"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(request_, message):
    with pytest.raises(UserError, match=message) as caught:
        pipeline.plan_for(pipeline.config("llama"), method="slicegpt", **request_)
    assert "\n" not in str(caught.value)


def test_a_layer_without_attention_needs_the_shared_rotation():
    source = pipeline.model("llama")
    plan = pipeline.plan_for(source, method="sublayer-greedy", ratio=0.2)
    dense = exact(low_rank(one_shot_(plan, source, IDS).model, 16))
    with pytest.raises(UserError, match="slicegpt: some layers of this model lack a sub-layer"):
        pipeline.plan_for(dense, method="slicegpt", ratio=0.2)
    outcome = cut(dense, "shared", target={"hidden_size": 16})
    assert tiny.relative(tiny.logits_of(exact(outcome.model), UNSEEN), tiny.logits_of(dense, UNSEEN)) < EXACT


@pytest.mark.parametrize("method", ["slicegpt", "wanda", "flap", "minitron-depth"])
def test_a_sliced_model_is_not_cut_further(method):
    config = target_of(pipeline.model("llama"), "per-block", 16).config
    with pytest.raises(UserError, match=rf"{method}: this model's stream is sliced already"):
        pipeline.plan_for(config, method=method, ratio=0.34)
