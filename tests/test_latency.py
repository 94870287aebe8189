"""The latency table: keys, parts, sums, what is written and read back. No test depends on how fast this machine is."""

from __future__ import annotations

import json
import re

import pipeline
import pytest
import tiny
import torch
from pipeline import cli

from prunus import latency
from prunus.anatomy import Anatomy
from prunus.errors import UserError
from prunus.latency import Table, Timing
from prunus.shape import LayerShape

KEY = {"cpu": "x", "threads": 1, "device": "cpu", "dtype": "float32", "torch": "1", "transformers": "2", "prompt_tokens": 8}


def anatomy_of(case="llama"):
    return Anatomy.of(tiny.tiny_config(case))


def mixed(anatomy):
    """Layers 0 and 2 alike, layer 1 with half the heads and no MLP."""
    first = anatomy.shape.layers[0]
    half = LayerShape(first.num_attention_heads // 2, first.num_key_value_heads // 2, 0)
    return anatomy.with_shape(anatomy.shape.with_layers((first, half, first)))


def fake(seen):
    """A probe whose answers are powers of ten, so that a wrong sum shows."""

    def probe(config, anatomy, layer, dtype, prompt_tokens):
        seen.append((layer, dtype, prompt_tokens))
        return Timing(10.0 ** len(seen), 1.0), Timing(0.5, 0.25)

    return probe


# -- parts --------------------------------------------------------------------------------------------------------------


def test_a_model_is_the_sum_of_its_parts():
    anatomy = mixed(anatomy_of())
    counts = latency.parts(anatomy)
    assert sorted(counts.values()) == [1, 1, 2] and sum(counts.values()) == 4
    entries = {
        latency.layer_part(anatomy, 0): Timing(3.0, 0.3),
        latency.layer_part(anatomy, 1): Timing(50.0, 5.0),
        latency.outer_part(anatomy): Timing(700.0, 70.0),
    }
    found = latency.estimate(anatomy, entries)
    assert (found.prefill_ms, found.decode_ms) == (pytest.approx(756.0), pytest.approx(75.6))
    for part in entries:
        assert latency.estimate(anatomy, {k: v for k, v in entries.items() if k != part}) is None


def test_every_size_that_matters_is_in_the_name():
    anatomy = anatomy_of()
    names = {latency.layer_part(anatomy, 0), latency.layer_part(mixed(anatomy), 1)}
    names |= {latency.layer_part(anatomy.with_flags("mlp_bias"), 0), latency.layer_part(anatomy_of("qwen3"), 0)}
    names |= {latency.layer_part(anatomy_of("llama_mqa"), 0)}
    assert len(names) == 5
    assert latency.outer_part(anatomy) == latency.outer_part(mixed(anatomy))  # layers do not change what is around them


def test_what_is_missing_is_measured_once(tmp_path):
    anatomy, seen = mixed(anatomy_of()), []
    table = Table.open(KEY, tmp_path / "t.json")
    steps = []
    table = latency.filled(table, None, anatomy, probe=fake(seen), progress=lambda done, total: steps.append((done, total)))
    assert seen == [(0, "float32", 8), (1, "float32", 8)] and steps == [(0, 2), (1, 2), (1, 2), (2, 2)]
    assert latency.estimate(anatomy, table.entries).prefill_ms == pytest.approx(2 * 10 + 100 + 0.5)
    again = latency.filled(Table.open(KEY, tmp_path / "t.json"), None, anatomy, probe=fake(seen))
    assert len(seen) == 2 and again.entries == table.entries
    other_head = anatomy.with_shape(type(anatomy.shape)(32, 8, 99, False, anatomy.shape.layers[:1]))
    assert latency.missing_layers(other_head, table.entries) == [0]  # only what lies around the layers


# -- the file -----------------------------------------------------------------------------------------------------------


def test_round_trip_and_keys(tmp_path):
    path = tmp_path / "deep" / "t.json"
    Table.open(KEY, path).saved({"a": Timing(1.5, 0.25)})
    assert Table.open(KEY, path).entries == {"a": Timing(1.5, 0.25)}
    for name, other in (("cpu", "y"), ("threads", 2), ("dtype", "bfloat16"), ("torch", "3"), ("prompt_tokens", 9)):
        assert Table.open(KEY | {name: other}, path).entries == {}, name
    Table.open(KEY | {"threads": 2}, path).saved({"b": Timing(1.0, 1.0)})
    assert Table.open(KEY, path).entries == {"a": Timing(1.5, 0.25)}
    assert [p.name for p in path.parent.iterdir()] == ["t.json"]


def test_what_another_process_wrote_meanwhile_stays(tmp_path):
    path = tmp_path / "t.json"
    mine, other = Table.open(KEY, path), Table.open(KEY, path)
    other.saved({"theirs": Timing(1.0, 1.0)})
    assert set(mine.saved({"mine": Timing(2.0, 2.0)}).entries) == {"mine", "theirs"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a latency table of format 1"),
        ('{"format": 2, "tables": {}}', "not a latency table of format 1"),
    ],
)
def test_a_file_that_is_no_table(tmp_path, text, message):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"t.json: .*{message}.*; delete it"):
        Table.open(KEY, path)


def test_an_entry_that_is_none(tmp_path):
    path = tmp_path / "t.json"
    Table.open(KEY, path).saved({"a": Timing(1.0, 1.0)})
    data = json.loads(path.read_text())
    next(iter(data["tables"].values()))["entries"]["a"] = {"prefill": 1}
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="an entry that is none; delete it"):
        Table.open(KEY, path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        Table(tmp_path / "file" / "t.json", KEY, {}).saved({"a": Timing(1.0, 1.0)})


def test_the_key_names_what_a_time_depends_on(monkeypatch):
    assert set(latency.key("float32")) == set(KEY)
    assert latency.key("float32") != latency.key("bfloat16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert latency.key("float32")["threads"] == 99
    assert latency.prompt_tokens(None) == 256 and latency.prompt_tokens(10_000) == 256 and latency.prompt_tokens(64) == 55


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "own"))
    assert latency.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PRUNUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert latency.cache_folder() == tmp_path / "xdg" / "prunus"
    monkeypatch.setattr("sys.platform", "darwin")
    assert latency.cache_folder().parts[-3:] == ("Library", "Caches", "prunus")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    monkeypatch.setattr("sys.platform", "win32")
    assert latency.cache_folder() == tmp_path / "local" / "prunus"


# -- measuring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama", "llama_tied", "gemma2", "olmo", "phi", "gpt_neox", "seed_oss_bias"])
def test_a_probe_is_copies_of_one_layer(case):
    """The parameters of the probe, and of embedding and head, are those of the source."""
    config = tiny.tiny_config(case)
    anatomy = Anatomy.of(config)
    model = latency.built(config, anatomy, 1, 5, "float32")
    own = sum(t.numel for t in anatomy.tensors.values() if t.layer == 1)
    outer = sum(t.numel for t in anatomy.tensors.values() if t.layer is None)
    assert sum(p.numel() for p in model.parameters()) == outer + 5 * own
    assert model.config.num_hidden_layers == 5


def test_layers_that_lack_a_sublayer_can_be_timed():
    config = tiny.tiny_config("llama")
    anatomy = mixed(Anatomy.of(config))
    model = latency.built(config, anatomy, 1, 2, "float32")
    own = sum(t.numel for t in anatomy.tensors.values() if t.layer == 1)
    outer = sum(t.numel for t in anatomy.tensors.values() if t.layer is None)
    assert sum(p.numel() for p in model.parameters()) == outer + 2 * own


@pytest.mark.parametrize("copies", [1, 3])
def test_the_clock_is_read_around_layers_and_passes(copies):
    """A clock that ticks once a reading: a layer takes one tick, and a pass two a layer and one more."""
    config = tiny.tiny_config("llama")
    anatomy = Anatomy.of(config)
    ticks = iter(range(10_000))
    model = latency.built(config, anatomy, 0, copies, "float32")
    own, rest = latency.timed(model, anatomy, 4, clock=lambda: float(next(ticks)))
    assert own == Timing(1000.0, 1000.0)
    assert rest == Timing(1000.0 * (copies + 1), 1000.0 * (copies + 1))
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.model.layers)


def test_the_warm_up_is_left_out_and_the_median_taken():
    """Of the prefills 7 (warm-up), 1, 2, 9 the median is 2."""
    config = tiny.tiny_config("llama")
    anatomy = Anatomy.of(config)
    now, lengths = [0.0], iter([7.0, 1.0, 2.0, 9.0] + [5.0] * 9)
    inside = [False]

    def clock():
        if inside[0]:
            now[0] += next(lengths)  # between the two readings of the only layer
        return now[0]

    model = latency.built(config, anatomy, 0, 1, "float32")
    block = model.model.layers[0]
    block.register_forward_pre_hook(lambda *_: inside.__setitem__(0, False))
    attention = block.self_attn
    attention.register_forward_hook(lambda *_: inside.__setitem__(0, True))

    class Once:
        def __call__(self):
            value = clock()
            inside[0] = False
            return value

    own, rest = latency.timed(model, anatomy, 4, clock=Once())
    assert own == Timing(2000.0, 5000.0) and rest == Timing(0.0, 0.0)


# -- plan ---------------------------------------------------------------------------------------------------------------


def test_plan_shows_milliseconds_once_the_table_has_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    seen = []
    monkeypatch.setattr(latency, "measured", fake(seen))
    ask = ("plan", pipeline.folder(), "-m", "shortgpt", "-r", 0.4, "--windows", 4, "--seq-len", 16)
    code, out, _ = cli(*ask)
    assert code == 0 and "decode of a token" not in out and not (tmp_path / "cache").exists()
    code, out, _ = cli(*ask, "--latency", "--json")
    said = json.loads(out)["latency"]
    assert code == 0 and seen == [(0, "float32", 55)]
    assert said["before"] == {"prefill_ms": 30.5, "decode_ms": 3.25}
    assert said["after"] == {"prefill_ms": 20.5, "decode_ms": 2.25} and said["key"]["prompt_tokens"] == 55
    code, out, _ = cli(*ask)
    assert code == 0 and len(seen) == 1
    assert re.search(r"prefill of 55 tokens, ms +30.5 +20.5 +-32.8%", out) and "decode of a token, ms" in out
    code, out, _ = cli("plan", pipeline.folder(), "-m", "flap", "-r", 0.4, "--windows", 4, "--seq-len", 16)
    assert code == 0 and re.search(r"prefill of 55 tokens, ms +30.5 *\n", out)  # flap's sizes are not known yet
