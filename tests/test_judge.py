"""Whose answers are better: both orders, ties, intervals, and judges that are no judges."""

import json
import math
import shutil
import sys

import pipeline
import pytest
import torch
from test_tasks import load

from prunus import cli, judge
from prunus.errors import UserError
from prunus.generations import prompts
from prunus.source import Source

LONGER = """
import json, sys
for line in sys.stdin:
    pair = json.loads(line)
    one, other = len(pair["first"]), len(pair["second"])
    print(json.dumps({"winner": "tie" if one == other else "first" if one > other else "second"}))
"""
ECHO = """
import json, sys
sys.stdout.reconfigure(encoding="utf-8")
for line in sys.stdin.buffer:
    print(json.dumps({"winner": "first", "why": json.loads(line)["prompt"]}, ensure_ascii=False))
"""


def program(tmp_path, text):
    """A judge as its words on the command line."""
    path = tmp_path / "asked.py"
    path.write_text(text, encoding="utf-8")
    return f"program:{sys.executable} {path}"


class Says:
    """A judge of a rule, which keeps what it was asked."""

    name = "says"

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def check(self, prompts, new_tokens): ...

    def decide(self, pairs, progress):
        self.asked += pairs
        return [self.rule(pair) for pair in pairs]


def longer(pair):
    one, other = len(pair.first), len(pair.second)
    return "tie" if one == other else "first" if one > other else "second"


def test_both_orders_decide_and_a_favoured_place_decides_nothing():
    prompts, mine, theirs = ["p", "q", "r", "s"], ["aaa", "b", "cc", "same"], ["a", "bb", "dd", "same"]
    by = Says(longer)
    said = judge.verdicts(by, prompts, mine, theirs)
    assert said.each == ("win", "loss", "tie", "tie") and said.swayed == 0 and said.win_rate == 0.5
    assert len(by.asked) == 6  # what is the same is not asked
    assert {(p.prompt, p.first, p.second) for p in by.asked} >= {("p", "aaa", "a"), ("p", "a", "aaa")}
    for place in ("first", "second"):
        said = judge.verdicts(Says(lambda pair, place=place: place), prompts, mine, theirs)
        assert set(said.each) == {"tie"} and said.swayed == 3 and said.win_rate == 0.5
    half = Says(lambda pair: "first" if pair.first == "aaa" else "tie")  # wins in one order, ties in the other
    assert judge.verdicts(half, prompts, mine, theirs).each[0] == "tie"
    turned = judge.verdicts(Says(longer), prompts, theirs, mine)
    assert turned.each == ("loss", "win", "tie", "tie")


def test_nobody_is_asked_about_the_same_answers():
    said = judge.verdicts(Says(lambda pair: 1 / 0), ["p"], ["x"], ["x"]).to_json()
    assert said["ties"] == 1 and said["p"] == 1.0


@pytest.mark.parametrize(("wins", "count"), [(0, 50), (7, 20), (25, 50), (50, 50), (1, 1)])
def test_interval_is_wilsons(wins, count):
    rate = wins / count
    low, high = judge.interval(rate, count)
    for p in (low, high):  # its ends are the true rates of which this one is just 1.96 standard errors off
        assert (rate - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / count, abs=1e-12)
    assert 0 <= low <= rate + 1e-12 and rate <= high + 1e-12 <= 1 + 2e-12 and low < high


def test_figures_of_verdicts():
    said = judge.Verdicts(("win",) * 6 + ("loss",) * 2 + ("tie",) * 2, 1).to_json()
    assert (said["wins"], said["losses"], said["ties"], said["swayed"], said["prompts"]) == (6, 2, 2, 1, 10)
    assert said["win_rate"] == 0.7 and said["p"] == pytest.approx(2 * (1 + 8 + 28) / 2**8)
    assert said["interval"][0] < 0.5 < 0.7 < said["interval"][1]


def test_lines_end_where_json_lines_end(tmp_path):
    """A JSON string may hold breaks that are none of JSONL, such as U+2028, in prompts and in what a judge says."""
    asked = [f"one{mark}line" for mark in "\u2028\u2029\u0085"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in asked), encoding="utf-8")
    assert prompts(path) == tuple(asked)
    by = judge.judge(program(tmp_path, ECHO), "float32")
    said = by.decide([judge.Pair(text, "a", "b") for text in asked], lambda *_: None)
    assert said == ["first"] * 3


def test_a_program_judges_on_the_command_line(tmp_path, capsys):
    prompts, records, page = tmp_path / "prompts.txt", tmp_path / "r.jsonl", tmp_path / "page.md"
    prompts.write_text("the cat sings\nunder a moon\nthe dog\n", encoding="utf-8")
    one, other = (str(pipeline.folder(case, 128)) for case in ("llama", "llama_tied"))
    arguments = ["eval", one, "--baseline", other, "--prompts", str(prompts), "--new-tokens", "4"]
    arguments += ["--judge", program(tmp_path, LONGER)]
    assert cli.run([*arguments, "--json", "--record", str(records), "--page", str(page)]) == 0
    told = json.loads(capsys.readouterr().out)
    mine, theirs = (row["written"] for row in told["models"])
    said = told["models"][0]["judged"][told["models"][1]["model"]]
    lengths = [len(a) - len(b) for a, b in zip(mine, theirs, strict=True)]
    assert said["each"] == ["win" if d > 0 else "loss" if d < 0 else "tie" for d in lengths]
    assert "judged" not in told["models"][1]
    kept = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    assert kept[0]["figures"]["judged"] and kept[0]["recipe"]["written"]["judge"].startswith("program:python")
    assert str(tmp_path) not in json.dumps(kept[0]["recipe"]["written"]["judge"])
    assert kept[0]["recipe"]["written"]["prompts"] == 3 and "the cat sings" not in json.dumps(kept[0]["recipe"])
    text = page.read_text(encoding="utf-8")
    assert text.count(": wins ") == 1 and all(f": {verdict}\n" in text for verdict in said["each"])
    assert cli.run(arguments) == 0
    assert "of 3 prompts" in capsys.readouterr().out


def test_models_of_one_name_are_told_apart(tmp_path, capsys):
    """Two baselines in folders called model, beside one called model (2): each has verdicts of its own."""
    prompts, records = tmp_path / "prompts.txt", tmp_path / "r.jsonl"
    prompts.write_text("the cat sings\nunder a moon\n", encoding="utf-8")
    places = [tmp_path / "a" / "mine", tmp_path / "b" / "model", tmp_path / "c" / "model (2)", tmp_path / "d" / "model"]
    for place, case in zip(places, ("llama", "llama_tied", "llama", "mistral"), strict=True):
        shutil.copytree(pipeline.folder(case, 128), place)
    arguments = [
        "eval",
        str(places[0]),
        "--prompts",
        str(prompts),
        "--new-tokens",
        "4",
        "--judge",
        program(tmp_path, LONGER),
    ]
    arguments += [word for place in places[1:] for word in ("--baseline", str(place))]
    assert cli.run([*arguments, "--json", "--record", str(records)]) == 0
    told = json.loads(capsys.readouterr().out)
    names = ["mine", "model", "model (2)", "model (3)"]
    assert [row["model"] for row in told["models"]] == names and list(told["models"][0]["judged"]) == names[1:]
    assert [row["model"] for row in told["against"]] == names[1:]
    for row in told["models"][1:]:
        lengths = [len(a) - len(b) for a, b in zip(told["models"][0]["written"], row["written"], strict=True)]
        said = told["models"][0]["judged"][row["model"]]["each"]
        assert said == ["win" if d > 0 else "loss" if d < 0 else "tie" for d in lengths]
    kept = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    assert [line["recipe"]["model"] for line in kept] == [place.name for place in places]


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_judges_by_the_likelier_letter(chat, tmp_path, monkeypatch):
    source = Source.open(str(pipeline.folder("llama", 128)))
    made, tokenizer = load(source)()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %} so:"
        monkeypatch.setattr(Source, "tokenizer", lambda self: tokenizer)
    room = source.config.max_position_embeddings
    by = judge.Model(source, "float32")
    monkeypatch.setattr(judge, "ASKED", "{prompt}: {first} or {second}?")
    pairs = [judge.Pair("the cat", "sings", "a moon"), judge.Pair("the cat", "a moon", "sings")]
    told = by.decide(pairs, lambda done, total: None)
    for pair, winner in zip(pairs, told, strict=True):
        asked = f"{pair.prompt}: {pair.first} or {pair.second}?"
        ids = tokenizer(f"{asked} so:" if chat else f"{asked}\n\nThe better answer is").input_ids
        if not chat:
            ids += [
                tokenizer.convert_tokens_to_ids("\u0120")
            ]  # the space with which its small vocabulary begins both letters
        logits = made(input_ids=torch.tensor([ids])).logits[0, -1].detach()
        first, second = (logits[tokenizer.convert_tokens_to_ids(letter)] for letter in "AB")
        assert winner == ("first" if first > second else "second")
    by.check(["the cat"], 1)
    with pytest.raises(UserError, match=f"sees {room}; lower --new-tokens"):
        by.check(["the cat"], room)


def test_letters_that_are_equally_likely_tie(monkeypatch):
    by = judge.Model(Source.open(str(pipeline.folder("llama", 128))), "float32")
    monkeypatch.setattr(judge, "ASKED", "{prompt}: {first} or {second}?")
    monkeypatch.setattr(judge.Model, "_letters", lambda self, tokenizer: ([], 3, 3))
    assert by.decide([judge.Pair("a", "b", "c")], lambda done, total: None) == ["tie"]


def test_letters_that_a_tokenizer_cannot_tell_apart(monkeypatch):
    by = judge.Model(Source.open(str(pipeline.folder("llama", 128))), "float32")
    monkeypatch.setattr(judge, "LETTERS", ("a", "a"))
    with pytest.raises(UserError, match="A and B are the same"):
        by.check(["a"], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit('no key')", "ended with code 1: no key"),
        ("raise SystemExit(3)", "ended with code 3: and says nothing"),
        ("print('{}')", "was asked 2 times and wrote 1 lines"),
        ("print('{}'); print('{}')", r"line 1 of program:python\S* is '\{\}'; write"),
        ("print('[1]'); print('[1]')", "line 1"),
        ("print('no'); print('no')", "line 1"),
    ],
)
def test_programs_that_do_not_judge(text, message, tmp_path):
    by = judge.judge(program(tmp_path, text), "float32")
    with pytest.raises(UserError, match=message):
        judge.verdicts(by, ["p"], ["a"], ["b"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("modl:x", "unknown judge 'modl' (did you mean 'model'?)"),
        ("program:", "names none"),
        ("program:'x", "is no command"),
        ("program:no-such-program --key k", "there is no program 'no-such-program'"),
        ("model:no/such", "no/such"),
    ],
)
def test_judges_that_are_none_are_refused_before_anybody_writes(spec, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Source, "load", lambda *_: 1 / 0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\n", encoding="utf-8")
    one, other = (str(pipeline.folder(case, 128)) for case in ("llama", "llama_tied"))
    assert cli.run(["eval", one, "--baseline", other, "--prompts", str(prompts), "--judge", spec]) == 2
    assert message in capsys.readouterr().err


def test_a_judge_needs_two_models_and_prompts(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\n", encoding="utf-8")
    one, spec = str(pipeline.folder("llama", 128)), program(tmp_path, LONGER)
    assert cli.run(["eval", one, "--prompts", str(prompts), "--judge", spec]) == 2
    assert "name the other with --baseline" in capsys.readouterr().err
    assert cli.run(["eval", one, "--text", str(prompts), "--judge", spec]) == 2
    assert "name them with --prompts" in capsys.readouterr().err


def test_wilsons_interval_is_never_too_narrow_for_ties():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        drawn = torch.multinomial(torch.tensor([0.3, 0.5, 0.2]), 50, replacement=True, generator=generator)
        rate = float((2 - drawn).double().mean() / 2)
        low, high = judge.interval(rate, 50)
        held += low <= 0.55 <= high
    assert held / 400 > 0.95 and math.isfinite(held)
