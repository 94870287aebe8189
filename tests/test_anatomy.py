"""Parameters and FLOPs of published models: every row of the tables that a study or a model card states.

Sources: "Small LLMs: Pruning vs Training from Scratch" tables 1, 7 and 9; EfficientLLM tables 8 and 9; model cards. The
expected digits are those that the papers' own formula gives, computed outside this library.
"""

from __future__ import annotations

import pytest
import transformers

from prunus.anatomy import Anatomy
from prunus.families import family_of
from prunus.shape import LayerShape, Shape

T = 2048


def params_by_hand(L, h, k, d, f, *, e, vocab, tied):
    """P = L (2dhe + 2dke + 3df + 2d) + d + Vd (1 if tied else 2)."""
    return L * (2 * d * h * e + 2 * d * k * e + 3 * d * f + 2 * d) + d + vocab * d * (1 if tied else 2)


def llama(L, h, k, d, f, *, e=128, vocab=128256, tied=False):
    anatomy = Anatomy(
        family_of("llama"),
        Shape.uniform(
            num_hidden_layers=L,
            hidden_size=d,
            intermediate_size=f,
            num_attention_heads=h,
            num_key_value_heads=k,
            head_dim=e,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        ),
    )
    assert anatomy.num_params == params_by_hand(L, h, k, d, f, e=e, vocab=vocab, tied=tied)
    return anatomy


def billions(n):
    return f"{n / 1e9:.3f}"


def millions(n):
    return f"{n / 1e6:.1f}"


BASE = (32, 32, 8, 4096, 14336)
# name: (L, h, k, d, f), parameters in billions, % removed of P, % removed of the blocks' matrices
TABLE_1 = {
    "base": (BASE, "8.030", "0.0", "0.0"),
    "depth 50": ((16, 32, 8, 4096, 14336), "4.540", "43.5", "50.0"),
    "depth 62.5": ((8, 32, 8, 4096, 14336), "2.796", "65.2", "75.0"),
    "depth 75": ((4, 32, 8, 4096, 14336), "1.923", "76.1", "87.5"),
    "depth 81.3": ((2, 32, 8, 4096, 14336), "1.487", "81.5", "93.8"),
    "width 50": ((32, 32, 8, 3072, 9216), "4.513", "43.8", "46.6"),
    "width 62.5": ((32, 32, 8, 2432, 6144), "2.855", "64.4", "68.0"),
    "width 75": ((32, 32, 8, 1792, 6016), "2.082", "74.1", "76.8"),
    "width 81.3": ((32, 32, 8, 1536, 4736), "1.596", "80.1", "82.8"),
    "FLAP": ((32, 20, 5, 4096, 6656), "4.507", "43.9", "50.5"),
    "Sheared": ((32, 32, 8, 3456, 7552), "4.525", "43.7", "47.9"),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_llama_3_1_and_its_children(name):
    sizes, params, of_all, of_matrices = TABLE_1[name]
    base, anatomy = llama(*BASE), llama(*sizes)
    assert billions(anatomy.num_params) == params
    assert f"{100 * (1 - anatomy.num_params / base.num_params):.1f}" == of_all
    assert f"{100 * (1 - anatomy.matrix_params / base.matrix_params):.1f}" == of_matrices


def test_llama_3_1_exactly():
    base = llama(*BASE)
    assert base.num_params == 8_030_261_248
    assert base.matrix_params == 6_979_321_856
    assert base.block_params == 6_979_321_856 + 32 * 2 * 4096
    # half of the matrices' weights gone, unstructured: the "sparse 50%" row
    nonzero = base.num_params - base.matrix_params // 2
    assert billions(nonzero) == "4.541"
    assert f"{100 * (1 - nonzero / base.num_params):.1f}" == "43.5"


CANDIDATES = {
    "width 62.5": {
        (2176, 7168): "2.769",
        (2304, 6656): "2.818",
        (2432, 6144): "2.855",
        (2560, 6400): "3.069",
        (2688, 5888): "3.090",
    },
    "width 75": {(1664, 6656): "2.035", (1792, 6016): "2.082", (1920, 5248): "2.089", (2048, 4480): "2.077"},
    "width 81.3": {(1408, 5632): "1.584", (1536, 4736): "1.596", (1664, 3840): "1.586"},
}


@pytest.mark.parametrize("label", CANDIDATES)
def test_width_candidates(label):
    assert {(d, f): billions(llama(32, 32, 8, d, f).num_params) for d, f in CANDIDATES[label]} == CANDIDATES[label]


# (d, h, f) with a quarter as many KV heads
GROUP_CANDIDATES = {
    (4096, 16, 7168): "4.541",
    (4096, 20, 6656): "4.507",
    (4096, 24, 6272): "4.524",
    (4096, 28, 5888): "4.541",
    (4096, 32, 5376): "4.507",
    (3072, 16, 11008): "4.538",
    (3072, 20, 10496): "4.513",
    (3072, 24, 10112): "4.525",
    (3072, 28, 9728): "4.538",
    (3072, 32, 9216): "4.513",
    (3456, 16, 9216): "4.511",
    (3456, 20, 8832): "4.525",
    (3456, 24, 8448): "4.539",
    (3456, 28, 7936): "4.511",
    (3456, 32, 7552): "4.525",
}


@pytest.mark.parametrize("sizes", GROUP_CANDIDATES)
def test_flap_and_sheared_candidates(sizes):
    d, h, f = sizes
    assert billions(llama(32, h, h // 4, d, f).num_params) == GROUP_CANDIDATES[sizes]


SMOLLM = {"e": 64, "vocab": 49152, "tied": True}
MOBILE = {"e": 64, "vocab": 32000, "tied": True}
SHEARED = {"e": 128, "vocab": 32000, "tied": False}
# name: (L, h, k, d, f), the rest, parameters in millions
SMALL = {
    "SmolLM-1.7B": ((24, 32, 32, 2048, 8192), SMOLLM, "1711.4"),
    "SmolLM-360M": ((32, 15, 5, 960, 2560), SMOLLM, "361.8"),
    "EfficientLLM-457M": ((24, 19, 19, 1195, 3006), SMOLLM, "456.9"),
    "EfficientLLM-1.1B": ((24, 24, 24, 2048, 4870), SMOLLM, "1120.9"),
    "EfficientLLM-134M with k=5": ((32, 5, 5, 757, 966), SMOLLM, "138.5"),
    "LLM-Pruner": ((24, 19, 19, 1169, 3082), SMOLLM, "453.4"),
    "OBC": ((24, 19, 19, 1131, 3258), SMOLLM, "453.0"),
    "Diag-Hess": ((24, 12, 12, 1963, 1542), SMOLLM, "459.2"),
    "MobileLLM-125M": ((30, 9, 3, 576, 1536), MOBILE, "124.6"),
    "MobileLLM-350M": ((32, 15, 5, 960, 2560), MOBILE, "345.4"),
    "MobileLLM-1B": ((54, 20, 5, 1280, 3584), MOBILE, "1005.5"),
    "Llama-3.2-1B": ((16, 32, 8, 2048, 8192), {"e": 64, "vocab": 128256, "tied": True}, "1235.8"),
    "Sheared-LLaMA-1.3B": ((24, 16, 16, 2048, 5504), SHEARED, "1345.4"),
    "Sheared-LLaMA-2.7B": ((32, 20, 20, 2560, 6912), SHEARED, "2701.6"),
    "Sheared-LLaMA-370M": ((24, 8, 8, 1024, 2816), SHEARED, "373.9"),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_models(name):
    sizes, rest, params = SMALL[name]
    assert millions(llama(*sizes, **rest).num_params) == params


def test_efficientllm_134m_has_ragged_kv_heads():
    """5 query heads a layer and 114 of 160 KV heads: only the sum of the KV heads matters for the count."""
    kv_heads = [4] * 18 + [3] * 14
    assert sum(kv_heads) == 114
    layers = tuple(LayerShape(5, k, 966) for k in kv_heads)
    anatomy = Anatomy(family_of("llama"), Shape(757, 64, 49152, True, layers))
    assert millions(anatomy.num_params) == "134.0"
    dense = params_by_hand(32, 5, 5, 757, 966, e=64, vocab=49152, tied=True)
    assert anatomy.num_params == dense - 2 * 757 * 64 * (160 - 114)
    assert anatomy.kv_bytes_per_token() == 2 * 64 * 2 * 114


def test_qwen2_5_counts_its_biases_apart():
    config = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    anatomy = Anatomy.of(config)
    biases = 24 * (896 + 2 * 128)
    without = params_by_hand(24, 14, 2, 896, 4864, e=64, vocab=151936, tied=True)
    assert millions(without) == "494.0"
    assert anatomy.num_params == without + biases == 494_032_768  # as the checkpoint has it
    assert sum(t.numel for n, t in anatomy.tensors.items() if n.endswith("bias")) == biases


# model cards; Pythia's also state the parameters without embeddings, our blocks and the final norm
PYTHIA = {  # (layers, hidden, heads, FFN, vocabulary): all, non-embedding
    (6, 512, 8, 2048, 50304): (70_426_624, 18_915_328),
    (12, 768, 12, 3072, 50304): (162_322_944, 85_056_000),
    (24, 1024, 16, 4096, 50304): (405_334_016, 302_311_424),
    (16, 2048, 8, 8192, 50304): (1_011_781_632, 805_736_448),
}


@pytest.mark.parametrize("sizes", PYTHIA)
def test_pythia(sizes):
    """From a config as EleutherAI wrote it: other names for RoPE, no KV heads, no size of a head."""
    count, hidden, heads, ffn, vocab = sizes
    anatomy = Anatomy.of(
        transformers.GPTNeoXConfig(
            num_hidden_layers=count,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=ffn,
            vocab_size=vocab,
            rotary_pct=0.25,
            rotary_emb_base=10000,
            use_parallel_residual=True,
            tie_word_embeddings=False,
        )
    )
    assert (anatomy.num_params, anatomy.block_params + 2 * hidden) == PYTHIA[sizes]
    assert anatomy.shape.head_dim == hidden // heads
    assert anatomy.kv_bytes_per_token() == 2 * 2 * hidden * count


def test_phi_2_and_olmo():
    phi = transformers.PhiConfig(
        vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32
    )
    assert Anatomy.of(phi).num_params == 2_779_683_840
    olmo = transformers.OlmoConfig(  # 1B; its norms have no parameters
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        tie_word_embeddings=True,
    )
    assert Anatomy.of(olmo).num_params == 1_176_764_416 == 16 * (4 * 2048**2 + 3 * 2048 * 8192) + 50304 * 2048


def test_sizes_come_from_a_config_and_no_weight():
    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    assert Anatomy.of(config).num_params == 8_030_261_248


# TF of one sequence of 2048 tokens, as computed and as printed in table 9
FLOPS = {
    "base": ("32.938", "32.9"),
    "depth 50": ("17.545", "17.5"),
    "depth 62.5": ("9.848", "9.8"),
    "depth 75": ("6.000", "6.0"),
    "depth 81.3": ("4.076", "4.1"),
    "width 50": ("19.069", "19.1"),
    "width 62.5": ("12.616", "12.6"),
    "width 75": ("9.785", "9.8"),
    "width 81.3": ("7.928", "7.9"),
    "FLAP": ("17.682", "17.7"),
    "Sheared": ("18.916", "18.9"),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_of_table_9(name):
    computed, printed = FLOPS[name]
    flops = llama(*TABLE_1[name][0]).flops(T)
    assert f"{flops / 1e12:.3f}" == computed
    assert f"{flops / 1e12:.1f}" == printed


def test_flops_of_the_sparse_rows_in_both_conventions():
    base = llama(*BASE)
    assert f"{base.flops(T, density=0.5, convention='all') / 1e12:.3f}" == "16.469"  # what the study printed: 16.5
    assert f"{base.flops(T, density=0.5) / 1e12:.3f}" == "18.644"
    assert base.flops(T, density=1.0, convention="all") == base.flops(T)
    attention = 4 * T**2 * 32 * 128 * 32
    assert f"{(base.flops(T) - attention) / 1e12:.3f} + {attention / 1e12:.3f}" == "30.739 + 2.199"


def test_eight_kv_heads_would_not_give_flaps_flops():
    """FLAP's column of KV heads in table 1 counts query heads."""
    assert f"{llama(32, 20, 8, 4096, 6656).flops(T) / 1e12:.1f}" == "18.1"


def test_group_sizes_of_smollm_1_7b():
    """EfficientLLM's groups: a head, an FFN channel (both over all layers), a stem channel."""
    smollm = llama(24, 32, 32, 2048, 8192, **SMOLLM)
    assert sum(smollm.unit_params(f"layers.{i}.kv_heads") for i in range(24)) == 12_582_912
    assert sum(smollm.unit_params(f"layers.{i}.intermediate") for i in range(24)) == 147_456
    assert smollm.unit_params("hidden") == 835_633


def test_group_sizes_under_gqa():
    L, h, k, d, f = BASE
    e, r, vocab = 128, 4, 128256
    base = llama(*BASE)
    assert base.unit_params("layers.5.intermediate") == 3 * d
    assert base.unit_params("layers.5.kv_heads") == 2 * d * e * (r + 1)
    assert base.unit_params("layers.5.q_heads") == 2 * d * e * k  # one query head in each of the k groups
    assert base.unit_params("layers.5.heads") == 2 * d * e  # one query head, whose KV head others read
    assert base.unit_params("hidden") == L * (2 * h * e + 2 * k * e + 3 * f) + 2 * L + 1 + 2 * vocab
    assert base.unit_params("layers") == 2 * d * h * e + 2 * d * k * e + 3 * d * f + 2 * d
    assert base.unit_params("layers.5.attention") + base.unit_params("layers.5.mlp") == base.unit_params("layers")


def test_the_figures_of_a_plan():
    counts = llama(*BASE).counts(T, 2)
    assert counts == {
        "params": 8_030_261_248,
        "block_params": 6_979_584_000,
        "flops": llama(*BASE).flops(T),
        "weight_bytes": 16_060_522_496,
        "kv_bytes_per_token": 131_072,  # 2 x 128 x 2 bytes x 8 heads x 32 layers
    }
