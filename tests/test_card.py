"""Model cards: what is on record is told, nothing else is, and hostile names stay text."""

import json
import shutil

import pipeline
import pytest
import yaml
from pipeline import cli

from prunus.errors import UserError
from prunus.export import hub
from prunus.export.card import Given, plain, write


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    base = tmp_path_factory.mktemp("card")
    out = base / "out"
    words = ("-m", "flap", "-r", 0.4, "-c", pipeline.text_file(), "--windows", 4, "--seq-len", 16)
    assert cli("prune", pipeline.folder("llama_tied"), *words, "-o", out)[0] == 0
    log = base / "records.jsonl"
    texts = ("-t", pipeline.text_file(), "--windows", 3, "--seq-len", 20)
    assert cli("eval", out, "--baseline", pipeline.folder("llama_tied"), *texts, "--record", log)[0] == 0
    return out, log


def test_what_is_on_record_is_told(cut, tmp_path):
    folder, log = tmp_path / "out", cut[1]
    shutil.copytree(cut[0], folder)
    told = write(folder, Given((log,), "ORG/NAME", "apache-2.0"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    manifest = json.loads((folder / "prunus.json").read_text(encoding="utf-8"))
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["base_model"], head["library_name"]) == ("apache-2.0", "ORG/NAME", "transformers")
    for said in (
        f"{manifest['after']['params']:,} parameters, cut from {manifest['before']['params']:,}",
        "flap (An et al. 2023", "asked for ratio 0.4", manifest["weights_sha256"], "trust_remote_code=True",
        "4 windows of 16 tokens of `corpus.jsonl`",
    ):  # fmt: skip
        assert said in text, said
    figures = json.loads(log.read_text(encoding="utf-8").splitlines()[0])["figures"]["texts"][0]
    assert (
        f"| {plain('corpus.jsonl')} | 3 x 20 | {figures['perplexity']:.4g} | {figures['bits_per_byte']:.4f} | float32 |"
        in text
    )
    assert told["results"] == 1 and "\n\n\n" not in text
    assert cli("verify", folder)[0] == 0  # a card changes nothing that is checked
    assert cli("card", folder, "--results", log)[0] == 0  # its own card it writes anew, and the licence is carried over
    assert yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])["license"] == "apache-2.0"


def test_tasks_have_their_errors(cut, tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log.jsonl"
    shutil.copytree(cut[0], folder)
    row = json.loads(cut[1].read_text(encoding="utf-8").splitlines()[0])
    score = {"mean": 0.4321, "error": 0.0123, "items": 1234}
    row["figures"] |= {"tasks": {"piqa": {"metric": "acc_norm", "acc_norm": score}}, "means": {"seven": score}}
    log.write_text(json.dumps(row) + "\n", encoding="utf-8")
    write(folder, Given((log,)))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "| piqa | acc_norm | 43.2 ± 1.2 | 1,234 |" in text and "mean of seven" in text
    assert "licence is not on record" in text and "license" not in yaml.safe_load(text.split("---")[1])


def test_a_run_has_a_ledger(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pipeline.folder(), run / "model")
    recipe = {"recipe": {"name": "efficientllm"}}
    figures = {"tokens": 1000, "params": 99, "flops": {}, "seconds": 1.5, "pruning": {"source_params": 12345}}
    line = {"kind": "train", "recipe": recipe, "recipe_hash": "abc", "figures": figures, "machine": {}, "versions": {}}
    line |= {"commit": None, "time": "now"}
    (run / "record.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    stage = {"name": "efficientllm", "tokens": 1000, "flops": {"train": 123456}}
    (run / "ledger.json").write_text(json.dumps({"format": 1, "stages": [stage]}), encoding="utf-8")
    write(run, Given())
    text = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "by the recipe efficientllm (abc) on 1,000 tokens, cut from 12,345 parameters" in text
    assert "| efficientllm | 1,000 | 1.23e+05 |" in text and "None recorded for these weights" in text


def test_hostile_names_stay_text(tmp_path):
    assert plain("a|b`c`<script>\n# [x](y)") == "a&#124;b&#96;c&#96;&#60;script&#62; &#35; &#91;x&#93;(y)"
    run = tmp_path / "x](evil) <b>"
    shutil.copytree(pipeline.folder(), run)
    write(run, Given(base="<script>alert(1)</script>", licence="mit\nevil: true"))
    text = (run / "README.md").read_text(encoding="utf-8")
    head, body = text.split("---")[1], "---".join(text.split("---")[2:])
    assert "<script>alert" not in body.replace("`<script>alert(1)</script>`", "") and "<b>" not in body
    assert yaml.safe_load(head)["license"] == "mit\nevil: true"


def test_what_is_refused(cut, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(cut[0], folder)
    (folder / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is not a card that prunus wrote"):
        write(folder, Given())
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    write(folder, Given(), overwrite=True)
    with pytest.raises(UserError, match="no such file"):
        write(folder, Given((tmp_path / "none.jsonl",)))
    other = tmp_path / "other"
    shutil.copytree(pipeline.folder("llama"), other)
    with pytest.raises(UserError, match="has no record of prunus eval on these weights"):
        write(other, Given((cut[1],)))


def test_nothing_is_pushed_unasked(cut, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(cut[0], folder)
    for arguments, message in (
        ({"repo": "a/b", "online": False}, "say so with --online"),
        ({"repo": "a", "online": True}, "is no name on the hub"),
        ({"repo": "a/b", "online": True}, r"has no README\.md; prunus card"),
    ):
        with pytest.raises(UserError, match=message):
            hub.push(folder, private=False, **arguments)
    with pytest.raises(UserError, match=r"has no config\.json"):
        hub.push(tmp_path, "a/b", private=False, online=True)
