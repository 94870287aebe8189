"""Instruction tuning: learns answers alone, keeps the chat template, is on the ledger and proven; what is refused."""

import json

import checkpoints
import pipeline
import pytest
import torch
from pipeline import cli
from transformers import AutoTokenizer

from prunus import checkpoint
from prunus.errors import UserError
from prunus.ledger import Ledger
from prunus.source import Source
from prunus.train import tuning

TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% else %} :{% endif %}{% endfor %}"
)
SMALL = ("--set", "held_out=4", "--set", "batch=4", "--set", "micro_batch=2", "--set", "max_length=56", "--set", "lr=0.01")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A checkpoint whose tokenizer speaks as a chat."""
    tokenizer = AutoTokenizer.from_pretrained(pipeline.folder("llama_tied"))
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("chatty") / "model"
    return checkpoints.save_folder(folder, pipeline.model("llama_tied", dtype=torch.float32), tokenizer)


@pytest.fixture
def rows(tmp_path):
    found = [
        {"instruction": f"{i} cats on the log", "input": "and dogs" if i % 2 else "", "output": "sat on the mat"}
        for i in range(20)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(found))
    return tmp_path / "rows.json"


def test_it_learns_and_is_proven(chatty, rows, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    words = ("tune", chatty, "--data", rows, "--out", out, *SMALL, "--record", log)
    code, said, err = cli(*words, "--json")
    assert code == 0, err
    figures = json.loads(said)["figures"]
    assert figures["loss_after"] < figures["loss_before"] - 0.5 and figures["updates"] == 12 == len(figures["losses"])
    assert (figures["rows"], figures["held_out"], figures["too_long"]) == (16, 4, 0)
    assert figures["verified"]["clean_process"] and figures["verified"]["generated_equal"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    stage = Ledger.read(out).stages[-1]
    seen = sum(
        len(tokenizer.apply_chat_template(one["prompt"] + one["completion"], tokenize=True, return_dict=False))
        for one in (tuning.asked(row, tokenizer) for row in tuning.rows_of(rows)[:16])
    )
    assert stage.tokens == figures["tokens"] == 3 * seen
    assert json.loads(log.read_text())["kind"] == "tune" and str(tmp_path) not in log.read_text()
    code, _, err = cli(*words)
    assert code == 2 and "already exists; give another --out, or --overwrite" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "out", "rows.json"]


def test_what_learned_in_bfloat16_is_what_is_saved(chatty, rows, tmp_path):
    """accelerate wraps forward in an autocast: the model in memory would be checked in another precision than the saved one."""
    words = ("tune", chatty, "--data", rows, "--out", tmp_path / "out", *SMALL, "--set", "precision=bfloat16-autocast")
    code, said, err = cli(*words, "--set", "epochs=1", "--json")
    assert code == 0, err
    verified = json.loads(said)["figures"]["verified"]
    assert verified["generated_equal"] and verified["max_logit_difference"] < 1e-4


def test_only_answers_count(chatty, rows, tmp_path):
    """The loss held out, by hand: the mean over tokens of answers, of what comes before them none."""
    source = Source.open(str(chatty))
    recipe = tuning.read("alpaca", ["held_out=4", "batch=4", "micro_batch=4", "max_length=56", "epochs=0.25", "lr=1e-9"])
    _, figures = tuning._trained(source, source.tokenizer(), tuning.rows_of(rows), recipe, lambda *_: None)
    model, tokenizer, losses = source.load(), source.tokenizer(), []
    for row in tuning.rows_of(rows)[-4:]:
        one = tuning.asked(row, tokenizer)
        before = tokenizer.apply_chat_template(one["prompt"], tokenize=True, return_dict=False)
        whole = tokenizer.apply_chat_template(one["prompt"] + one["completion"], tokenize=True, return_dict=False)
        with torch.no_grad():
            said = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        losses += [-float(said[i - 1, whole[i]]) for i in range(len(before), len(whole))]
    assert figures["loss_before"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_without_a_template_rows_are_alpacas():
    told = tuning.asked({"instruction": "Add.", "input": "1 2", "output": "3"}, pipeline.tokenizer())
    assert told == {
        "prompt": "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "completion": "3",
    }
    assert "### Input" not in tuning.asked({"instruction": "Add.", "output": "3"}, pipeline.tokenizer())["prompt"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["epoch=2"], r"field 'epoch' does not exist \(did you mean 'epochs'\?\)"),
        (["lr=0"], "field 'lr': 0 is wrong: input should be greater than 0"),
        (["seed=4294967296"], "field 'seed': 4294967296 is wrong: input should be less than 4294967296"),
        (["lr"], "--set: 'lr' is not NAME=VALUE"),
        (["batch=6", "max_length=56"], "micro_batch: 4 does not divide batch, 6"),
        (["held_out=20", "max_length=56"], "20 of 20 rows leave none to learn from"),
        (["max_length=100"], "max_length: 100 tokens are more than the 64 positions"),
        (["max_length=8", "held_out=4"], "max_length: no row to learn from has a token of its answer within 8 tokens"),
    ],
)
def test_wrong_recipes(changes, sentence, chatty, rows, tmp_path):
    with pytest.raises(UserError, match=sentence):
        recipe = tuning.read("alpaca", ["held_out=4", *changes])
        tuning.tune(Source.open(str(chatty)), rows, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_recipe():
    with pytest.raises(UserError, match=r"recipe 'alpacca' does not exist \(did you mean 'alpaca'\?\)"):
        tuning.read("alpacca")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[]", "has no rows"),
        ("{", "not readable as JSON"),
        (
            '[{"instruction": "a \\ud800", "output": "b"}]',
            "^data: .*rows.json: not readable as JSON: .*surrogates not allowed",
        ),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "row 2 of .* has no output with text in it"),
        ('[{"instruction": " ", "output": "b"}]', "row 1 of .* has no instruction"),
        ('[{"instruction": "a", "output": "b", "input": 3}]', "the input of row 1 of .* is 3"),
    ],
)
def test_wrong_rows(text, sentence, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        tuning.rows_of(tmp_path / "rows.json")


def test_sparse_weights_are_not_filled(tmp_path, rows):
    folder = pipeline.saved("sparse")[0]
    assert (folder / checkpoint.EXTRA / "mask.safetensors").is_file()
    with pytest.raises(UserError, match="tuning would fill them again"):
        tuning.tune(Source.open(str(folder)), rows, tuning.read("alpaca", ["held_out=4"]), tmp_path / "out")
