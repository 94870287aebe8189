"""Tasks from files to scores: rows are refused or brought into form; lm-eval's own model says the same; nothing is run twice."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pipeline
import pytest
import torch
from safetensors.torch import load_file, save_file

from prunus import appraisal, cli, show
from prunus.errors import UserError
from prunus.evaluation import Perplexity
from prunus.source import Source
from prunus.tasks import run
from prunus.tasks.local import named, read
from prunus.tasks.run import Asked, results
from prunus.tasks.table import MEANS, TASKS

WORDS = "the cat dog house river sings under a blue moon and nobody knows why stones fall from old trees".split()


def _text(generator, count):
    return " ".join(generator.choice(WORDS, count))


def rows_of(name, count):
    """Rows in the form of the published files; short, for a model of few positions."""
    generator = np.random.default_rng(len(name))
    some = lambda k: [_text(generator, 3) for _ in range(k)]  # noqa: E731
    make = {
        "arc_easy": lambda i: {"query": f"Question: {_text(generator, 6)}\nAnswer:", "choices": some(4), "gold": i % 4},
        "boolq": lambda i: {"question": _text(generator, 4), "passage": _text(generator, 12), "answer": i % 2 == 0},
        "hellaswag": lambda i: {
            "ctx_a": _text(generator, 6), "ctx_b": _text(generator, 2), "activity_label": "Doing", "endings": some(4),
            "label": str(i % 4),
        },
        "openbookqa": lambda i: {"query": f"Question: {_text(generator, 6)}\nAnswer:", "choices": some(4), "gold": i % 4},
        "piqa": lambda i: {"goal": _text(generator, 5), "sol1": _text(generator, 6), "sol2": _text(generator, 6), "label": i % 2},
        "sciq": lambda i: {
            "question": _text(generator, 5), "support": _text(generator, 8), "correct_answer": "moon",
            "distractor1": "cat", "distractor2": "old dog", "distractor3": "trees",
        },
        "winogrande": lambda i: {
            "sentence": f"{_text(generator, 4)} _ {_text(generator, 3)}", "option1": "cat", "option2": "dog",
            "answer": str(1 + i % 2),
        },
        "mmlu": lambda i: {
            "question": _text(generator, 5), "subject": ("anatomy", "virology")[i % 2], "choices": some(4), "answer": i % 4,
        },
        "lambada": lambda i: {"context": _text(generator, 10), "continuation": str(generator.choice(WORDS))},
    }  # fmt: skip
    make["arc_challenge"] = make["arc_easy"]
    return [make[name](i) for i in range(count)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        (folder / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows_of(name, 6))
        (folder / name / f"{task.split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model():
    return Source.open(str(pipeline.folder("llama", 128)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(source):
    return lambda: (source.load("float32"), source.tokenizer())


def never():
    raise AssertionError("nothing was left to compute")


# -- rows ---------------------------------------------------------------------------------------------------------------


def test_names():
    assert named("piqa, arc_easy,piqa") == ("piqa", "arc_easy")
    assert named("seven,lambada") == (*MEANS["seven"], "lambada") and set(MEANS["eight"]) - set(MEANS["seven"]) == {"sciq"}
    with pytest.raises(UserError, match="arc_easy"):
        named("arc_esy")
    with pytest.raises(UserError, match="names none"):
        named(" , ")


def test_rows_come_into_the_official_columns(data):
    for name, task in TASKS.items():
        found = read(data, name)
        assert len(found.rows) == 6 and all(set(row) == set(task.columns) for row in found.rows)
        assert "6 rows of the" in found.note()
    arc = read(data, "arc_easy").rows[1]
    assert arc["answerKey"] == "B" and arc["choices"]["label"] == list("ABCD") and "Question" not in arc["question"]
    official = {"question": "q", "choices": {"text": ["x"], "label": ["1"]}, "answerKey": "1", "id": "more"}
    (data / "arc_easy" / "again").mkdir(parents=True)
    (data / "arc_easy" / "again" / "arc_easy.jsonl").write_text(json.dumps(official), encoding="utf-8")
    row = read(data / "arc_easy" / "again", "arc_easy").rows[0]
    assert row == {k: official[k] for k in ("question", "choices", "answerKey")}


def test_another_split_is_said(tmp_path):
    (tmp_path / "sciq").mkdir()
    (tmp_path / "sciq" / "validation.jsonl").write_text(json.dumps(rows_of("sciq", 1)[0]), encoding="utf-8")
    assert read(tmp_path, "sciq").note() == "sciq: the validation split (1 rows), not the official test split"


WRONG = {
    "no file": (None, r"has no piqa/validation.jsonl; put its rows there"),
    "no JSON": ('{"goal": ', r"validation.jsonl:1 is no JSON"),
    "no object": ("[1]", r"validation.jsonl:1 is no object"),
    "no field": (
        '{"goal": "x", "sol1": "y", "label": 0}',
        r"validation.jsonl:1 has no sol2; a row needs goal, sol1, sol2, label",
    ),
    "empty": ("\n\n", r"validation.jsonl has no rows"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_rows_are_refused(what, tmp_path):
    text, message = WRONG[what]
    (tmp_path / "piqa").mkdir()
    if text is not None:
        (tmp_path / "piqa" / "validation.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(tmp_path, "piqa")


def test_simple_rows_that_hold_other_things_are_refused(tmp_path):
    (tmp_path / "arc_easy.jsonl").write_text(json.dumps({"query": "x", "choices": ["a"], "gold": 3}), encoding="utf-8")
    with pytest.raises(UserError, match="query, choices, gold do not hold what they should"):
        read(tmp_path, "arc_easy")


UNSCORABLE = {  # as test splits have them whose answers are hidden, and as hands and converters spoil them
    "piqa, hidden": ("piqa", {"label": -1}, "-1 is none of 2 answers"),
    "piqa, empty": ("piqa", {"sol1": ""}, "an answer is no text"),
    "hellaswag, hidden": ("hellaswag", {"label": ""}, "ctx_a.* say no right answer"),
    "hellaswag, too few": ("hellaswag", {"endings": ["a"], "label": "2"}, "2 is none of 1 answers"),
    "winogrande, hidden": ("winogrande", {"answer": ""}, "sentence.* say no right answer"),
    "winogrande, no blank": ("winogrande", {"sentence": "nothing"}, "substring not found"),
    "mmlu, by its letter": ("mmlu", {"answer": "C"}, "'C' is none of 4 answers"),
    "sciq, no text": ("sciq", {"support": None}, "support is 'None', which is no text"),
    "arc, hidden": ("arc_easy", {"gold": -1}, "query, choices, gold do not hold what they should"),
    "boolq, by its word": ("boolq", {"label": "yes"}, "'yes' is none of 2 answers"),
}


@pytest.mark.parametrize("what", UNSCORABLE)
def test_rows_that_cannot_be_scored_are_refused(what, tmp_path):
    name, change, message = UNSCORABLE[what]
    row = rows_of(name, 1)[0] | change
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(tmp_path, name)


def test_questions_that_cannot_be_asked(data, tmp_path, monkeypatch):
    for wrong, message in (
        ({"tasks": ("piqa",)}, "give --task-data FOLDER, or --online"),
        ({"tasks": ("piqa",), "task_data": tmp_path / "none"}, "no such file or folder"),
        ({"tasks": ("piqa",), "task_data": data, "limit": 0}, "limit: 0 items"),
        ({"texts": ("x",), "limit": 3}, "belong to --tasks"),
        ({"prompts": ("x",), "options": replace(appraisal.EVALUATION, stride=512)}, "belongs to --text"),
        ({"texts": ("x",), "chat": True}, "belong to --prompts"),
        ({"texts": ("x",), "new_tokens": 5}, "belong to --prompts"),
        ({}, "nothing to score"),
    ):
        with pytest.raises(UserError, match=message):
            appraisal.Question(**wrong).checked()
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'prunus\[eval\]'"):
        appraisal.Question(tasks=("piqa",), task_data=data).checked()


# -- scores -------------------------------------------------------------------------------------------------------------


def test_lm_eval_says_the_same(data, model, monkeypatch):
    """Its own model, request by request, on all tasks: every score the same, log-probabilities to 1e-4 in float32."""
    from lm_eval.models.huggingface import HFLM

    from prunus.tasks import harness

    asked = Asked.of(tuple(TASKS), data, None, online=False)
    ours = results(asked, load(model), {"model": "ours"})

    def plain(made, tokenizer, known, progress):
        return HFLM(pretrained=made, tokenizer=tokenizer, device="cpu", batch_size=4)

    monkeypatch.setattr(harness, "Shared", plain)
    theirs = results(asked, load(model), {"model": "theirs"})
    for name in TASKS:
        assert ours[name].items == theirs[name].items and len(ours[name].log_probs) == 6
        for mine, other in zip(ours[name].log_probs, theirs[name].log_probs, strict=True):
            assert mine == pytest.approx(other, abs=1e-4)
    assert {"acc", "acc_norm"} == set(ours["arc_easy"].items) and set(ours["lambada"].items) == {"acc"}


def test_what_is_known_is_not_run_again(data, model):
    asked = Asked.of(("piqa", "boolq"), data, 3, online=False)
    first = results(asked, load(model), {"model": "m"})
    assert [len(r.items["acc"]) for r in first.values()] == [3, 3]
    assert results(asked, never, {"model": "m"}) == first
    for other in (Asked.of(("piqa",), data, 4, online=False), asked):
        with pytest.raises(AssertionError, match="left to compute"):
            results(other, never, {"model": "m" if other is not asked else "another"})


def test_a_killed_evaluation_goes_on(data, model, cache, monkeypatch):
    from prunus.tasks import harness

    monkeypatch.setattr(harness, "TOKENS", 64)
    monkeypatch.setattr(harness.Shared.__init__, "__kwdefaults__", {"tokens": 64})
    asked = Asked.of(("hellaswag",), data, None, online=False)
    whole = results(asked, load(model), {"model": "whole"})
    seen = []

    def killed(done, total):
        seen.append((done, total))
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results(asked, load(model), {"model": "m"}, progress=killed)
    (part,) = cache.glob("tasks/*.part.jsonl")
    part.write_text(part.read_text(encoding="utf-8") + '\n["half a li', encoding="utf-8")
    after = []
    found = results(asked, load(model), {"model": "m"}, progress=lambda done, total: after.append((done, total)))
    assert after[-1][1] == seen[0][1] - seen[1][0]  # what was read before is not read again
    assert found["hellaswag"].items == whole["hellaswag"].items and not list(cache.glob("tasks/*.part.jsonl"))


def test_a_window_shorter_than_a_sequence_is_left_to_lm_eval(data):
    """A tree's mask would forget it: Mistral's, of 4 tokens here."""
    source = Source.open(str(pipeline.folder("mistral", 128)))
    found = results(Asked.of(("piqa",), data, 2, online=False), load(source), {"model": "m"})
    made, tokenizer = load(source)()
    row = read(data, "piqa").rows[0]
    context = tokenizer(f"Question: {row['goal']}\nAnswer:", add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"Question: {row['goal']}\nAnswer: {row['sol1']}", add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ]
    logs = made(input_ids=whole).logits[0].log_softmax(-1)[len(context) - 1 : -1].gather(1, whole[0, len(context) :, None])
    assert found["piqa"].log_probs[0][0] == pytest.approx(float(logs.detach().sum()), abs=1e-4)


def test_an_answer_longer_than_the_model_is_refused(data):
    source = Source.open(str(pipeline.folder("llama", 8)))
    with pytest.raises(UserError, match="the model reads 8 at most"):
        results(Asked.of(("piqa",), data, None, online=False), load(source), {"model": "m"})


# -- several models -----------------------------------------------------------------------------------------------------


def test_a_model_that_overflows_has_no_scores(data, tmp_path, capsys):
    folder = tmp_path / "large"
    shutil.copytree(pipeline.folder("llama", 128), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t * 1000 if "mlp" in n else t for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    asked = ["--dtype", "float16", "--json", "--record", str(tmp_path / "records.jsonl")]
    text = ["-t", str(pipeline.text_file()), "--windows", "2", "--seq-len", "16"]
    for what, message in (
        (text, "no finite number in float16"),
        (["--tasks", "piqa", "--task-data", str(data)], "are no numbers"),
    ):
        assert cli.run(["eval", str(folder), *what, *asked]) == 2
        assert message in capsys.readouterr().err
    assert Perplexity(math.nan, 3, 9, (), 2).to_json()["bits_per_byte"] is None  # of a comparison, which goes on


def test_texts_are_read_before_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("weights were read"))
    texts = (str(pipeline.text_file()), str(tmp_path / "none.txt"))
    question = appraisal.Question(texts, appraisal.TextOptions(4, 20))
    with pytest.raises(UserError, match="no such text file"):
        appraisal.appraise([str(pipeline.folder("llama", 128))], question)


def test_prompts_longer_than_the_model_are_refused_before_weights(monkeypatch):
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("weights were read"))
    source = str(pipeline.folder("llama", 128))
    size = len(Source.open(source).tokenizer()("the cat")["input_ids"])
    question = appraisal.Question(prompts=("the cat",), new_tokens=129 - size)
    with pytest.raises(
        UserError, match=f"prompt 1 has {size} tokens, and with {129 - size} new ones leaves the 128 positions"
    ):
        appraisal.appraise([source], question)


def test_models_side_by_side(data, tmp_path, capsys):
    one, other = (str(pipeline.folder(case, 128)) for case in ("llama", "llama_tied"))
    question = appraisal.Question(
        (str(pipeline.text_file()),), appraisal.TextOptions(4, 20), named("seven"), data, dtype="float32"
    )
    log = tmp_path / "log.jsonl"
    found = appraisal.appraise([one, other, one], question, record=log)
    first, second, again = found["models"]
    assert set(first["means"]) == {"seven"} and first["tasks"] == again["tasks"] and len(found["against"]) == 2
    apart, same = found["against"]
    assert {k: same["tasks"]["piqa"][k] for k in ("mean", "error", "p")} == {"mean": 0.0, "error": 0.0, "p": 1.0}
    for name in MEANS["seven"]:
        metric = TASKS[name].metric
        assert apart["tasks"][name]["mean"] == pytest.approx(
            first["tasks"][name][metric]["mean"] - second["tasks"][name][metric]["mean"]
        )
    assert apart["means"]["seven"]["mean"] == pytest.approx(
        first["means"]["seven"]["mean"] - second["means"]["seven"]["mean"]
    )
    (text,) = apart["texts"]
    assert text["loss"] == pytest.approx(first["texts"][0]["loss"] - second["texts"][0]["loss"]) and text["error"] > 0
    show.evaluation(found)
    told = f"less {second['model']}: {text['loss']:+.4f} ± {text['error']:.4f} nats a token"
    assert told in " ".join(capsys.readouterr().out.split())
    assert len(log.read_text(encoding="utf-8").splitlines()) == 3 and str(data) not in log.read_text(encoding="utf-8")
    assert len(found["notes"]) == 7


def test_the_same_weights_under_another_config_are_another_model(data, tmp_path):
    """But for what says where a config lay, who wrote it, and in which dtype."""
    question = appraisal.Question(tasks=("hellaswag",), task_data=data)
    folders = []
    for name, changes in (
        ("plain", {}),
        ("eps", {"rms_norm_eps": 20.0}),
        ("act", {"hidden_act": "relu"}),
        ("rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 1.2}}),
        ("same", {"transformers_version": "5.0.0", "dtype": "bfloat16"}),
    ):
        folder = shutil.copytree(pipeline.folder("llama", 128), tmp_path / name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        folders.append(str(folder))
    log = tmp_path / "log.jsonl"
    appraisal.appraise(folders, question, record=log)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    keys = [line["recipe"]["tasks"]["hellaswag"] for line in lines]
    assert len({key["weights_sha256"] for key in keys}) == 1 and len({key["config"] for key in keys}) == 4
    assert keys[-1] == keys[0] and len([*(tmp_path / "cache").glob("tasks/*.json")]) == 4
    texts = replace(question, texts=(str(pipeline.text_file()),), options=appraisal.TextOptions(4, 20))
    again = appraisal.appraise(folders[1:2], texts)  # whose config is read when the model is loaded
    assert again["models"][0]["tasks"] == lines[1]["figures"]["tasks"]
    assert len([*(tmp_path / "cache").glob("tasks/*.json")]) == 4


def test_strided_windows_predict_every_token_once():
    """What overlaps is read and not counted: 4 windows of 16, 6 apart, predict tokens 1 to 33, each from what is before it."""
    tokenizer, text = pipeline.tokenizer(), str(pipeline.text_file())
    windows = appraisal.TextOptions(4, 16, stride=6).checked("evaluation", 64).pack(tokenizer, text, False)
    whole = appraisal.TextOptions(1, 34).pack(tokenizer, text, False)
    assert windows.num_predictions == 33 and (windows.num_bytes, windows.num_words) == (whole.num_bytes, whole.num_words)
    made = pipeline.model("llama")
    from prunus.evaluation import perplexity

    expected = 0.0
    for i in range(4):
        ids = whole.ids_NT[:, 6 * i : 6 * i + 16]
        logs = made(input_ids=ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        expected -= float(logs[0 if i == 0 else 9 :].detach().sum())
    assert perplexity(made, windows).nll == pytest.approx(expected, rel=1e-5)
    for wrong, message in (({"stride": 16}, "it must be 1 to 15"), ({"stride": 4, "seed": 1}, "drop --stride or --seed")):
        with pytest.raises(UserError, match=message):
            appraisal.TextOptions(4, 16, **wrong).checked("evaluation", 64)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_words_of_strided_windows_are_those_of_their_text(stride):
    """A word that two windows share out is one: of a stride of 1 every token was a word."""
    tokenizer, text = pipeline.tokenizer(), str(pipeline.text_file())
    windows = appraisal.TextOptions(9, 16, stride=stride).pack(tokenizer, text, False)
    whole = appraisal.TextOptions(1, 16 + 8 * stride).pack(tokenizer, text, False)
    assert (windows.num_bytes, windows.num_words) == (whole.num_bytes, whole.num_words)


def test_all_full_windows():
    tokenizer, text = pipeline.tokenizer(), str(pipeline.text_file())
    every = appraisal.TextOptions(0, 50).checked("evaluation", 64).pack(tokenizer, text, False)
    assert every.num_windows > 5
    with pytest.raises(UserError, match=f"{every.num_windows + 1} windows of 50"):
        appraisal.TextOptions(every.num_windows + 1, 50).pack(tokenizer, text, False)
    with pytest.raises(UserError, match="too few"):
        appraisal.TextOptions(0, 50).checked("calibration", 64)


# -- for the eye --------------------------------------------------------------------------------------------------------


def test_models_write_behind_the_same_prompts(tmp_path, capsys):

    file = tmp_path / "prompts.txt"
    file.write_text("the cat sings\n\n[bold]under a moon\n", encoding="utf-8")
    one, other = (str(pipeline.folder(case, 128)) for case in ("llama", "llama_tied"))
    arguments = ["eval", one, "--baseline", other, "--prompts", str(file), "--new-tokens", "5"]
    assert cli.run([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompts"] == ["the cat sings", "[bold]under a moon"]
    source = Source.open(one)
    made, tokenizer = load(source)()
    ids = tokenizer("the cat sings", return_tensors="pt")["input_ids"]
    for _ in range(5):
        ids = torch.cat([ids, made(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert told["models"][0]["written"][0] == tokenizer.decode(ids[0, -5:], skip_special_tokens=True)
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert "[bold]under a moon" in out
    page = tmp_path / "page.md"
    assert cli.run([*arguments, "--first", "1", "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("## ") == 1 and "the cat sings" in text and "under a moon" not in text
    for model in told["models"]:
        assert f"**{model['model']}**\n\n```text\n{model['written'][0]}\n```" in text
    capsys.readouterr()
    assert cli.run([*arguments, "--page", str(page)]) == 2 and "page.md already exists" in capsys.readouterr().err
    assert cli.run([*arguments, "--first", "0"]) == 2 and "0 prompts are none" in capsys.readouterr().err
    assert (
        cli.run(["eval", one, "--text", str(file), "--first", "1"]) == 2 and "belong to --prompts" in capsys.readouterr().err
    )
    assert cli.run([*arguments, "--chat"]) == 2 and "has no chat template; drop --chat" in capsys.readouterr().err


def test_nothing_closes_a_fence(tmp_path):
    from prunus.generations import write_page

    write_page(tmp_path / "p.md", [{"model": "m", "written": ["````"]}], ["a\n```\n# not a heading"], new_tokens=3)
    lines = (tmp_path / "p.md").read_text(encoding="utf-8").splitlines()
    assert lines[4:] == [
        "## 1",
        "",
        "````text",
        "a",
        "```",
        "# not a heading",
        "````",
        "",
        "**m**",
        "",
        "`````text",
        "````",
        "`````",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "has none"),
        ("a.jsonl", '{"prompt": "x"}\n{"question": "y"}\n', "prompt 2 has no prompt, instruction or text"),
        ("a.json", "[1", "not readable as JSON"),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": "half \\ud800"}\n',
            "line 2: not readable as JSON: .*surrogates not allowed",
        ),
        ("a.json", '{"prompt": "x"}', "has none"),
        ("none/a.txt", None, "no such file"),
        ("a.txt", b"\xff\xfe", "^prompts: .*a.txt: not UTF-8 text"),
    ],
)
def test_prompts_that_are_none(name, text, message, tmp_path):
    from prunus.generations import prompts

    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        prompts(path)
