"""Several methods under one budget: the same as doing them by hand one after another, and counts that meet the ratio."""

from __future__ import annotations

import functools
import json
import math
import shutil

import checkpoints
import pipeline
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipeline import cli
from safetensors.torch import load_file

from prunus import api, checkpoint, checkpoint_plots, combination
from prunus.anatomy import Anatomy
from prunus.combination import example, planned, ratio_to
from prunus.cut import slice_plan, slice_tensors
from prunus.errors import UserError, VerificationError
from prunus.keep import Keep, WeightMask
from prunus.methods import METHODS
from prunus.planning import Request
from prunus.source import Source

TEXT = api.TextOptions(windows=6, seq_len=pipeline.SEQ_LEN)
LAYERS = 6
LLAMA = pipeline.config("llama", num_hidden_layers=LAYERS)
ANATOMY = Anatomy.of(LLAMA)


@functools.cache
def folder(case: str = "llama"):
    made = pipeline.model(case, dtype=torch.float32, num_hidden_layers=LAYERS)
    return checkpoints.save_folder(pipeline.scratch() / f"deep-{case}", made, pipeline.tokenizer())


def prune(source, method, **request):
    text = {"calibration": str(pipeline.text_file()), "text": TEXT}
    needs = any(METHODS[name].needs_text for name in method.split("+"))
    return api.prune(str(source), method=method, **(text if needs else {}), **request)


def plan(method, of=LLAMA, **request):
    return planned(of, Anatomy.of(of), Request(method, **request))


# -- by hand ------------------------------------------------------------------------------------------------------------

COMBINATIONS = {
    "stock": {"method": "shortgpt+minitron-width", "ratio": 0.4},
    "per-layer": {"method": "shortgpt+flap", "ratio": 0.35, "split": (0.4, 0.6)},
    "uniform": {"method": "shortgpt+flap", "ratio": 0.35, "uniform": True},
    "stem first": {
        "method": "minitron-width+flap",
        "ratio": 0.5,
        "split": (0.8, 0.2),
        "compensate": "minitron-width=gain,flap=none",
    },
    "sparse last": {"method": "flap+wanda", "ratio": 0.2, "sparsity": 0.5},
    "n of m": {"method": "shortgpt+flap+sparsegpt", "ratio": 0.4, "pattern": "2:4", "multiple_of": 4},
    "three": {"method": "sleb+prunus+prunus-sparse", "ratio": 0.4, "sparsity": 0.3, "multiple_of": 4},
    "two depths": {
        "method": "shortgpt+shortened-llama",
        "ratio": 0.5,
        "options": {"shortened-llama.protect": "0,0", "shortened-llama.score": "perplexity"},
    },
    "sub-layers": {
        "method": "sublayer-greedy+flap",
        "ratio": 0.3,
        "options": {"sublayer-greedy.sublayers": "attention"},
    },
    "turned": {
        "method": "slicegpt+magnitude",
        "ratio": 0.3,
        "sparsity": 0.25,
        "options": {"slicegpt.rotation": "shared"},
    },
    "no text": {"method": "magnitude-sp+magnitude", "ratio": 0.3, "sparsity": 0.5},
}


TIED = [("llama_tied", name) for name in ("stem first", "turned", "sparse last")]


@pytest.mark.parametrize(("case", "name"), [*(("llama", name) for name in COMBINATIONS), *TIED])
def test_it_is_what_its_parts_give_by_hand(case, name, monkeypatch, tmp_path):
    """Each part by itself on the saved checkpoint of the part before, at the ratio that the manifest tells: bit for bit."""
    pipeline.verify_here(monkeypatch)
    manifest = prune(folder(case), **COMBINATIONS[name]).save(tmp_path / "all")
    at, keep, anatomy = folder(case), Keep(), Source.open(str(folder(case))).anatomy
    left = [anatomy.block_params]
    for index, part in enumerate(manifest.method["parts"]):
        alone = prune(at, **part["request"])
        at = tmp_path / str(index)
        last = alone.save(at)
        keep = keep.then(alone.outcome.keep or Keep(), anatomy)
        assert part == last.method | {"block_params": part["block_params"]}
        assert part["block_params"] == {"before": left[-1], "after": last.after["block_params"]}
        left.append(last.after["block_params"])
    assert manifest.weights_sha256 == last.weights_sha256
    assert (tmp_path / "all" / "config.json").read_bytes() == (at / "config.json").read_bytes()
    assert checkpoint.read_keep(tmp_path / "all") == keep == keep.validated(anatomy)
    if "sparsity" in manifest.ratios:
        masks = [load_file(f / "prunus" / "mask.safetensors") for f in (tmp_path / "all", at)]
        assert masks[0].keys() == masks[1].keys() and all(torch.equal(m, masks[1][n]) for n, m in masks[0].items())
        assert manifest.ratios["sparsity"] == last.ratios["sparsity"]
    assert manifest.ratios["removed_of_block"] == 1 - left[-1] / left[0]
    assert (manifest.calibration is None) == (name == "no text")


@pytest.mark.parametrize("method", ["shortgpt+magnitude-sp", "sleb+wanda-sp"])
def test_keep_json_cuts_the_source_into_what_came_out(method):
    """Methods that only remove: cutting the source once by the composed decision gives the same weights."""
    cut = prune(folder(), method=method, ratio=0.4)
    source = dict(Source.open(str(folder())).load().named_parameters())
    once = slice_tensors(source, slice_plan(ANATOMY, cut.outcome.keep))
    found = dict(cut.model.named_parameters())
    assert found.keys() == once.keys() and all(torch.equal(found[name], once[name]) for name in once)


# -- the budget ---------------------------------------------------------------------------------------------------------


@given(st.integers(2, 10**12), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_part_s_ratio_leaves_exactly_what_it_must(left, share):
    stays = min(max(math.floor(share * left), 1), left - 1)
    ratio = ratio_to(stays, left)
    assert 0 < ratio < 1 and math.floor((1 - ratio) * left) == stays


@pytest.mark.parametrize("split", [(), (0.5, 0.5), (0.4, 0.6), (0.75, 0.25)])
@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.5])
@pytest.mark.parametrize("method", ["shortgpt+flap", "shortgpt+minitron-width", "minitron-width+flap", "shortgpt+prunus"])
def test_the_whole_meets_its_ratio_within_a_step_of_the_last_part(method, ratio, split):
    made = plan(method, ratio=ratio, split=split, multiple_of=4)
    budget = math.floor((1 - ratio) * ANATOMY.block_params)
    stays = made.target_block_params
    assert budget - made.step < stays <= budget
    first = made.parts[0]
    share = (split or (0.5, 0.5))[0]
    wanted = (1 - ratio * share) * ANATOMY.block_params
    step = first.step / 2 if first.run else first.step  # layers go to the nearest number
    assert abs(first.target_block_params - wanted) <= step + 1
    assert [part.anatomy.block_params for part in made.parts] == [ANATOMY.block_params, first.target_block_params]


def test_what_was_carried_out_meets_it_too():
    cut = prune(folder(), method="shortgpt+flap+wanda", ratio=0.4, split=(0.3, 0.7), sparsity=0.5)
    parts = cut.outcome.plan.parts
    assert [p.method.name for p in parts] == ["shortgpt", "flap", "wanda"] and not any(p.on_example for p in parts)
    stays = cut.outcome.target.anatomy.block_params
    assert parts[2].anatomy.block_params == stays
    assert parts[1].budget - parts[1].step < stays <= parts[1].budget == math.floor(0.6 * ANATOMY.block_params)
    # 0.3 of 40 % of six layers is 0.72 of a layer
    assert parts[1].anatomy.shape.num_hidden_layers == 5
    assert cut.ratios["sparsity"] == pytest.approx(0.5, abs=0.02)


def test_a_coarse_first_part_that_takes_too_much_is_made_up_for_or_refused():
    """One layer of six is a sixth: more than half of 0.25, which leaves the rest to flap, and more than all of 0.16."""
    made = plan("shortgpt+flap", ratio=0.25)
    assert made.parts[1].request.ratio == pytest.approx(1 - 0.75 / (5 / 6), abs=1e-3)
    message = (
        r"^split: 16.00% of the block parameters are to go up to flap, part 2 of shortgpt\+flap, but what stands before it "
        r"takes 16.67% already; ask for a larger ratio, or another --split$"
    )
    with pytest.raises(UserError, match=message):
        plan("shortgpt+flap", ratio=0.16, split=(0.6, 0.4))


# -- plans --------------------------------------------------------------------------------------------------------------


def test_a_plan_says_all_parts_before_a_weight_is_read(monkeypatch):
    monkeypatch.setattr(Source, "load", lambda *a, **k: pytest.fail("no weight may be read"))
    words = ("-m", "shortgpt+flap+wanda", "-r", 0.4, "--sparsity", 0.5, "--split", "0.4,0.6", "--seq-len", 16)
    code, out, err = cli("plan", folder(), *words, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["method"] == "shortgpt+flap+wanda" and said["request"]["split"] == [0.4, 0.6]
    assert [part["method"] for part in said["parts"]] == ["shortgpt", "flap", "wanda"]
    assert [part.get("on_example", False) for part in said["parts"]] == [False, False, True]
    assert said["parts"][0]["after"]["block_params"] == said["parts"][1]["before"]["block_params"]
    assert said["after"]["at_most"] and said["after"]["block_params"] == math.floor(0.6 * ANATOMY.block_params)
    assert said["after"]["shape"]["num_hidden_layers"] == 5 and "intermediate_size" not in said["after"]["shape"]
    assert said["sparsity"] == 0.5 and said["estimate"]["scoring_flops"] > 0
    assert said["notes"][-1].startswith("wanda is planned on an example of such sizes, and again")
    code, out, err = cli("plan", folder(), *words)
    assert code == 0 and "50.00% zeros" in out and "~" in out and "at most" in out


def test_a_plan_whose_sizes_are_known_is_what_comes_out():
    for name in ("stock", "two depths", "turned", "no text"):
        request = COMBINATIONS[name]
        before, after = plan(**request), prune(folder(), **request).outcome
        assert before.target.anatomy == after.target.anatomy
        assert before.target.config.model_type == after.target.config.model_type
        assert [part.request for part in before.parts] == [part.request for part in after.plan.parts]


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("method", ["flap", "sublayer-greedy", "prunus"])
def test_examples_are_as_large_as_what_comes_out_and_differ(case, method):
    config = pipeline.config(case)
    made = planned(config, Anatomy.of(config), Request(method, 0.2, multiple_of=2 if method == "prunus" else None))
    after = example(made, config).anatomy
    assert after.block_params <= made.budget or method == "prunus"  # affine adds biases to what is never cut, too
    assert after.block_params == pytest.approx(made.budget, rel=0.2)
    assert len(set(after.shape.layers)) > 1


def test_depth_of_layers_that_differ_is_planned_on_an_example(monkeypatch, tmp_path):
    pipeline.verify_here(monkeypatch)
    prune(folder(), method="flap", ratio=0.2).save(tmp_path / "flap")
    source = Source.open(str(tmp_path / "flap"))
    made = planned(source.config, source.anatomy, Request("shortgpt+flap", 0.4))
    assert [part.on_example for part in made.parts] == [False, True] and made.parts[0].target is None
    cut = prune(tmp_path / "flap", method="shortgpt+flap", ratio=0.4).outcome
    stays, budget = cut.target.anatomy.block_params, math.floor(0.6 * source.anatomy.block_params)
    assert budget - cut.plan.parts[1].step < stays <= budget


WRONG = {  # what -> (request, message)
    "unknown": ({"method": "shortgpt+flop"}, r"unknown method 'flop' \(did you mean 'flap'\?\)"),
    "nothing": ({"method": "flap+"}, r"unknown method ''"),
    "twice": ({"method": "flap+flap"}, r"method: flap stands twice in flap\+flap; a combination has each part once"),
    "order": (
        {"method": "flap+shortgpt"},
        r"method: shortgpt cuts whole layers and flap heads, channels or the stem, but .*; write shortgpt\+flap$",
    ),
    "order of depths": ({"method": "sublayer-greedy+sleb"}, r"write sleb\+sublayer-greedy$"),
    "sparse first": ({"method": "wanda+shortgpt+flap", "sparsity": 0.5}, r"write shortgpt\+flap\+wanda$"),
    "two sparse": ({"method": "magnitude+wanda"}, r"method: magnitude and wanda both zero single weights; keep one of them"),
    "two widths": (
        {"method": "flap+minitron-width"},
        r"method: the scores of flap decide the size of every layer, so minitron-width, which sets sizes too, cannot be planned",
    ),
    "no ratio": ({"ratio": None}, r"^ratio: shortgpt\+flap needs to know how much to cut; give --ratio$"),
    "ratio": ({"ratio": 1.5}, r"^ratio: 1.5 is not between 0 and 1"),
    "target": ({"target": {"hidden_size": 8}}, r"target: a combination shares out one ratio; give --ratio instead"),
    "split": ({"split": (1.0,)}, r"split: 1 shares for 2 parts \(shortgpt, flap\); give one for each"),
    "sum": ({"split": (0.5, 0.6)}, r"split: 0.5,0.6 are no shares of a whole; they must add up to 1"),
    "negative": ({"split": (-0.5, 1.5)}, r"split: -0.5,1.5 are no shares"),
    "nan": ({"split": (math.nan, 0.5)}, r"split: nan,0.5 are no shares"),
    "sparsity of none": ({"sparsity": 0.5}, r"sparsity: shortgpt\+flap has no part that zeroes single weights"),
    "pattern of none": ({"pattern": "2:4"}, r"pattern: shortgpt\+flap has no part that zeroes single weights"),
    "no sparsity": ({"method": "flap+wanda"}, r"sparsity: wanda needs to know how many weights to zero; give --sparsity or"),
    "sparsity": ({"method": "flap+wanda", "sparsity": 2.0}, r"^sparsity: 2.0 is not between 0 and 1"),
    "both": (
        {"method": "shortgpt+wanda", "sparsity": 0.6, "pattern": "2:4"},
        r"wanda, part 2 of shortgpt\+wanda: ratio: 0.6 contradicts pattern 2:4",
    ),
    "no n:m": ({"method": "flap+wanda", "pattern": "2-4"}, r"pattern: '2-4' is no n:m"),
    "n:m of open sizes": (
        {"method": "flap+wanda", "pattern": "2:4", "multiple_of": 2},
        r"pattern: 2:4 needs sizes that are multiples of 4, but the scores of flap decide them; add --multiple-of 4",
    ),
    "uniform": ({"method": "shortgpt+minitron-width", "uniform": True}, r"uniform: .* always leaves uniform layers; drop"),
    "multiple": ({"method": "shortgpt+sleb", "multiple_of": 8}, r"multiple_of: no part of shortgpt\+sleb takes it"),
    "multiple 0": ({"multiple_of": 0}, r"flap, part 2 of shortgpt\+flap: multiple_of: 0 is no multiple"),
    "option of none": ({"options": {"protect": "0,0"}}, r"option 'protect': say which part of .* as in shortgpt.protect"),
    "option of another": ({"options": {"sleb.protect": "0,0"}}, r"unknown part of shortgpt\+flap 'sleb': known are flap, sho"),
    "option": ({"options": {"flap.metric": "x"}}, r"flap, part 2 of shortgpt\+flap: option 'metric' does not exist for flap"),
    "repair of none": ({"compensate": "none"}, r"compensate 'none': say which part of shortgpt\+flap it .* in flap=none"),
    "repair of another": ({"compensate": "wanda=none"}, r"unknown part of shortgpt\+flap 'wanda'"),
    "repair": ({"compensate": "flap=gain"}, r"flap, part 2 of .*: unknown value for compensate of flap 'gain'"),
    "a step": ({"ratio": 0.1}, r"shortgpt, part 1 of shortgpt\+flap: ratio: 0.05\d* of 6 layers is less than one layer"),
    "too much": ({"ratio": 0.99}, r"part \d of shortgpt\+flap: ratio: "),
    "sliced": ({"method": "slicegpt+wanda", "sparsity": 0.5}, r"wanda, part 2 of slicegpt\+wanda: this model's stream is sl"),
    "sub-layers": (
        {"method": "sublayer-greedy+minitron-width"},
        r"minitron-width, part 2 of .*: a model with removed sub-layers has no single FFN width",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused_in_one_sentence(what):
    request, message = WRONG[what]
    with pytest.raises(UserError, match=message) as caught:
        plan(**({"method": "shortgpt+flap", "ratio": 0.4} | request))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("sparsity", 0.5), ("sparsity", 0.0), ("split", (1.0,))])
def test_one_method_is_no_combination(field, value):
    with pytest.raises(UserError, match=rf"^{field}: wanda is one method and no combination; "):
        plan("wanda", ratio=0.5, **{field: value})


def test_the_command_line_refuses_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(Source, "load", lambda *a, **k: pytest.fail("no weight may be read"))
    words = ("prune", folder(), "-c", pipeline.text_file(), "-o", tmp_path / "out", "-r", 0.3, "--seq-len", 16)
    for more, message in {
        ("-m", "shortgpt+flap", "--split", "0.5;0.5"): "--split: '0.5;0.5' is no list of shares such as 0.5,0.5",
        ("-m", "flap+shortgpt"): "write shortgpt+flap",
        ("-m", "sleb+flap", "--stream"): "stream: sleb+flap runs the whole model",
        ("-m", "minitron-depth+flap", "--statistics", tmp_path / "s"): "statistics: minitron-depth+flap must sweep again",
        ("-m", "shortgpt+flap", "--cost", "flops"): "cost: parts of a combination allocate as is their way; drop --cost",
    }.items():
        code, out, err = cli(*words, *more)
        assert code == 2 and out == "" and message in err, err
    assert not (tmp_path / "out").exists()


def test_what_only_the_scores_can_tell_is_said_when_they_have():
    """All MLPs of this model may go before flap comes; nobody knows beforehand."""
    source = pipeline.folder()
    plan("sublayer-greedy+flap", of=pipeline.config("llama"), ratio=0.45)
    with pytest.raises(UserError, match=r"^flap, part 2 of sublayer-greedy\+flap: no layer of this model has FFN channels"):
        prune(source, method="sublayer-greedy+flap", ratio=0.45)


# -- what is saved ------------------------------------------------------------------------------------------------------


@functools.cache
def saved():
    """A layer gone, channels gone, zeros last: written by the command line and verified in a clean process."""
    out = pipeline.scratch() / "saved-combination"
    words = ("-m", "shortgpt+flap+wanda", "-r", 0.4, "--sparsity", 0.5, "--option", "wanda.allocation=owl")
    code, said, err = cli(
        "prune", folder(), *words, "--seq-len", 16, "--windows", 6, "-c", pipeline.text_file(), "-o", out, "--json"
    )
    assert code == 0, err
    return out, json.loads(said)


def test_one_manifest_describes_all_parts():
    said = saved()[1]
    method = said["method"]
    assert method["name"] == "shortgpt+flap+wanda" and said["verified"]["clean_process"] is True
    assert method["compensator"] == "flap=bias" and method["options"] == {"wanda.allocation": "owl"}
    assert method["request"] == {
        "method": "shortgpt+flap+wanda", "ratio": 0.4, "sparsity": 0.5, "options": {"wanda.allocation": "owl"},
    }  # fmt: skip
    assert [part["name"] for part in method["parts"]] == ["shortgpt", "flap", "wanda"]
    counts = [part["block_params"] for part in method["parts"]]
    assert counts[0]["before"] == said["before"]["block_params"] and counts[-1]["after"] == said["after"]["block_params"]
    assert [c["after"] for c in counts[:-1]] == [c["before"] for c in counts[1:]]
    assert all(text in " ".join(method["deviations"]) for part in method["parts"] for text in part["deviations"])
    assert {stage.split(": ")[0] for stage in said["seconds"]} == {"shortgpt", "flap", "wanda"}
    assert any(note.startswith("flap: layers differ in size") for note in said["notes"])
    assert any(note.startswith("wanda: zeros are stored densely") for note in said["notes"])


def test_the_decision_speaks_of_the_source_and_the_mask_of_the_result():
    out, said = saved()
    data = json.loads((out / "keep.json").read_text())
    assert data["mask"] == "prunus/mask.safetensors" and data["format"] == 1
    keep, source = checkpoint.read_keep(out), Source.open(str(out))
    assert keep.validated(ANATOMY).anatomy_after(ANATOMY).shape == source.anatomy.shape
    mask = WeightMask.from_packed(load_file(out / "prunus" / "mask.safetensors"), source.anatomy)
    weights = load_file(out / "model.safetensors")
    assert all(not weights[name][~kept].any() for name, kept in mask.kept.items())
    assert mask.sparsity == pytest.approx(said["ratios"]["sparsity"])


def test_it_is_verified_inspected_and_drawn(monkeypatch):
    out, said = saved()
    pipeline.verify_here(monkeypatch)
    code, text, err = cli("verify", out, "--json")
    assert (code, err) == (0, "") and json.loads(text)["sparsity"] == said["ratios"]["sparsity"]
    code, text, err = cli("inspect", out, "--json")
    assert code == 0 and json.loads(text)["kept_units"]["layers"] == 5
    code, text, err = cli("inspect", out)
    assert code == 0 and "flap:" in text and "repair: bias" in text and "kept: 5 of layers, by layer" in text
    drawn = checkpoint_plots.run(out, pipeline.scratch() / "combination.png", overwrite=True)
    assert drawn["panels"] == 6 and not drawn["notes"]  # groups, channels: scores and counts; layers; zeros


def test_a_damaged_mask_is_found(monkeypatch, tmp_path):
    pipeline.verify_here(monkeypatch)
    copied = shutil.copytree(saved()[0], tmp_path / "copied")
    (copied / "prunus" / "mask.safetensors").unlink()
    with pytest.raises(VerificationError, match="mask"):
        checkpoint.verify(copied)


def test_scores_and_losses_speak_of_the_source():
    whole = prune(folder(), method="shortgpt+flap", ratio=0.4).outcome
    depth = prune(folder(), method="shortgpt", ratio=whole.plan.parts[0].request.ratio).outcome
    kept = depth.keep.units["layers"]
    assert torch.equal(whole.scores.values["layers"], depth.scores.values["layers"])
    named = {name for name in whole.scores.values if name != "layers"}
    assert named == {f"layers.{i}.{kind}" for i in kept for kind in ("kv_heads", "intermediate")}
    assert whole.measured == depth.measured and whole.findings.scores is not None
    stem = prune(folder(), method="minitron-width+flap", ratio=0.4).outcome
    first = prune(folder(), method="minitron-width", ratio=stem.plan.parts[0].request.ratio).outcome
    for i in range(LAYERS):
        name = f"layers.{i}.intermediate"
        there = stem.scores.values[name].isfinite().nonzero().flatten().tolist()
        assert there == list(first.keep.units[name])
        assert set(stem.keep.units[name]) <= set(there)
    assert torch.equal(stem.scores.values["hidden"], first.scores.values["hidden"])
    twice = prune(folder(), method="sleb+prunus", ratio=0.4, multiple_of=4).outcome
    assert set(twice.measured) == {"losses", "prunus-curves"}


def test_statistics_of_the_first_part_serve_again(tmp_path):
    request = {"method": "flap+wanda", "ratio": 0.3, "sparsity": 0.5, "statistics": tmp_path / "statistics"}
    first = prune(folder(), **request).outcome
    again = prune(folder(), **request).outcome
    assert "flap: score" in first.seconds and "flap: score" not in again.seconds and again.keep == first.keep
    alone = prune(folder(), method="flap", ratio=0.3, statistics=tmp_path / "statistics").outcome
    assert "score" not in alone.seconds and alone.keep == first.keep


def test_progress_names_the_part():
    seen = set()
    prune(folder(), method="shortgpt+flap", ratio=0.4, progress=lambda stage, done, total: seen.add(stage))
    assert seen == {"load", "shortgpt: score", "flap: score"}


def test_a_row_s_words_are_those_of_the_table():
    row = plan("shortgpt+flap", ratio=0.4).method
    assert row.axes == ("layers", "kv_heads", "intermediate") and row.sweeps == 2 and row.streams and not row.uniform
    assert not plan("sleb+flap", ratio=0.4).method.streams
    assert combination.SEPARATOR not in "".join(METHODS)  # or names could not be told apart
