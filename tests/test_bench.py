"""What models cost to run: counts by hand, times from real runs, memory of a process of its own, and what is refused."""

import json
import shutil

import pipeline
import pytest
import torch
from pipeline import cli
from safetensors.torch import load_file

from prunus import bench, measure
from prunus.errors import UserError
from prunus.source import Source

ASKED = bench.Asked((1,), (1, 2), (8,), new_tokens=3, repeats=2)


def test_counts_by_hand():
    source = Source.open(str(pipeline.folder("llama")))
    found, config = bench.counted(source, "bfloat16", 10), source.config
    tensors = {name: t.numel() for name, t in load_file(pipeline.folder("llama") / "model.safetensors").items()}
    assert found["params"] == sum(tensors.values()) and found["weight_bytes"] == 2 * found["params"]
    outside = tensors["model.embed_tokens.weight"] + tensors["lm_head.weight"]
    assert found["params_without_embeddings"] == found["params"] - outside
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    assert found["kv_bytes_per_token"] == kv and found["flops_per_token"] == found["prefill_flops"] / 10
    tied = bench.counted(Source.open(str(pipeline.folder("llama_tied"))), "float32", 10)
    assert tied["params_without_embeddings"] == found["params_without_embeddings"]


def test_models_are_timed_in_turns(tmp_path):
    one, other = (str(pipeline.folder(case)) for case in ("llama", "llama_tied"))
    log = tmp_path / "log.jsonl"
    found = bench.run([one, other], bench.Asked(**(vars(ASKED) | {"train": True})), record=log)
    for row in found["models"]:
        assert [(c["threads"], c["batch"], c["context"]) for c in row["cells"]] == [(1, 1, 8), (1, 2, 8)]
        for cell in row["cells"]:
            for name in ("first_token_ms", "decode_ms", "update_ms"):
                assert 0 < cell[name]["least"] <= cell[name]["median"] <= cell[name]["most"]
            assert cell["prefill_tokens_per_s"] == pytest.approx(8000 * cell["batch"] / cell["first_token_ms"]["median"])
        assert row["memory"]["peak_bytes"] >= row["memory"]["libraries_bytes"] > 1e7 and row["zeros"] is None
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line["kind"] for line in lines] == ["measure"] * 2 and lines[0]["figures"]["beside"] == [
        row["model"] for row in found["models"]
    ]
    assert str(pipeline.scratch()) not in log.read_text(encoding="utf-8")


def test_turns_turn():
    seen = []
    runs = [lambda k=k: (seen.append(k), (float(k),))[1] for k in range(3)]
    found = bench.in_turns(runs, 3)
    assert seen == [0, 1, 2, 0, 1, 2, 1, 2, 0, 2, 0, 1] and found == [[(0.0,)] * 3, [(1.0,)] * 3, [(2.0,)] * 3]


def test_timing_an_update_moves_nothing():
    model = pipeline.model("llama", dtype=torch.float32)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    assert bench.train_s(model, torch.randint(3, 200, (2, 9))) > 0
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not model.training and all(p.grad is None for p in model.parameters())
    threads = torch.get_num_threads()
    with bench.on_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


def test_zeros_are_told_and_their_worth_on_disk():
    source = Source.open(str(pipeline.folder("llama")))
    model = pipeline.model("llama", dtype=torch.float32)
    assert bench.zeros(model, source.anatomy) is None
    generator = torch.Generator().manual_seed(0)
    for name, tensor in source.anatomy.tensors.items():
        if tensor.layer is not None and tensor.is_matrix:
            weight = model.get_parameter(name).data
            weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    found = bench.zeros(model, source.anatomy)
    assert found["share"] == pytest.approx(0.5, abs=0.05) and found["packed_share"] < 0.9
    row = {"model": "m", "zeros": found, "widths": [{"name": "intermediate_size", "size": 757, "better": 768, "ratio": 0.5}]}
    zeros, width = bench._notes([row])
    assert (
        "bring no speed" in zeros
        and "intermediate_size 757 is slow here: a product as wide as 768 takes 50% of its time" in width
    )


WRONG = {
    "threads 0": ({"threads": (0,)}, "threads: 0; give numbers from 1 on"),
    "many threads": ({"threads": (4096,)}, "threads: 4096 are more than the"),
    "no repeats": ({"repeats": 0}, "both must be at least 1"),
    "long": ({"contexts": (63,)}, "63 tokens and 3 new ones are more than the 64 positions"),
    "nothing to learn": ({"contexts": (8, 1), "train": True}, "give 2 or more, or drop --train"),
    "dtype": ({"dtype": "float31"}, "float32"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_cells(what):
    changes, message = WRONG[what]
    with pytest.raises(UserError, match=message):
        bench.Asked(**(vars(ASKED) | changes)).checked([Source.open(str(pipeline.folder("llama")))])


def test_no_update_of_fewer_bits_is_timed(monkeypatch):
    monkeypatch.setattr(Source, "is_quantized", True)
    with pytest.raises(UserError, match="holds fewer bits, which have no gradients; drop --train"):
        bench.Asked(**(vars(ASKED) | {"train": True})).checked([Source.open(str(pipeline.folder("llama")), quantized=True)])


def test_on_the_command_line(tmp_path):
    wrong = ("measure", pipeline.folder(), "--threads", "1,x")
    assert cli(*wrong)[::2] == (2, "prunus: --threads: 'x' is not a whole number; give some with commas, such as 1,2\n")
    cell = ("--threads", 1, "--batches", 1, "--contexts", 8, "--new-tokens", 2, "--repeats", 1)
    code, out, _ = cli("measure", pipeline.folder(), "--baseline", pipeline.folder("llama_tied"), *cell)
    assert code == 0 and "1 x 1 x 8" in out and "is so many times as fast as" in out and "peak memory" in out
    folder = tmp_path / pipeline.folder().name
    shutil.copytree(pipeline.folder(), folder)
    out = cli("measure", pipeline.folder(), "--baseline", folder, *cell)[1]
    assert f"{folder.name} is so many times as fast as {folder.name} (2)" in out


# -- widths ---------------------------------------------------------------------------------------------------------------


def clock(monkeypatch, rate):
    monkeypatch.setattr(measure, "_product_s", lambda width, hidden, dtype: width / rate(width))


def test_the_least_multiple_that_is_fast(monkeypatch):
    """A machine that likes multiples of 16, and one that does not care."""
    clock(monkeypatch, lambda width: 100.0 if width % 16 == 0 else 60.0)
    assert measure.multiple(64, 256, torch.float32) == 16
    clock(monkeypatch, lambda width: 100.0 + width / 1000)
    assert measure.multiple(64, 256, torch.float32) == 1


def test_slow_widths_are_those_that_a_wider_product_beats(monkeypatch):
    source = Source.open(str(pipeline.folder("llama")))  # stem 32, FFN 24
    clock(monkeypatch, lambda width: 100.0 if width % 32 == 0 else 50.0)
    stem, ffn = measure.slow_widths(source.anatomy.shape, torch.float32)
    assert (stem.size, stem.better, ffn.size, ffn.better) == (32, None, 24, 32)
    assert ffn.ratio == pytest.approx((32 / 100) / (24 / 50))
    clock(monkeypatch, lambda width: 100.0)
    assert all(width.better is None for width in measure.slow_widths(source.anatomy.shape, torch.float32))


def test_products_are_really_timed():
    assert 0 < measure._product_s(24, 32, torch.float32, seconds=0.01) < 1


def test_a_cut_to_what_is_fast(tmp_path, monkeypatch):
    clock(monkeypatch, lambda width: 100.0 if width % 8 == 0 else 60.0)
    out = tmp_path / "out"
    arguments = ("prune", pipeline.folder(), "-m", "magnitude-sp", "-r", 0.3, "--multiple-of")
    assert cli(*arguments, "auto", "-o", out)[0] == 0
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    sizes = config["intermediate_size"]
    per_layer = config.get("per_layer_config", {})
    widths = [v.get("intermediate_size", sizes) for v in per_layer.values()] if isinstance(per_layer, dict) else []
    assert all(width % 8 == 0 for width in widths or [sizes])
    manifest = json.loads((out / "prunus.json").read_text(encoding="utf-8"))
    assert manifest["method"]["request"]["multiple_of"] == 8
    assert cli(*arguments, "some", "-o", tmp_path / "no")[::2] == (
        2,
        "prunus: --multiple-of: some is no whole number, and not auto\n",
    )


def test_memory_is_the_model_s_and_not_of_who_asked():
    """On Linux a process that is started counts its parent's peak as its own, as getrusage tells it."""
    held = torch.ones(250_000_000)  # a gigabyte
    found = bench.peak_bytes(str(pipeline.folder("llama", 128)), "float32", 1, 8, 2)
    assert found is not None and found["peak_bytes"] < held.nbytes
