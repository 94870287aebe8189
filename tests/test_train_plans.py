"""Before a run: shapes and their fresh weights, the rate by trying, what it will take."""

from __future__ import annotations

import json

import pipeline
import pytest
import tiny
import torch
from pipeline import cli
from training import (
    SEQ,
    Killed,
    asked,
    data,
    other_data,
    run,
    same,
    tiny_shape,
    weights,
    weights_of,
)

from prunus.anatomy import Anatomy
from prunus.errors import UserError
from prunus.hf import target_for
from prunus.keep import Keep
from prunus.ledger import Ledger
from prunus.study import file as studies
from prunus.study import run as running
from prunus.study.plan import plan
from prunus.train import estimate, sweep
from prunus.train import recipe as recipes
from prunus.train.learner import Learner, boundaries, recompute_
from prunus.train.opening import prepare as opened
from prunus.train.shapes import SHAPES, Outline, config_of, fresh, released

# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_named_shapes_can_be_built(name):
    config = config_of(name, 300)
    assert config.model_type == "llama" and config.tie_word_embeddings


@pytest.mark.parametrize("params", [3_148_224, 10_000_000, 60_000_000])
def test_a_shape_is_scaled_to_a_size(params):
    """Within one per cent, with the same query heads a group and about the same FFN for the stem; its own size changes nothing."""
    config = config_of("nano", 300, params)
    assert abs(Anatomy.of(config).num_params / params - 1) <= 0.01
    assert config.num_attention_heads == 3 * config.num_key_value_heads and config.num_hidden_layers == 6
    assert config.hidden_size == 96 * config.num_key_value_heads and config.head_dim == 32
    assert 0.5 < config.intermediate_size / config.hidden_size / (512 / 192) < 2
    if params == 3_148_224:
        assert config.to_dict() == config_of("nano", 300).to_dict()
    fresh(config, init="standard", seed=0, dtype=torch.float32)


def test_a_size_that_no_width_has_is_refused():
    with pytest.raises(UserError, match=r"no width of this shape comes within 1 % of 9,000 parameters; change the shape"):
        config_of("nano", 300, 9_000)
    folder, _, _ = pipeline.saved("per-layer")
    with pytest.raises(UserError, match="only a shape whose layers are alike can be scaled"):
        config_of(str(folder), 300, 9_000)
    with pytest.raises(UserError, match="target_params scales a shape; a source's weights have their sizes"):
        asked(model={"source": str(folder), "target_params": 5})


def test_fresh_weights_of_a_checkpoints_shape(tmp_path):
    """What a cut model is compared with: its very sizes, its tokenizer, and none of its weights."""
    folder, _, _ = pipeline.saved("per-layer")
    run(tmp_path / "run", asked(model={"shape": str(folder)}, tokens=2 * 4 * SEQ))
    ours, theirs = weights(tmp_path / "run"), weights_of(folder)
    matrices = [name for name in theirs if name.endswith("_proj.weight")]
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert all(tiny.relative(ours[name], theirs[name]) > 0.5 for name in matrices)
    assert asked(model={"shape": str(folder)}).named()["model"]["shape"] == folder.name
    with pytest.raises(UserError, match="model: a shape brings no tokenizer"):
        opened(asked(model={"shape": "nano"}), tmp_path / "other")


def test_depth_scaled_weights():
    config = tiny.tiny_config("llama")
    plain, scaled = (fresh(config, init=init, seed=1, dtype=torch.float32) for init in ("standard", "depth-scaled"))
    scale = (2 * tiny.LAYERS) ** -0.5
    for name, p in plain.named_parameters():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.allclose(scaled.get_parameter(name), p * scale if writes else p)


# -- the rate by trying -----------------------------------------------------------------------------------------------------


def test_a_sweep_takes_the_lowest_loss_and_is_on_the_ledger(tmp_path):
    recipe, said = asked(optimizer__lr=[1e-9, 1e-2], validate__every=0), []
    figures = run(tmp_path / "run", recipe, say=said.append)["figures"]
    assert {"note": "the best rate, 0.01, is the highest that was tried; a higher one may be better"} in said
    assert figures["lr"] == 1e-2 and figures["sweep"]["steps"] == 8 == sweep.prefix(recipe)
    ledger = Ledger.read(tmp_path / "run" / "ledger.json")
    assert [stage.name for stage in ledger.stages] == ["lr sweep", "run"]
    assert ledger.stages[0].tokens == 2 * ledger.stages[1].tokens == 2 * 8 * 4 * SEQ
    assert ledger.stages[0].flops["train"] == 2 * ledger.stages[1].flops["train"]
    run(tmp_path / "plain", asked(optimizer__lr=1e-2, validate__every=0))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))


def test_beginnings_are_on_the_ledger_by_the_shares_that_they_read(tmp_path):
    domains = [{"folder": str(data()), "name": "web"}, {"folder": str(other_data()), "name": "back"}]
    mixing = {"references": {"web": 0.0, "back": 5.0}, "temperature": 0.1}
    recipe = asked(data__domains=domains, data__mixing=mixing)
    feeds = opened(recipe, tmp_path / "run").feeds
    before = feeds.training.take(0, 16).ranges
    feeds.remix_(4, {"web": 5.0, "back": 5.0})
    tried, own = Ledger.model_validate(feeds.ledger(recipe, 16, {"train": 1}, 1, None, [16, 16])).stages
    assert [at for at, _ in tried.history] == [0] and [at for at, _ in own.history] == [0, 4]
    for domain in ("web", "back"):
        read = sum(end - first for name, first, end in before if name == domain)
        assert tried.consumed[domain].size == read != own.consumed[domain].size


def test_domains_that_mixing_may_use_up_are_told_beforehand(tmp_path):
    """The budget fits the shares that the run begins with; those that the losses make may end it in its middle."""
    domains = [{"folder": str(data()), "name": "web"}, {"folder": str(other_data()), "name": "back"}]
    mixing = {"references": {"web": 0.0, "back": 0.0}}
    small = opened(asked(data__domains=domains, data__mixing=mixing), tmp_path / "small").feeds
    assert small.notes == ()
    tokens = (int(small.training.sizes.max()) // 4 + 2) * 4 * SEQ  # more than either domain holds, less than both
    large = asked(data__domains=domains, data__mixing=mixing, tokens=tokens)
    feeds = opened(large, tmp_path / "large").feeds
    assert len(feeds.notes) == 2
    assert "domain 'web' may be used up" in feeds.notes[0] and "2 epochs would do" in feeds.notes[0]
    feeds.remix_(4, {"web": 100.0, "back": 0.0})
    with pytest.raises(UserError, match="domain 'web' is used up"):
        feeds.training.take(4, tokens // SEQ - 4)
    twice = asked(data__domains=domains, data__mixing=mixing, tokens=tokens, data__epochs=2)
    assert opened(twice, tmp_path / "twice").feeds.notes == ()


def test_a_rate_that_ends_early_is_on_the_ledger_as_far_as_it_was_read(tmp_path, monkeypatch):
    read = []

    def train_(training, steps, each):
        """Losses of a high rate are no number from the third update on."""
        read.append(2 if training.schedule.peak > 0.1 else steps)
        for _ in range(read[-1]):
            training.last = {"loss": 1.0}
            each(training)
        if read[-1] < steps:
            raise UserError("the loss of step 3 is no number")

    monkeypatch.setattr(sweep, "train_", train_)
    recipe = asked(optimizer__lr=[0.01, 0.9], validate__every=0)
    run(tmp_path / "run", recipe)
    tried, own = Ledger.read(tmp_path / "run" / "ledger.json").stages
    assert read == [8, 2] and (tried.tokens, tried.flops["train"]) == (own.tokens * 11 // 8, own.flops["train"] * 11 // 8)
    assert sweep.swept(recipe, tmp_path / "run", lambda rate: None, lambda line: None).read == [8, 3]  # remembered


def test_rates_that_were_tried_are_not_tried_again(tmp_path):
    tried = []

    def begin(rate):
        tried.append(rate)
        raise Killed

    (tmp_path / "sweep.json").write_text(json.dumps({"steps": 8, "losses": [[1e-5, 2.0], [3e-5, None]], "cut": [[3e-5, 1]]}))
    with pytest.raises(Killed):
        sweep.swept(asked(optimizer__lr="sweep"), tmp_path, begin, lambda line: None)
    assert tried == [1e-4]


def test_the_best_rate_by_hand():
    assert sweep.Sweep(1, {1e-3: 2.0, 1e-5: 2.0, 1e-4: None}).best == 1e-5
    with pytest.raises(UserError, match="the loss is no number at any of"):
        _ = sweep.Sweep(1, {1e-3: None}).best


def test_a_beginning_goes_past_the_warm_up():
    """5 % of 10,000 steps are warm-up; 200 more follow. A short run is tried whole."""
    long = asked(tokens=10_000 * 4 * SEQ)
    assert sweep.prefix(long) == 700 and sweep.prefix(asked()) == 8


# -- what a run will take -------------------------------------------------------------------------------------------------


def test_a_plan_by_hand():
    """nano in float32: weights, gradients and two moments are four bytes a parameter each; speed is rate over FLOPs."""
    recipe = recipes.read("scratch")
    anatomy = Anatomy.of(config_of("nano", 0))
    found = estimate.estimate(recipe, anatomy, rate=1e9)
    assert found.weights == found.gradients == 4 * anatomy.num_params and found.moments == 8 * anatomy.num_params
    assert found.tokens_per_s == pytest.approx(1e9 * 256 / (3 * anatomy.flops(256)))
    assert found.hours == pytest.approx(4_000_000 / found.tokens_per_s / 3600)
    shared = estimate.estimate(recipe, anatomy, devices=4, rate=1e9)
    assert shared.moments == 2 * anatomy.num_params and shared.activations == found.activations
    assert shared.tokens_per_s == pytest.approx(4 * found.tokens_per_s)


@pytest.mark.parametrize("precision", ["float32", "bfloat16-autocast", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ({"hidden_size": 64, "num_key_value_heads": 2, "intermediate_size": 160}, []),
        ({"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 512}, ["data.separate_documents=true"]),
        ({"hidden_size": 64, "num_key_value_heads": 2, "intermediate_size": 160}, ["checkpoint_activations=true"]),
        ({"hidden_size": 64, "num_key_value_heads": 2, "intermediate_size": 160, "heads": (0, 2, 3, 5, 6)}, []),
    ],
)
def test_what_is_kept_for_the_way_back(shape, more, precision):
    """Against what autograd saves, each storage once. The formula leaves out what all positions share, such as rotary tables."""
    recipe = recipes.read("scratch", [f"precision={precision}", "data.seq_len=64", "batch_tokens=128", *more])
    config = config_of(tiny_shape() | {name: size for name, size in shape.items() if name != "heads"}, 0)
    if "heads" in shape:  # three of them read one KV head, two the other
        heads = Keep({f"layers.{i}.heads": shape["heads"] for i in range(config.num_hidden_layers)})
        config = target_for(config, Anatomy.of(config), heads).config
    model = fresh(
        config, init="standard", seed=0, dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32
    ).train()
    if recipe.checkpoint_activations:
        recompute_(model)
    parameters, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids, starts = tiny.tokens(2, 65), torch.zeros(2, 64, dtype=torch.bool)
    starts[:, [0, 20]] = True
    positions = boundaries(starts) if recipe.data.separate_documents else {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Learner(model, precision=precision)(ids[:, :-1], ids[:, 1:], **positions)
    found = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    anatomy = Anatomy.of(config)
    said = estimate.kept(anatomy, recipe, 2 * 64)
    if recipe.checkpoint_activations:  # the block that is computed again is not there yet
        block = 128 * estimate._kept_by(anatomy.shape.layers[0], anatomy.shape, recipe)
        copies = 2 * sum(t.numel for t in anatomy.tensors.values() if t.layer == 0 and t.is_matrix)
        said -= block + (copies if precision == "bfloat16-autocast" else 0)
    assert said == pytest.approx(found, rel=0.02)


def test_a_plan_counts_the_rates_that_are_tried():
    named, swept = (estimate.planned(recipes.read("scratch", [f"optimizer.lr={lr}"]), rate=1e9) for lr in ("1e-3", "sweep"))
    steps = sweep.prefix(recipes.read("scratch"))
    assert swept["flops"] / named["flops"] == pytest.approx(1 + 5 * steps * 8192 / 4_000_000)
    assert swept["hours"] / named["hours"] == pytest.approx(swept["flops"] / named["flops"])
    assert (
        swept["notes"] == [f"5 rates are tried on {steps} updates each; FLOPs and hours have them in"] and not named["notes"]
    )


def test_a_plan_says_where_a_run_does_not_fit():
    code, out, err = cli("plan", "scratch", "--train", "--memory", "0.01", "--rate", "1e9", "--json")
    assert code == 0 and not json.loads(out)["fits"] and "it needs" in json.loads(out)["mend"], err
    code, out, err = cli("plan", "scratch", "--train", "--set", "model.shape=micro", "--rate", "1e9")
    assert code == 0 and "tokens/s" in out, err
    code, _, err = cli("plan", "scratch", "--train", "--devices", "0")
    assert code == 2 and "devices: 0 are too few" in err
    code, _, err = cli("plan", pipeline.folder())
    assert code == 2 and "Missing option '--method'" in err


# -- shapes of models that are not here -----------------------------------------------------------------------------------

RELEASED = "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    ("name", "params"),
    [  # as counted from the files of the models; of EfficientLLM as its table 8 rounds them
        (RELEASED, 8_030_261_248),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("HuggingFaceTB/SmolLM-1.7B", 1_711_376_384),
        ("HuggingFaceTB/SmolLM-360M", 361_821_120),
        ("EfficientLLM-134M", pytest.approx(134e6, rel=0.035)),  # one KV head for every query head, which it shares
        ("EfficientLLM-457M", pytest.approx(457e6, rel=0.001)),
        ("EfficientLLM-1.1B", pytest.approx(1.1e9, rel=0.02)),
    ],
)
def test_released_shapes_have_the_parameters_that_are_published(name, params):
    assert Outline.of(name).anatomy.num_params == params and name in released()


def test_a_model_that_is_here_goes_before_its_published_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Outline.of(RELEASED)
    assert found.note == f"the shape of {RELEASED} is as published; the model itself is not here"
    (tmp_path / RELEASED).mkdir(parents=True)
    with pytest.raises(UserError, match=r"Llama-3\.1-8B: no config\.json in this folder"):
        Outline.of(RELEASED)
    with pytest.raises(UserError, match="meta-llama/Llama-9: no such file or folder"):
        Outline.of("meta-llama/Llama-9")


def test_a_shape_is_enough_for_a_plan_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"SmolLM-1\.7B: no such file or folder"):
        opened(recipes.read("continue", ["model.source=HuggingFaceTB/SmolLM-1.7B"]), tmp_path / "run")
    written = {"name": "x", "arms": {"a": {"model": RELEASED}}, "evaluate": [{"texts": ["wiki.txt"]}]}
    (tmp_path / "x.yaml").write_text(json.dumps(written), encoding="utf-8")
    study = studies.read(tmp_path / "x.yaml")
    assert plan(study, rate=1e15)["published"] == [RELEASED]
    with pytest.raises(UserError, match=r"Llama-3\.1-8B: no such file or folder"):
        running.run(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()
