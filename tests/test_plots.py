"""Pictures: what is drawn is what is saved; where they go; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pipeline
import pytest
from pipeline import cli

from prunus import checkpoint, checkpoint_plots, plots, saliency


def cut(tmp_path, monkeypatch, method, *options):
    pipeline.verify_here(monkeypatch)
    out = tmp_path / "cut"
    words = ("-m", method, *options, "-c", pipeline.text_file(), "--windows", 4, "--seq-len", 16, "-o", out, "--json")
    code, _, err = cli("prune", pipeline.folder(), *words)
    assert code == 0, err
    return out


def drawn(folder, monkeypatch):
    """(the figure that is drawn for a folder, what the command said)."""
    kept = []
    real = plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (kept.append(figure), real(figure, path)))
    said = checkpoint_plots.run(folder, None, overwrite=True)
    return kept[0], said


def labelled(figure):
    """Every panel has a label on each axis that has ticks with numbers."""
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel()
    return figure.axes


# -- scores beside a checkpoint -----------------------------------------------------------------------------------------


def test_saved_scores_are_those_that_decided():
    """flap with one size in all: per layer the kept channels are the best ones."""
    folder, _, _ = pipeline.saved("uniform")
    scores = saliency.load_scores(folder / checkpoint.EXTRA)
    keep = checkpoint.read_keep(folder)
    for name, units in keep.units.items():
        best = scores[name].argsort(descending=True, stable=True)[: len(units)]
        assert sorted(best.tolist()) == list(units)


# -- one checkpoint -----------------------------------------------------------------------------------------------------


def test_units_of_layers(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(pipeline.saved("per-layer")[0], tmp_path / "cut"))
    figure, said = drawn(folder, monkeypatch)
    panels = labelled(figure)
    assert said["panels"] == len(panels) == 4 and said["notes"] == []
    keep, scores = checkpoint.read_keep(folder), saliency.load_scores(folder / "prunus")
    for row, (kind, size) in enumerate((("kv_heads", 4), ("intermediate", 24))):
        names = [f"layers.{i}.{kind}" for i in range(3)]
        before, after = panels[2 * row + 1].containers
        assert [bar.get_height() for bar in before] == [size] * 3
        assert [bar.get_height() for bar in after] == [len(keep.units.get(n, range(size))) for n in names]
        medians = {line.get_label(): line.get_ydata() for line in panels[2 * row].lines}
        kept = [scores[n][list(keep.units.get(n, range(size)))].double().quantile(0.5) for n in names]
        assert list(medians["kept"]) == pytest.approx([float(v) for v in kept])
        assert "fluctuation" in panels[2 * row].get_ylabel()
    assert "cut by flap --ratio 0.3" in figure.get_suptitle()
    assert (folder / "prunus" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    checkpoint.read_manifest(folder)


def test_the_stem(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(pipeline.saved("uniform")[0], tmp_path / "cut"))
    figure, said = drawn(folder, monkeypatch)
    stem = figure.axes[-1]
    keep = checkpoint.read_keep(folder)
    counts = {line.get_label(): len(line.get_ydata()) for line in stem.lines}
    assert counts == {f"{len(keep.units['hidden'])} kept": len(keep.units["hidden"]), f"{32 - len(keep.units['hidden'])} removed":
                      32 - len(keep.units["hidden"])}  # fmt: skip
    assert said["panels"] == 3


def test_masks(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(pipeline.saved("sparse")[0], tmp_path / "cut"))
    names, shares = checkpoint_plots.kept_shares(folder)
    assert len(names) == 7 and all(share == pytest.approx(0.5) for row in shares for share in row)
    figure, _ = drawn(folder, monkeypatch)
    assert "50.00% zeros" in figure.get_suptitle()


@pytest.mark.parametrize(
    ("mask", "sentence"), [(None, "no such file, though prunus.json speaks of a mask"), (b"{", "truncated")]
)
def test_masks_that_cannot_be_read(mask, sentence, tmp_path):
    """The picture could be written very well."""
    folder = Path(shutil.copytree(pipeline.saved("sparse")[0], tmp_path / "cut"))
    path = folder / "prunus" / "mask.safetensors"
    path.unlink() if mask is None else path.write_bytes(mask)
    code, _, err = cli("plot", folder, "-o", tmp_path / "a.png")
    assert code == 2 and f"{path}: " in err and sentence in err and not list(tmp_path.glob("*a.png*"))


@pytest.mark.parametrize(
    ("method", "options", "panels"),
    [
        ("shortgpt", ("-r", 0.34), 1),
        ("minitron-depth", ("-r", 0.34), 1),
        ("minitron-depth", ("-r", 0.6), 1),
        ("shortened-llama", ("-r", 0.34, "--option", "protect=0,0", "--option", "score=perplexity"), 1),
        ("sleb", ("-r", 0.34, "--option", "protect=0,0"), 2),
        ("sublayer-greedy", ("-r", 0.3), 2),
    ],
)
def test_layers_that_went(tmp_path, monkeypatch, method, options, panels):
    folder = cut(tmp_path, monkeypatch, method, *options)
    figure, said = drawn(folder, monkeypatch)
    assert len(labelled(figure)) == said["panels"] == panels
    keep = checkpoint.read_keep(folder)
    lines = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].lines}
    if method == "shortgpt":
        assert lines["kept"] == list(keep.units["layers"])
        assert lines["removed"] == [i for i in range(3) if i not in keep.units["layers"]]
    if method == "minitron-depth":
        assert len(lines["run removed"]) == 1
    if panels == 2:
        rounds = json.loads((folder / "prunus" / "losses.json").read_text())["rounds"]
        assert list(figure.axes[1].lines[0].get_ydata()) == [r["loss"] for r in rounds]


def test_a_folder_of_an_older_version(tmp_path, monkeypatch):
    folder = Path(shutil.copytree(pipeline.saved("per-layer")[0], tmp_path / "cut"))
    (folder / "prunus" / "scores.safetensors").unlink()
    _, said = drawn(folder, monkeypatch)
    assert said["panels"] == 2 and said["notes"] == ["no scores are saved in this folder, so only what stayed is drawn"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_command(tmp_path, suffix):
    folder, out = pipeline.saved("per-layer")[0], tmp_path / f"picture{suffix}"
    code, said, err = cli("plot", folder, "-o", out)
    assert (code, said, err) == (0, f"{out}\n", "") and out.stat().st_size > 5000
    first = out.read_bytes()
    assert "already exists; give another --out, or --overwrite" in cli("plot", folder, "-o", out)[2]
    assert cli("plot", folder, "-o", out, "--overwrite", "--json")[0] == 0
    assert out.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == [out.name]


def test_wrong_places(tmp_path, monkeypatch):
    folder = pipeline.saved("per-layer")[0]
    assert "no prunus.json here" in cli("plot", tmp_path)[2]
    assert "a picture ends in .png, .svg, .pdf" in cli("plot", folder, "-o", tmp_path / "x.jpg")[2]
    (tmp_path / "d.png").mkdir()
    assert "already exists" in cli("plot", folder, "-o", tmp_path / "d.png", "--overwrite")[2]
    (tmp_path / "file").write_text("")
    code, _, err = cli("plot", folder, "-o", tmp_path / "file" / "x.png")
    assert code == 2 and "cannot be written" in err
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    code, _, err = cli("plot", folder, "-o", tmp_path / "x.png")
    assert (code, err) == (2, "prunus: plot: pictures need matplotlib; pip install 'prunus[plot]'\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.png", "file"]


# -- methods compared ---------------------------------------------------------------------------------------------------


def a_row(method, ratio, perplexity, params, ms=None, sparsity=None, reach=0.0):
    spread = None if perplexity is None else {"mean": perplexity, "min": perplexity - reach, "max": perplexity + reach}
    times = None if ms is None else {"mean": ms, "min": ms, "max": ms}
    flags = "" if ratio is None else f"--ratio {ratio}"
    return {"method": method, "ratio": ratio, "flags": flags, "perplexity": spread, "params": params, "flops": 2 * params,
            "prefill_ms": times, "decode_ms": times, "prompt_tokens": 8 if ms else None, "sparsity": sparsity,
            "calibration": ""}  # fmt: skip


def compared(rows, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "save", lambda figure, path: (kept.append(figure), figure.savefig(path)))
    about = {"source": "m", "evaluation": {"seq_len": 16, "source": "t"}}
    plots.comparison({"about": about, "rows": rows}, tmp_path / "c.png")
    return kept[0]


def test_a_line_a_method_and_a_point_a_ratio(tmp_path, monkeypatch):
    rows = [
        a_row("dense", None, 10.0, 100, 5.0),
        a_row("flap", 0.2, 12.0, 80, 4.0, reach=1.0),
        a_row("flap", 0.5, 90.0, 50, 3.0),
    ]
    rows += [a_row("wanda", 0.5, 20.0, 100, 5.0, sparsity=0.5), a_row("sleb", 0.5, None, 50, 3.0)]
    figure = compared(rows, tmp_path, monkeypatch)
    assert len(figure.axes) == 4 and "not drawn, perplexity not finite: sleb --ratio 0.5" in figure.get_suptitle()
    for axes, sizes in zip(figure.axes, ([8e-5, 5e-5], [1.6e-7, 1e-7], [4.0, 3.0], [4.0, 3.0]), strict=True):
        handles, labels = axes.get_legend_handles_labels()
        assert (
            labels == ["dense", "flap", "wanda (zeros)"] and axes.get_xlabel() and "log scale" in figure.axes[0].get_ylabel()
        )
        line = dict(zip(labels, handles, strict=True))["flap"].lines[0]
        assert list(line.get_xdata()) == pytest.approx(sizes) and list(line.get_ydata()) == [12.0, 90.0]


def test_where_nothing_is_finite_it_says_so(tmp_path, monkeypatch):
    figure = compared([a_row("dense", None, None, 100), a_row("flap", 0.2, None, 80)], tmp_path, monkeypatch)
    assert len(figure.axes) == 2 and "not drawn, perplexity not finite: dense, flap --ratio 0.2" in figure.get_suptitle()


def test_without_times_there_are_two_panels(tmp_path, monkeypatch):
    rows = [a_row("dense", None, 10.0, 100), a_row("flap", 0.2, 12.0, 80)]
    assert len(compared(rows, tmp_path, monkeypatch).axes) == 2


def test_many_methods_differ_in_colour_or_mark(tmp_path, monkeypatch):
    rows = [a_row("dense", None, 10.0, 100)] + [a_row(f"m{i}", 0.2, 12.0 + i, 80) for i in range(18)]
    figure = compared(rows, tmp_path, monkeypatch)
    lines = [h.lines[0] for h in figure.axes[0].get_legend_handles_labels()[0][1:]]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 18


def test_names_with_dollars_are_names(tmp_path):
    drawn = plots.figure(3.0, 2.0)
    axes = drawn.subplots()
    axes.plot([1, 1000], [1, 1000], label=r"a $\frac{$ b")
    axes.set_xscale("log")
    plots.tidy(axes, x=r"x $^^$", y="y", title=r"$\notacommand$")
    axes.legend()
    plots.save(drawn, tmp_path / "a.svg")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [r"a $\frac{$ b"]
    assert axes.xaxis.get_ticklabels()[0].get_parse_math()  # ten to the third stays a power
