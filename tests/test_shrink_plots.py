"""The picture of a model that is cut while it trains: what the log says is what is drawn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from prunus import plots, train_plots
from prunus.shrink_plots import Shrinking, draw


def shape(layers, hidden, groups, ffn):
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_key_value_heads": groups,
        "intermediate_size": ffn,
        "num_attention_heads": groups,
        "head_dim": 4,
    }


def cut(step, tokens, groups, units, after, params, saliency):
    pruned = {
        "step": step,
        "tokens": tokens,
        "groups": groups,
        "units": units,
        "shape": after,
        "params": params,
        "saliency": saliency,
    }
    return {"step": step + 1, "tokens": tokens + 100, "pruned": pruned, "loss_before": 3.0, "loss_after": 3.1}


def update(step):
    return {"step": step, "tokens": 100 * step, "loss": 4.0 - 0.1 * step, "lr": 0.01, "flops": 10 * step, "params": 1000}


def log():
    """Three layers of four groups and eight channels on a stem of sixteen: channels go, then layer 1, then stem and a group."""
    return [
        update(1), update(2),
        cut(2, 200, {"intermediate": 3}, {"layers.0.intermediate": [1, 5], "layers.2.intermediate": [0]},
            shape(3, 16, 4, [6, 8, 7]), 900, {"intermediate": 0.5, "hidden": 2.0}),
        update(3), update(4),
        cut(4, 400, {"layers": 1}, {"layers": [1]}, shape(2, 16, 4, [6, 7]), 700, {"intermediate": 0.7, "layers": 0.6}),
        update(5), update(6),
        cut(6, 600, {"hidden": 2, "kv_heads": 1}, {"hidden": [3, 9], "layers.2.kv_heads": [0]},
            shape(2, 14, [4, 3], [6, 7]), 600, {"hidden": 0.8}),
        update(7), update(8),
    ]  # fmt: skip


def figure(lines=None, losses=None):
    drawn = plots.figure(12.0, 11.0).subfigures(1, 1)
    draw(drawn, Shrinking.of(lines or log()), losses or {"as logged": ([100, 800], [4.0, 3.0])})
    return {axes.get_title("left").split(":")[0]: axes for axes in drawn.axes}


def test_sizes_of_every_layer_are_followed():
    """By layers of the source, whose sizes are those of the first cut and what it took."""
    found = Shrinking.of(log())
    assert found.source.inner == {"kv_heads": (4, 4, 4), "intermediate": (8, 8, 8)} and found.source.hidden == 16
    assert [sizes.inner["intermediate"] for sizes in found.stages] == [(8, 8, 8), (6, 8, 7), (6, 0, 7), (6, 0, 7)]
    assert found.stages[-1].alive == (True, False, True) and found.stages[-1].inner["kv_heads"] == (4, 0, 3)
    assert found.edges == [0, 200, 400, 600, 800] and found.kinds == ["kv_heads", "intermediate", "hidden", "layers"]
    assert found.gone("intermediate") == pytest.approx([0, 3 / 24, 11 / 24, 11 / 24])
    assert found.gone("hidden") == pytest.approx([0, 0, 0, 1 / 8]) and found.gone("layers")[-1] == pytest.approx(1 / 3)


def test_a_layer_that_goes_first_was_as_large_as_the_others():
    lines = [cut(1, 100, {"layers": 1}, {"layers": [0]}, shape(2, 16, 4, 8), 700, {"layers": 0.6})]
    found = Shrinking.of(lines)
    assert found.source.inner["intermediate"] == (8, 8, 8) and found.stages[1].inner["intermediate"] == (0, 8, 8)


def test_a_run_that_cuts_nothing_has_no_such_picture():
    assert Shrinking.of([update(1), update(2)]) is None


def test_heat_maps_hold_what_is_left():
    panels = figure()
    for kind, title in (("intermediate", "FFN channels of every layer"), ("kv_heads", "KV groups of every layer")):
        (mesh,) = panels[title].collections
        expected = Shrinking.of(log()).left(kind)
        assert np.ma.filled(mesh.get_array(), np.nan).reshape(expected.shape) == pytest.approx(expected, nan_ok=True)
        assert math.isnan(expected[1, 2]) and mesh.get_clim() == (0, np.nanmax(expected))
        assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 200, 400, 600, 800]
        low, high = sorted(panels[title].get_ylim())
        assert (low, high) == (-0.5, 2.5)


def test_lines_hold_saliency_shares_and_parameters():
    panels = figure()
    told = {
        line.get_label(): line.get_xydata().tolist() for line in panels["what the next group of each kind was worth"].lines
    }
    assert told["FFN channels"] == [[200, 0.5], [400, 0.7]] and told["stem channels"] == [[200, 2.0], [600, 0.8]]
    gone = {line.get_label(): line.get_ydata() for line in panels["how much of each axis was cut"].lines}
    assert list(gone["FFN channels"]) == pytest.approx([0, 3 / 24, 11 / 24, 11 / 24, 11 / 24]) and len(gone) == 4
    at_once = figure([cut(0, 0, {"hidden": 2}, {"hidden": [3, 9]}, shape(3, 14, 4, 8), 600, {"hidden": 0.8}), update(1)])
    (params_,) = at_once["parameters alive"].lines
    assert params_.get_xydata().tolist() == [[0, 600], [100, 600]]
    (params,) = panels["parameters alive"].lines
    assert params.get_xydata().tolist() == [[0, 1000], [200, 900], [400, 700], [600, 600], [800, 600]]
    (band,) = panels["stem"].collections
    ys = band.get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == (-8, 8) and {7.0, -7.0} <= set(ys.tolist())


def test_every_cut_is_marked_below_the_loss():
    panels = figure()
    axes = panels["loss, and its 3 cuts"]
    (strip,) = axes.child_axes
    ticks = {text.get_text(): marks for text, marks in zip(strip.get_yticklabels(), strip.collections, strict=True)}
    assert {name: list(marks.get_positions()) for name, marks in ticks.items()} == {
        "KV groups": [600], "FFN channels": [200], "stem channels": [600], "layers": [400],
    }  # fmt: skip
    lines = [line.get_xdata()[0] for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[-1]]
    assert lines == [200, 400, 600]  # few enough for a line each
    many = [{**line, "pruned": {**line["pruned"], "tokens": 200 + i}} for i in range(50) for line in log()[2:3]]
    assert len(figure([update(1), *many])["loss, and its 50 cuts"].lines) == 1


def test_without_saliency_its_panel_is_left_out():
    lines = [line if "pruned" not in line else {**line, "pruned": {**line["pruned"], "saliency": {}}} for line in log()]
    panels = figure(lines)
    assert "what the next group of each kind was worth" not in panels and "how much of each axis was cut" in panels


def test_one_run_is_drawn_with_its_cuts_and_several_without(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text("{}")
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log()))
    said = train_plots.run([tmp_path / "a"], tmp_path / "a.svg", overwrite=False)
    assert said["notes"] == [] and "FFN channels of every layer" in (tmp_path / "a.svg").read_text()
    said = train_plots.run([tmp_path / "a", tmp_path / "b"], tmp_path / "b.svg", overwrite=False)
    assert said["notes"] == ["cuts are drawn of one run at a time"]
    assert "FFN channels of every layer" not in (tmp_path / "b.svg").read_text()
