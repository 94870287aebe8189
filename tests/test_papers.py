"""Recipes and studies at the papers' scale: what the tables say, and that each can be planned without weights and network."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from pipeline import cli

from prunus.builders import make_plan
from prunus.study import file as studies
from prunus.study.plan import plan
from prunus.train import recipe as recipes
from prunus.train.estimate import planned
from prunus.train.shapes import Outline
from prunus.train.sweep import prefix

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
STUDIES = sorted((ROOT / "studies" / "paper").glob("*.yaml"))
UPDATE = 512 * 8192  # tokens of an update of the comparison study
NEAR = 0.01
LLAMA = "meta-llama/Llama-3.1-8B"


@cache
def study(name):
    return studies.read(ROOT / "studies" / "paper" / f"{name}.yaml")


@cache
def steps(name):
    return {row["step"]: row for row in plan(study(name), rate=1e15)["steps"]}


def recipe(name, *changes):
    return recipes.read(str(ROOT / "recipes" / "paper" / f"{name}.yaml"), changes)


@cache
def run_of(name):
    return planned(recipe(name), rate=1e15)


# -- all of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_planned(path):
    made = run_of(path.stem)
    assert made["tokens"] >= 3e10 and made["flops"] > 1e19 and made["memory"] > 1e10 and made["hours"] > 1


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_are_planned(path):
    rows = steps(path.stem).values()
    assert all(row["memory"] > 1e9 and row["flops"] > 0 and row["tokens"] > 0 for row in rows if row["kind"] != "evaluate")


def test_what_a_plan_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = cli("study", "plan", ROOT / "studies" / "paper" / "small-llms.yaml", "--rate", "1e17")
    assert code == 0, err
    header, parent = out.splitlines()[:2]
    assert header.split() == "step kind parameters tokens FLOPs hours memory disk".split()
    assert parent.split() == "P200 train 8.03 G 200 G 1.47e22 40.89 138.2 GB 224.8 GB".split()
    code, out, err = cli("plan", ROOT / "recipes" / "paper" / "efficientllm-457m-pruning.yaml", "--train", "--rate", "1e15")
    assert code == 0 and "about 4.52e20 FLOPs" in out and "memory of each of 1 devices: 84.81 GB" in out, err
    assert "note: the shape of HuggingFaceTB/SmolLM-1.7B is as published; the model itself is not here" in out


# -- Small LLMs: Pruning vs. Training from Scratch ------------------------------------------------------------------------

TABLE_1 = {  # layers, heads, stem, FFN, billions of parameters
    "D50": (16, 32, 4096, 14336, 4.5),
    "D62.5": (8, 32, 4096, 14336, 2.8),
    "D75": (4, 32, 4096, 14336, 1.9),
    "D81.3": (2, 32, 4096, 14336, 1.5),
    "W50": (32, 32, 3072, 9216, 4.5),
    "W62.5": (32, 32, 2432, 6144, 3.1),
    "W75": (32, 32, 1792, 6016, 2.0),
    "W81.3": (32, 32, 1536, 4736, 1.5),
    "FLAP": (32, 20, 4096, 6656, 4.5),
    "Wanda-U": (32, 32, 4096, 14336, 4.5),
    "Wanda-2:4": (32, 32, 4096, 14336, 4.5),
    "SparseGPT-U": (32, 32, 4096, 14336, 4.5),
    "SparseGPT-2:4": (32, 32, 4096, 14336, 4.5),
}
COUNTED = {"W62.5": 2.855, "W75": 2.082, "W81.3": 1.596}  # where the printed parameters are not those of the printed sizes
WIDTH = [  # table 5: ratio, stem, FFN; the authors' choice last
    *[("62.5", d, f) for d, f in ((2176, 7168), (2304, 6656), (2560, 6400), (2688, 5888), (2432, 6144))],
    *[("75", d, f) for d, f in ((1664, 6656), (1920, 5248), (2048, 4480), (1792, 6016))],
    *[("81.3", d, f) for d, f in ((1408, 5632), (1664, 3840), (1536, 4736))],
]
FLAP = [(16, 7168), (24, 6272), (28, 5888), (32, 5376), (20, 6656)]  # table 6: query heads, FFN
SHEARED = [  # table 7: stem, heads, FFN
    *[(3072, h, f) for h, f in ((16, 11008), (20, 10496), (24, 10112), (28, 9728), (32, 9216))],
    *[(3456, h, f) for h, f in ((16, 9216), (20, 8832), (24, 8448), (28, 7936), (32, 7552))],
]
TASKS = ["winogrande", "hellaswag", "piqa", "arc_challenge", "arc_easy", "sciq", "openbookqa", "boolq"]


def blocks(layers, heads, stem, ffn):
    """Parameters of the blocks' matrices by hand: a KV head for every four query heads of 128 dimensions."""
    return layers * (2 * stem * heads * 128 + 2 * stem * heads // 4 * 128 + 3 * stem * ffn)


@cache
def shapes(name, arm):
    """Name of a cut -> what it leaves of Llama-3.1-8B."""
    parent = Outline.of(LLAMA)
    return {
        cell.place["cut"]: make_plan(parent.config, parent.anatomy, cell.cut.request).target.anatomy
        for cell in study(name).of(arm)
    }


def test_table_1():
    left = shapes("small-llms", "P200-R50")
    assert list(left) == list(TABLE_1)
    for name, (layers, heads, stem, ffn, billions) in TABLE_1.items():
        anatomy, layer = left[name], left[name].shape.layers[0]
        sizes = (
            anatomy.shape.num_hidden_layers,
            layer.num_attention_heads,
            anatomy.shape.hidden_size,
            layer.intermediate_size,
        )
        assert sizes == (layers, heads, stem, ffn)
        assert anatomy.block_params == pytest.approx(blocks(layers, heads, stem, ffn), rel=NEAR)
        row = steps("small-llms")[f"P200-R50_cut={name}"]
        sparse = anatomy.matrix_params / 2 if name.startswith(("Wanda", "SparseGPT")) else 0
        assert row["params"] == anatomy.num_params
        assert anatomy.num_params - sparse == pytest.approx(COUNTED.get(name, billions) * 1e9, rel=NEAR + 0.05 / billions)


def test_the_sparse_rows_of_table_1():
    asked = {cell.place["cut"]: cell.cut for cell in study("small-llms").of("P200-R50")}
    found = {
        name: (cut.method, cut.ratio, cut.pattern) for name, cut in asked.items() if cut.method in ("wanda", "sparsegpt")
    }
    assert found == {
        "Wanda-U": ("wanda", 0.5, None), "Wanda-2:4": ("wanda", None, "2:4"),
        "SparseGPT-U": ("sparsegpt", 0.5, None), "SparseGPT-2:4": ("sparsegpt", None, "2:4"),
    }  # fmt: skip


def test_table_1_of_sheared_llama():
    masked, fresh = (steps("small-llms")[name]["params"] for name in ("P200-R50-sheared", "S50-sheared"))
    assert masked == fresh == pytest.approx(blocks(32, 32, 3456, 7552) + 2 * 128256 * 3456, rel=NEAR)


@pytest.mark.parametrize(
    "made",
    [recipe("small-llms-parent"), *(cell.recipe for cell in study("small-llms").cells)],
    ids=["recipe", *(cell.name for cell in study("small-llms").cells)],
)
def test_table_4(made):
    assert (made.data.seq_len, made.batch_tokens // made.data.seq_len) == (8192, 512)
    asked, schedule = made.optimizer, made.schedule
    assert (asked.weight_decay, asked.betas, asked.eps) == (0.01, (0.9, 0.95), 1e-8)
    assert (schedule.kind, schedule.warmup, schedule.floor, schedule.start) == ("cosine", 0.05, 0.1, 0)
    if made.prune is None:  # section 3.1; no sweep tries rates while masks learn
        assert asked.lr == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]
    assert [Path(domain.folder).name for domain in made.data.domains] == ["dclm-baseline"]


def test_tokens_of_the_comparison_study():
    """P200, R50, S50 and S250, and that the last reads what the first two do: section 3.1."""
    rows, billions = steps("small-llms"), {"P200": 200, "P200-R50": 50, "S50": 50, "S250": 250}
    for cell in study("small-llms").cells:
        asked = 1e9 * billions[cell.arm.removesuffix("-sheared")]
        assert rows[cell.name]["tokens"] == pytest.approx(asked, rel=1e-3) and rows[cell.name]["tokens"] % UPDATE == 0
    all_of_it = study("small-llms").of("S250")[0].recipe.data.range
    parent, retrained = (study("small-llms").of(arm)[0].recipe for arm in ("P200", "P200-R50"))
    assert {name: part.tokens for name, part in all_of_it.items()} == {"parent": parent.tokens, "retrain": retrained.tokens}
    assert parent.data.range == "parent" and retrained.data.range == "retrain"
    assert recipe("small-llms-parent").tokens == parent.tokens


def test_the_parent_takes_in_the_study_what_it_takes_alone():
    alone, among = run_of("small-llms-parent"), steps("small-llms")["P200"]
    assert [among[name] for name in ("tokens", "flops", "memory", "params")] == [
        alone[name] for name in ("tokens", "flops", "memory", "params")
    ]


def test_flops_of_a_run_by_hand():
    """Three times those of appendix F forward, at 8,192 tokens, and of the beginnings that try five rates."""
    run = study("small-llms").of("S50")[0].recipe
    forward = 2 * 8192 * (blocks(16, 32, 4096, 14336) + 128256 * 4096) + 4 * 8192**2 * 32 * 128 * 16
    tokens = run.tokens + 5 * prefix(run) * UPDATE
    assert steps("small-llms")["S50_cut=D50"]["flops"] == pytest.approx(3 * forward * tokens / 8192, rel=1e-6)


def test_text_of_the_comparison_study():
    """Appendices D.2 and E: 1,024 and 128 windows to calibrate, 256 of each of four corpora to judge, all of 8,192 tokens."""
    for name in ("small-llms", "small-llms-search"):
        for cell in study(name).cells:
            if cell.cut is not None:
                text = cell.cut.calibration
                wanted = ("wikitext-103.jsonl", 1024) if "minitron" in cell.cut.method else ("c4.jsonl", 128)
                assert (text.text, text.windows, text.seq_len) == (*wanted, 8192)
    *texts, tasks = study("small-llms").file.evaluate
    judged = [text for part in texts for text in part.texts]
    assert judged == ["c4.jsonl", "wikitext-103.jsonl", "wikitext-2.jsonl", "cnn-dailymail.jsonl"]
    assert {(part.windows, part.seq_len) for part in texts} == {(256, 8192)} and tasks.tasks == TASKS


def test_tables_5_and_6():
    left = shapes("small-llms-search", "cut")
    wide = [(f"W{ratio}-{stem}", 32, stem, ffn) for ratio, stem, ffn in WIDTH]
    flap = [(f"FLAP-{heads}", heads, 4096, ffn) for heads, ffn in FLAP]
    assert list(left) == [name for name, *_ in (*wide, *flap)]
    for name, heads, stem, ffn in (*wide, *flap):
        layer = left[name].shape.layers[0]
        assert (layer.num_attention_heads, left[name].shape.hidden_size, layer.intermediate_size) == (heads, stem, ffn)
        assert left[name].block_params == pytest.approx(blocks(32, heads, stem, ffn), rel=NEAR)
        assert name[0] == "F" or 2 * stem <= ffn <= 4 * stem
    assert all(left[name].num_params == pytest.approx(4.5e9, rel=NEAR) for name, *_ in flap)


def test_table_7():
    arms = {cell.arm: cell.recipe.prune for cell in study("small-llms-search").cells if cell.recipe is not None}
    assert list(arms) == [f"sheared-{stem}-{heads}" for stem, heads, _ in SHEARED]
    for (stem, heads, ffn), part in zip(SHEARED, arms.values(), strict=True):
        sizes = {"hidden": stem, "kv_heads": heads // 4, "intermediate": ffn}
        assert part.target.sizes == sizes and part.masks.end == 1.0
        params = steps("small-llms-search")[f"sheared-{stem}-{heads}"]["params"]
        assert params == pytest.approx(blocks(32, heads, stem, ffn) + 2 * 128256 * stem, rel=NEAR)
        assert params == pytest.approx(4.5e9, rel=NEAR)


def test_what_was_chosen_is_what_is_retrained():
    searched, retrained = shapes("small-llms-search", "cut"), shapes("small-llms", "P200-R50")
    for chosen, name in (("W62.5-2432", "W62.5"), ("W75-1792", "W75"), ("W81.3-1536", "W81.3"), ("FLAP-20", "FLAP")):
        assert searched[chosen].shape == retrained[name].shape
    (sheared,) = study("small-llms").of("P200-R50-sheared")
    assert sheared.recipe.prune.target.sizes | {"kv_heads": 8} == {"hidden": 3456, "kv_heads": 8, "intermediate": 7552}


# -- EfficientLLM ---------------------------------------------------------------------------------------------------------

CORPORA = {"fineweb-edu": 220, "cosmopedia-v2": 28, "python-edu": 4, "open-web-math": 27.5}  # section 4, billions of tokens
TABLE_10 = {  # billions of tokens, rate, updates of warm-up, millions of tokens of an update; sequences have 2,048
    "134m-pruning": (50.3, 2e-3, 500, 2),
    "134m-continued": (500, 2e-3, 10000, 1),
    "457m-pruning": (72.1, 5e-4, 500, 1),
    "457m-continued": (500, 2e-3, 10000, 1),
    "1.1b-pruning": (36.7, 5e-4, 500, 1),
    "1.1b-continued": (500, 5e-4, 10000, 1),
}
FIFTY = ("tokens=50000000000", "schedule.warmup=0.209718")  # as the files say it of the rows that have 50 B, too


def check_table_10(made, tokens, rate, warmup, millions):
    assert made.tokens == pytest.approx(tokens * 1e9) and made.optimizer.lr == rate and made.data.seq_len == 2048
    assert made.batch_tokens == pytest.approx(millions * 1e6, rel=0.05)
    assert made.schedule.warmup * made.steps == pytest.approx(warmup, abs=0.5)
    assert {Path(domain.folder).name: domain.weight for domain in made.data.domains} == CORPORA


def test_table_10():
    files = {path.stem.removeprefix("efficientllm-") for path in RECIPES if path.stem.startswith("efficientllm-")}
    assert files == set(TABLE_10)
    for name, row in TABLE_10.items():
        check_table_10(recipe(f"efficientllm-{name}"), *row)
    for name in ("457m-continued", "1.1b-continued"):
        check_table_10(recipe(f"efficientllm-{name}", *FIFTY), 50, *TABLE_10[name][1:])
    check_table_10(
        recipe("efficientllm-1.1b-continued", "tokens=320000000000", "schedule.warmup=0.032768"), 320, 5e-4, 10000, 1
    )


@pytest.mark.parametrize(("size", "source"), [("134M", "SmolLM-360M"), ("457M", "SmolLM-1.7B"), ("1.1B", "SmolLM-1.7B")])
def test_pruning_ends_where_training_goes_on(size, source):
    """Section 4: what each is cut out of; and the size of the model that goes on, which is table 8's."""
    pruning, continued = (recipe(f"efficientllm-{size.lower()}-{stage}") for stage in ("pruning", "continued"))
    assert pruning.model.source == f"HuggingFaceTB/{source}" and continued.model.source == f"EfficientLLM-{size}"
    shape = Outline.of(continued.model.source).anatomy
    left = run_of(f"efficientllm-{size.lower()}-pruning")["pruning"]["params"]
    assert left == pytest.approx(pruning.prune.target.params, rel=NEAR)
    assert left == pytest.approx(shape.num_params, rel=0.035 if size == "134M" else NEAR)
    assert (pruning.prune.pace.prune, pruning.prune.pace.train) == (1, 9)  # appendix C.3


def test_table_8():
    sizes = {"134M": (757, 966, 5, 32), "457M": (1195, 3006, 19, 24), "1.1B": (2048, 4870, 24, 24)}
    for name, wanted in sizes.items():
        shape = Outline.of(f"EfficientLLM-{name}").anatomy.shape
        layer = shape.layers[0]
        found = shape.hidden_size, layer.intermediate_size, layer.num_attention_heads, shape.num_hidden_layers
        assert found == wanted and shape.head_dim == 64


def test_table_1_of_efficientllm():
    made, rows = study("efficientllm"), steps("efficientllm")
    small = (
        "direct-hidden direct-source searched sheared-hidden sheared-source few-shot unified unified-second-order".split()
    )
    sizes = dict.fromkeys(small, 457e6)
    sizes |= {f"{arm}-llama2": 3.3e9 for arm in ("unified", "llm-pruner")}
    sizes |= {f"{arm}-qwen2.5": 5.2e9 for arm in ("unified", "llm-pruner")}
    assert {cell.arm for cell in made.cells} == set(sizes)
    for arm, params in sizes.items():
        assert rows[arm]["params"] == pytest.approx(params, rel=NEAR) and rows[arm]["tokens"] == pytest.approx(5e9, rel=1e-3)
    assert made.file.compare[0].arms == small
    (asked,) = made.file.evaluate
    assert set(asked.tasks) == set(TASKS) - {"sciq"}
    recipes_ = {cell.arm: cell.recipe for cell in made.cells}
    assert all(one.batch_tokens == 2**20 and one.data.seq_len == 2048 for one in recipes_.values())
    for arm in small:
        assert {Path(domain.folder).name: domain.weight for domain in recipes_[arm].data.domains} == CORPORA


def test_stages_of_table_1_of_efficientllm():
    """A billion tokens of cuts and masks, 128 samples at once, 4,000 updates of the 7 B models: section 5.1, the table's title."""
    parts = {cell.arm: (cell.recipe, cell.recipe.prune) for cell in study("efficientllm").cells if cell.recipe.prune}
    for arm in ("unified", "unified-second-order"):
        assert parts[arm][1].pace.end * 5e9 == 1e9 and parts[arm][1].saliency.metric == "second"
    for arm in ("sheared-hidden", "sheared-source"):
        assert parts[arm][1].masks.end * 5e9 == 1e9
    for arm in ("unified-llama2", "unified-qwen2.5"):
        asked, part = parts[arm]
        assert part.pace.end * asked.steps == pytest.approx(4000, abs=2)
    assert parts["few-shot"][1].pace.samples == 128
    assert parts["unified-second-order"][1].repair.kind == "least-squares" and parts["unified"][1].repair.kind == "none"
