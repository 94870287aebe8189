"""Methods compared: figures against prune and eval, what is shared and resumed, what is refused before a weight is read."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pipeline
import pytest
import torch
from pipeline import cli

from prunus import api, comparison, oneshot, plots, record, report
from prunus.comparison import Question, request_of, split_methods
from prunus.errors import UserError
from prunus.evaluation import perplexity
from prunus.planning import Request
from prunus.source import Source

SMALL = ("--windows", 4, "--seq-len", 16, "--eval-windows", 3, "--eval-seq-len", 16, "--no-latency")


def ask(out, methods="flap,shortgpt", ratios=(0.4,), *more, source=None, text=None):
    ratio = [word for r in ratios for word in ("-r", r)]
    words = ("compare-methods", source or pipeline.folder(), "-m", methods, *ratio, "-t", text or pipeline.text_file())
    return cli(*words, "-c", pipeline.text_file(), "-o", out, *SMALL, *more)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One comparison of two methods at two ratios on two draws, with a copy of its records."""
    root = tmp_path_factory.mktemp("comparison")
    code, out, err = ask(root / "cmp", "flap,magnitude", (0.5, 0.3), "--seeds", 2, "--record", root / "all.jsonl", "--json")
    assert (code, err) == (0, "")
    return root, json.loads(out)


# -- what it finds ------------------------------------------------------------------------------------------------------


def test_dense_first_then_every_method_by_ratio(done):
    _, said = done
    found = [(row["method"], row["ratio"], row["draws"]) for row in said["rows"]]
    assert found == [("dense", None, 1), ("magnitude", 0.3, 1), ("magnitude", 0.5, 1), ("flap", 0.3, 2), ("flap", 0.5, 2)]
    assert said["ran"] == 7
    dense, sparse, flap = said["rows"][0], said["rows"][2], said["rows"][4]
    anatomy = Source.open(str(pipeline.folder())).anatomy
    assert dense["params"] == sparse["params"] == anatomy.num_params and dense["cut_s"] is None
    assert dense["flops"] == anatomy.flops(16) and dense["kv_bytes_per_token"] == anatomy.kv_bytes_per_token(4)
    assert sparse["sparsity"] == pytest.approx(0.5, abs=0.01) and flap["sparsity"] is None
    assert flap["removed_of_block"] == pytest.approx(0.5, abs=0.02) and flap["params"] < dense["params"]
    assert all(row["prefill_ms"] is None and row["prompt_tokens"] is None for row in said["rows"])


def test_figures_are_those_of_prune_and_eval(done):
    """Each draw by hand: the same windows, a fresh model, no shared statistics."""
    _, said = done
    held_out = api.TextOptions(3, 16).pack(pipeline.tokenizer(), str(pipeline.text_file()), False)
    for ratio, row in ((0.3, said["rows"][3]), (0.5, said["rows"][4])):
        scores = []
        for seed in (0, 1):
            text = api.TextOptions(4, 16, seed)
            cut = api.prune(
                str(pipeline.folder()), method="flap", ratio=ratio, calibration=str(pipeline.text_file()), text=text
            )
            scores.append(perplexity(cut.model, held_out).perplexity)
        found = row["perplexity"]
        assert found["min"] == pytest.approx(min(scores)) and found["max"] == pytest.approx(max(scores))
        assert found["mean"] == pytest.approx(sum(scores) / 2) and found["min"] < found["max"]
    dense = perplexity(Source.open(str(pipeline.folder())).load(), held_out)
    assert said["rows"][0]["perplexity"]["mean"] == pytest.approx(dense.perplexity)
    assert said["rows"][0]["bits_per_byte"]["mean"] == pytest.approx(dense.bits_per_byte)


def test_combinations_are_compared_and_share_the_first_part_s_pass(tmp_path):
    code, out, err = ask(tmp_path / "cmp", "flap+wanda+sparsity=0.5,flap", (0.4,), "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)["rows"]
    assert [row["method"] for row in rows] == ["dense", "flap", "flap+wanda"]
    assert rows[2]["sparsity"] == pytest.approx(0.5, abs=0.05) and rows[2]["flags"] == "--ratio 0.4 --sparsity 0.5"
    assert rows[1]["params"] == rows[2]["params"] and rows[1]["sparsity"] is None
    shared = {
        r["recipe"]["request"]["method"]: r["figures"]["shared_s"] for r in record.read(tmp_path / "cmp/runs.jsonl")[1:]
    }
    assert shared["flap+wanda"] == 0 and shared["flap"] > 0
    assert "40." in (page := (tmp_path / "cmp" / "comparison.md").read_text()) and "% zeros" in page


def test_what_lies_in_the_folder(done):
    root, said = done
    assert sorted(p.name for p in (root / "cmp").iterdir()) == [
        "comparison.json", "comparison.md", "comparison.png", "runs.jsonl",
    ]  # fmt: skip
    assert (root / "cmp" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    page = (root / "cmp" / "comparison.md").read_text()
    assert page.startswith(f"# {pipeline.folder().name}: methods compared") and "](comparison.png)" in page
    assert "3 windows of 16 tokens of corpus.jsonl" in page and "draws by seed 0, 1" in page and "float32" in page
    assert f"{said['rows'][0]['perplexity']['mean']:,.0f}" in page
    runs = record.read(root / "cmp" / "runs.jsonl")
    assert len(runs) == 7 and [r["recipe"] for r in record.read(root / "all.jsonl")] == [r["recipe"] for r in runs]
    assert str(root) not in (root / "cmp" / "runs.jsonl").read_text() + page


def test_it_can_be_shown(done, capsys):
    from prunus import show

    show.comparison(done[1])
    out = capsys.readouterr().out
    assert "--ratio 0.3" in out and "…" not in out and "7 runs now, 5 rows in all" in out


# -- sharing and resuming -----------------------------------------------------------------------------------------------


def test_ratios_share_the_pass_and_count_it(tmp_path, monkeypatch):
    seen = []
    real = oneshot.one_shot_

    def watched(plan, model, windows, *, findings=None, **rest):
        seen.append((plan.method.name, plan.request.ratio, findings is not None))
        return real(plan, model, windows, findings=findings, **rest)

    monkeypatch.setattr(comparison, "one_shot_", watched)
    assert ask(tmp_path / "cmp", "flap,flap+uniform+compensate=none,wanda-sp", (0.3, 0.4))[0] == 0
    assert [shared for _, _, shared in seen] == [False, True, True, True, False, False]
    figures = [r["figures"] for r in record.read(tmp_path / "cmp" / "runs.jsonl")][1:]
    first = figures[0]["stages_s"]["score"]
    assert figures[0]["shared_s"] == 0 and [f["shared_s"] for f in figures[1:]] == [first, first, first, 0, 0]
    assert all(f["cut_s"] > f["shared_s"] for f in figures) and "score" not in figures[1]["stages_s"]


def test_a_second_call_runs_only_what_is_new(tmp_path, monkeypatch):
    assert ask(tmp_path / "cmp", "shortgpt")[0] == 0
    before = (tmp_path / "cmp" / "runs.jsonl").read_bytes()
    monkeypatch.setattr(Source, "load", lambda *a, **k: pytest.fail("nothing is left to run"))
    code, out, err = ask(tmp_path / "cmp", "shortgpt", (0.4,), "--json")
    assert (code, err) == (0, "") and json.loads(out)["ran"] == 0 and len(json.loads(out)["rows"]) == 2
    monkeypatch.undo()
    code, out, _ = ask(tmp_path / "cmp", "magnitude-sp,shortgpt", (0.4,), "--json", source=pipeline.folder())
    assert code == 0 and json.loads(out)["ran"] == 1 and len(json.loads(out)["rows"]) == 3
    assert (tmp_path / "cmp" / "runs.jsonl").read_bytes().startswith(before)


def test_stopped_and_taken_up_again(tmp_path, monkeypatch):
    """Ctrl-C in the third run: two stay, no table yet; the same call does the rest."""
    real, count = Source.load, []

    def stop(self, *rest):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(self, *rest)

    monkeypatch.setattr(Source, "load", stop)
    code, _, err = ask(tmp_path / "cmp")
    assert code == 130 and err.endswith("prunus: stopped; nothing half-written was left behind\n")
    assert sorted(p.name for p in (tmp_path / "cmp").iterdir()) == ["comparison.json", "runs.jsonl"]
    monkeypatch.undo()
    code, out, _ = ask(tmp_path / "cmp", "flap,shortgpt", (0.4,), "--json")
    assert code == 0 and json.loads(out)["ran"] == 1 and len(json.loads(out)["rows"]) == 3


def test_a_comparison_that_fails_at_once_leaves_nothing(tmp_path, monkeypatch):
    def damaged(*_):
        raise UserError("model: 'x' holds NaN or infinite weights; the checkpoint is damaged")

    monkeypatch.setattr(Source, "load", damaged)
    assert ask(tmp_path / "cmp")[0] == 2 and not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_drawn_leaves_the_old_page(tmp_path, monkeypatch):
    assert ask(tmp_path / "cmp", "shortgpt")[0] == 0
    page = (tmp_path / "cmp" / "comparison.md").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "save", full)
    code, _, err = ask(tmp_path / "cmp", "shortgpt,magnitude-sp")
    assert code == 2 and "No space left on device" in err
    assert (tmp_path / "cmp" / "comparison.md").read_bytes() == page
    assert not [p for p in (tmp_path / "cmp").iterdir() if p.name.startswith(".")]


def test_times_are_asked_for_again_where_there_are_none(tmp_path):
    assert ask(tmp_path / "cmp", "shortgpt")[0] == 0
    words = ("compare-methods", pipeline.folder(), "-m", "shortgpt", "-r", 0.4, "-t", pipeline.text_file(), "-c",
             pipeline.text_file(), "-o", tmp_path / "cmp", *SMALL[:-1], "--json")  # fmt: skip
    said = json.loads(cli(*words)[1])
    assert said["ran"] == 2 and len(said["rows"]) == 2
    for row in said["rows"]:
        assert row["prefill_ms"]["mean"] > 0 and row["decode_ms"]["mean"] > 0 and row["prompt_tokens"] == 48
    assert json.loads(cli(*words)[1])["ran"] == 0
    assert json.loads(ask(tmp_path / "cmp", "shortgpt", (0.4,), "--json")[1])["ran"] == 0  # a record with times answers too


def test_a_truncated_line_is_named_and_half_a_line_at_the_end_is_done_again(tmp_path):
    assert ask(tmp_path / "cmp", "shortgpt")[0] == 0
    path = tmp_path / "cmp" / "runs.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-20])  # of a process that was killed while it wrote
    assert json.loads(ask(tmp_path / "cmp", "shortgpt", (0.4,), "--json")[1])["ran"] == 1
    assert len(record.read(path)) == 2
    with path.open("a") as file:
        file.write('{"kind": "comp\n')
    code, _, err = ask(tmp_path / "cmp", "shortgpt")
    assert code == 2 and re.search(r"runs.jsonl: line 3: not readable as JSON: .*; remove it", err)


# -- what is asked ------------------------------------------------------------------------------------------------------


def test_methods_with_options():
    assert split_methods("flap, shortened-llama+protect=0,0,sleb") == ["flap", "shortened-llama+protect=0,0", "sleb"]
    assert request_of("flap", 0.2) == Request("flap", 0.2)
    assert request_of("flap+uniform+compensate=none+multiple-of=8", 0.2) == Request(
        "flap", 0.2, uniform=True, compensate="none", multiple_of=8
    )
    assert request_of("shortened-llama+flap+wanda+sparsity=0.5+split=0.4,0.6+shortened-llama.protect=0,0", 0.2) == Request(
        "shortened-llama+flap+wanda", 0.2, sparsity=0.5, split=(0.4, 0.6), options={"shortened-llama.protect": "0,0"}
    )
    assert request_of("wanda+pattern=2:4+allocation=owl", 0.5) == Request(
        "wanda", 0.5, pattern="2:4", options={"allocation": "owl"}
    )


WRONG = {  # what -> (methods, ratios, options, message)
    "method": ("flop", (0.3,), (), r"unknown method 'flop' \(did you mean 'flap'\?\)"),
    "no method": (" , ", (0.3,), (), r"methods: nothing to compare"),
    "ratio": ("shortgpt,flap", (0.3, 1.3), (), r"shortgpt at 1.3: ratio: 1.3 "),
    "below a unit": ("shortgpt,flap", (0.4, 0.0001), (), r"shortgpt at 0.0001: ratio: .* less than one layer"),
    "unreachable": ("shortgpt,flap", (0.4, 0.97), (), r"shortgpt at 0.97: ratio: .* would remove all"),
    "second unreachable": ("magnitude,flap", (0.4, 0.97), (), r"flap at 0.97: ratio: the least that can stay"),
    "twice": ("flap,flap", (0.3,), (), r"flap at 0.3 is asked for twice; drop one"),
    "option": ("flap+reduction=l2", (0.3,), (), r"flap at 0.3: option 'reduction' does not exist for flap"),
    "word": ("flap+even", (0.3,), (), r"'even' in 'flap\+even' is neither uniform nor NAME=VALUE nor a method"),
    "number": ("flap+wanda+sparsity=x", (0.3,), (), r"sparsity=x in .* is not a number"),
    "combination": (
        "flap+shortgpt",
        (0.3,),
        (),
        r"flap\+shortgpt at 0.3: method: shortgpt cuts whole layers .* write shortgpt",
    ),
    "multiple": ("flap+multiple-of=x", (0.3,), (), r"multiple-of=x in .* is not a whole number"),
    "seeds": ("flap", (0.3,), ("--seeds", 0), r"seeds: 0 draws"),
    "seeds of none": ("magnitude", (0.3,), ("--seeds", 2), r"seeds: none of these methods reads"),
    "dtype": ("flap", (0.3,), ("--dtype", "fp16"), r"unknown dtype 'fp16'"),
    "batch": ("flap", (0.3,), ("--batch-size", 0), r"batch_size: 0 windows"),
    "windows": ("flap", (0.3,), ("--windows", 0), r"windows: 0 windows of calibration text"),
    "eval windows": ("flap", (0.3,), ("--eval-windows", -1), r"windows: -1 windows of evaluation text"),
    "positions": ("flap", (0.3,), ("--eval-seq-len", 65), r"seq_len: 65 tokens a window of evaluation text"),
    "little text": ("flap", (0.3,), ("--windows", 9999), r"corpus.jsonl: .* 9999 windows of 16 need"),
    "slice": ("flap", (0.3,), ("--eval-documents", "all"), r"documents: 'all' is no slice"),
    "record": ("flap", (0.3,), ("--record", "/"), r"record: / cannot be written"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_questions(what, tmp_path, monkeypatch):
    """One sentence, before a weight is read, and nothing is made."""
    monkeypatch.setattr(Source, "load", lambda *a, **k: pytest.fail("no weight may be read"))
    methods, ratios, options, message = WRONG[what]
    code, out, err = ask(tmp_path / "cmp", methods, ratios, *options)
    assert code == 2 and out == "" and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


def test_calibration_that_is_missing_or_not_wanted(tmp_path):
    words = (
        "compare-methods",
        pipeline.folder(),
        "-r",
        0.4,
        "-t",
        pipeline.text_file(),
        "-o",
        tmp_path / "cmp",
        *SMALL,
        "-m",
    )
    assert "calibration: flap needs text" in cli(*words, "flap")[2]
    assert "calibration: none of these methods reads text" in cli(*words, "magnitude", "-c", pipeline.text_file())[2]
    assert not list(tmp_path.iterdir())


def test_seeds_and_a_seed_contradict():
    question = Question("x", ["flap"], [0.2], "t", "c", seeds=2, calibrate=replace(api.CALIBRATION, seed=3))
    with pytest.raises(UserError, match="seed: 3 and --seeds 2 contradict each other"):
        comparison.prepare(question)


def test_folders_that_are_not_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "load", lambda *a, **k: pytest.fail("no weight may be read"))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    assert "is not a comparison that prunus wrote; give another --out" in ask(tmp_path / "thesis")[2]
    assert "is not a comparison that prunus wrote" in ask(tmp_path / "thesis" / "chapter.txt")[2]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "comparison.json").write_text("{")
    assert "not readable as JSON" in ask(tmp_path / "odd")[2]
    (tmp_path / "odd" / "comparison.json").write_text('{"format": 9}')
    assert "not a comparison of format 1" in ask(tmp_path / "odd")[2]
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_comparison_of_something_else(done, tmp_path):
    root, _ = done
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": d}) + "\n" for d in reversed(pipeline.corpus())))
    assert "another source, and one table must not mix them" in ask(root / "cmp", source=pipeline.folder("llama_tied"))[2]
    assert "another evaluation text" in ask(root / "cmp", text=other)[2]
    assert "another dtype" in ask(root / "cmp", "flap", (0.3,), "--dtype", "bfloat16")[2]


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    code, _, err = ask(tmp_path / "cmp")
    assert code == 2 and err == "prunus: plot: pictures need matplotlib; pip install 'prunus[plot]'\n"
    assert not list(tmp_path.iterdir())


# -- rows from records --------------------------------------------------------------------------------------------------


def a_record(request, perplexity, seed=None, cpu="a", rate=1.0, spread=0.0):
    speed = {"prefill_ms": 10.0, "decode_ms": 1.0, "prompt_tokens": 8, "gemm_flops_per_s": rate}
    speed |= {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 1.0, "prefill_spread": spread, "decode_spread": 0.0}
    text = {"windows": 2, "seq_len": 8, "source": "t", "documents": None, "seed": None}
    latency = {"cpu": cpu, "threads": 1, "prompt_tokens": 8, "new_tokens": 4, "repeats": 3}
    recipe = {"request": request, "seed": seed, "calibration": text if request else None, "latency": latency}
    sizes = {"params": 10, "block_params": 8, "flops": 5, "kv_bytes_per_token": 4, "model_type": "llama"}
    cut = {"cut_s": 2.0, "ratios": {"removed_of_block": 0.2}} if request else {}
    versions = {"prunus": "1", "torch": "2", "transformers": "3"}
    figures = {**sizes, **cut, "perplexity": perplexity, "bits_per_byte": 1.0, "speed": speed}
    return {"recipe": recipe, "figures": figures, "versions": versions, "commit": "abc"}


SCORED = {"windows": 2, "seq_len": 8, "source": "t", "documents": "-9:", "seed": 7}
ABOUT = {"source": "m", "dtype": "float32", "evaluation": SCORED}


def test_spread_over_draws_and_newest_first():
    asked = {"method": "flap", "ratio": 0.2}
    records = [a_record(asked, 99.0, 0), a_record(asked, 2.0, 0), a_record(asked, 4.0, 1), a_record(None, 1.0)]
    result = report.comparison(ABOUT, records)
    assert [row["method"] for row in result["rows"]] == ["dense", "flap"]
    assert result["rows"][1]["perplexity"] == {"mean": 3.0, "min": 2.0, "max": 4.0}
    header, cells = report.comparison_table(result)
    assert cells[1][header.index("perplexity")] == "3 (2 to 4)" and "calibration" not in header
    assert any("documents -9: (seed 7)" in note for note in result["notes"])


def test_what_is_not_finite_is_said():
    asked = {"method": "flap", "ratio": 0.2}
    result = report.comparison(ABOUT, [a_record(None, 1.0), a_record(asked, None, 0), a_record(asked, 4.0, 1)])
    header, cells = report.comparison_table(result)
    assert result["rows"][1]["perplexity"] is None and cells[1][header.index("perplexity")] == "not finite"


def test_other_machines_and_busy_ones_are_said():
    def notes(*records):
        return " ".join(report.comparison(ABOUT, list(records))["notes"])

    asked = {"method": "flap", "ratio": 0.2}
    calm = notes(a_record(None, 1.0), a_record(asked, 2.0))
    assert "busy" not in calm and "more than one setting" not in calm
    assert "more than one setting" in notes(a_record(None, 1.0), a_record(asked, 2.0, cpu="b"))
    assert "the machine was busy" in notes(a_record(None, 1.0), a_record(asked, 2.0, rate=1.3))
    assert "varied by 50%" in notes(a_record(None, 1.0), a_record(asked, 2.0, spread=0.5))


def test_two_calibration_texts_are_two_rows():
    asked = {"method": "flap", "ratio": 0.2}
    other = a_record(asked, 3.0)
    other["recipe"]["calibration"] = {**other["recipe"]["calibration"], "source": "u"}
    header, cells = report.comparison_table(report.comparison(ABOUT, [a_record(None, 1.0), a_record(asked, 2.0), other]))
    assert len(cells) == 3 and [row[header.index("calibration")] for row in cells[1:]] == [
        "2 windows of 8 tokens of t", "2 windows of 8 tokens of u",
    ]  # fmt: skip


def test_draws_are_no_first_windows_and_files_of_one_name_are_two():
    """A folder that was asked about the first windows, then about draws, then about another file: means of none are mixed."""
    asked = {"method": "flap", "ratio": 0.2}
    runs = [a_record(asked, 2.0), a_record(asked, 4.0, 0), a_record(asked, 6.0, 1), a_record(asked, 9.0)]
    for run, sha256 in zip(runs, ("a" * 64, "a" * 64, "a" * 64, "b" * 64), strict=True):
        run["recipe"]["calibration"] = {**run["recipe"]["calibration"], "source_sha256": sha256}
    result = report.comparison(ABOUT, [a_record(None, 1.0), *runs])
    found = {row["calibration"]: (row["draws"], row["perplexity"]["mean"]) for row in result["rows"][1:]}
    text = "2 windows of 8 tokens of t"
    assert found == {f"{text} (aaaaaaaa)": (1, 2.0), f"{text} (aaaaaaaa), drawn": (2, 5.0), f"{text} (bbbbbbbb)": (1, 9.0)}
    assert f"calibration: {text} (the first ones); {text} (draws by seed 0, 1)" in result["notes"]
    assert len({plots._series(row, True) for row in result["rows"]}) == 4


def test_the_recipe_names_all_that_changes_a_figure():
    """Each change of the question makes a new run; the batch size does not."""
    base = Question(
        str(pipeline.folder()), ["flap"], [0.3], str(pipeline.text_file()), str(pipeline.text_file()),
        calibrate=api.TextOptions(4, 16), evaluate=api.TextOptions(3, 16), latency=False,
    )  # fmt: skip

    def recipe(**changes):
        setting = comparison.prepare(replace(base, **changes))
        plan, seed = list(setting.runs())[1]
        return record.digest(setting.recipe(plan, seed))

    others = [
        recipe(methods=["shortgpt"], ratios=[0.4]), recipe(ratios=[0.4]), recipe(dtype="bfloat16"), recipe(latency=True),
        recipe(calibrate=api.TextOptions(5, 16)), recipe(evaluate=api.TextOptions(2, 16)), recipe(seeds=2),
        recipe(source=str(pipeline.folder("llama_tied"))),
    ]  # fmt: skip
    assert len({recipe(), *others}) == 9
    assert recipe(batch_size=2) == recipe()
    assert torch.is_grad_enabled()


def test_calibration_on_the_evaluation_text_is_warned_of(tmp_path):
    """The tiny corpus is both here: most of its 13-grams were seen."""
    code, out, err = ask(tmp_path / "cmp", "flap")
    assert (
        code == 0
        and "warning: " in out + err
        and "do not measure unseen text" in (tmp_path / "cmp" / "comparison.md").read_text()
    )
    text = ("-t", pipeline.text_file(), "--eval-windows", 3, "--eval-seq-len", 16, "--no-latency", "-o", tmp_path / "cmp")
    code, out, _ = cli("compare-methods", pipeline.folder(), "-m", "magnitude", "-r", 0.4, *text)
    assert (
        code == 0 and "flap" in out and "do not measure unseen text" in out
    )  # the row is still there, and so is its warning
