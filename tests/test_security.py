"""What SECURITY.md promises: nothing unpickled, no socket, nothing outside the output, no token told, no name that breaks out."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pipeline
import pytest
import training
from fuzzing.watched import Watch
from pipeline import cli
from test_study_results import EVIL, Reader, folder, line

import prunus
from prunus import report
from prunus.data import prepare
from prunus.errors import UserError, one_line
from prunus.export import hub
from prunus.generations import write_page
from prunus.source import Source
from prunus.study import file as studies
from prunus.study import results
from prunus.study.formats import as_markdown

ROOT = Path(prunus.__file__).parent
TOKEN = "hf_thecanarythatnobodymaysing"

# -- the main commands, watched -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """(what the watch found, folder, what was said) of a cut, its evaluation, training, and their pages."""
    root = tmp_path_factory.mktemp("watched")
    (root / "tmp").mkdir()
    model, text = shutil.copytree(pipeline.folder(), root / "model"), shutil.copy(pipeline.text_file(), root / "text.jsonl")
    recipe = root / "recipe.yaml"
    recipe.write_text(json.dumps(training.asked().plain()), encoding="utf-8")
    out = root / "out"
    told = [
        ("plan", model, "-m", "flap", "-r", 0.3, "-c", text, "--windows", 4, "--seq-len", 16),
        ("prune", model, "-m", "flap", "-r", 0.3, "-c", text, "--windows", 4, "--seq-len", 16, "-o", out / "cut"),
        ("eval", out / "cut", "-t", text, "--windows", 2, "--seq-len", 16, "--record", out / "eval.jsonl"),
        ("card", out / "cut", "--results", out / "eval.jsonl"),
        ("data", "prepare", text, "-t", model, "-o", out / "data"),
        ("train", recipe, "-o", out / "run"),
        ("report", out / "run"),
        ("ledger", out / "run"),
        ("export", model, "--type", "f32", "-o", out / "model.gguf"),
    ]
    watch, said = Watch(root), []
    with pytest.MonkeyPatch.context() as patch:
        pipeline.verify_here(patch)
        patch.setattr(tempfile, "tempdir", str(root / "tmp"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            patch.setenv(name, TOKEN)
        for words in told:
            watch.begin(root)
            code, *both = cli(*words)
            found = watch.end()
            assert code == 0 and not found, (words[0], found, both)
            said += both
    return root, said


def test_nothing_is_unpickled_sent_or_written_elsewhere(watched):
    """The fixture has looked; here, that the watch sees what it is there for."""
    import pickle

    watch = Watch(watched[0])
    watch.begin(watched[0])
    pickle.loads(pickle.dumps(Path("x")))
    assert "pickle.find_class" in watch.end()
    watch.begin(watched[0])
    with tempfile.TemporaryFile():
        pass
    assert "writes outside" in watch.end()


def test_tokens_are_never_told(watched):
    root, said = watched
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 30 and not any(TOKEN.encode() in path.read_bytes() for path in files)
    assert not any(TOKEN in text for text in said)


def test_sockets_are_refused_in_the_suite_and_its_processes():
    with pytest.raises(RuntimeError, match="tests are offline"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "tests are offline" in done.stderr
    with socket.socket() as server:  # processes of one machine may speak
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname(), timeout=5).close()


# -- what the code may not say ------------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {
    "tarfile",
    "zipfile",
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
}
FORBIDDEN_CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "np.savez", "np.lib.format.open_memmap",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system", "os.popen",
    "pty.spawn", "shutil.unpack_archive",
}  # fmt: skip
NAMED = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True, "shell": False}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_in_the_package_could_unpickle_or_run_what_it_reads(path):
    """PyTorch's distributed checkpoints are ours as safetensors and JSON (train/saved.py), so there is no exception here."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & FORBIDDEN_MODULES, names
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in FORBIDDEN_CALLS, f"line {node.lineno}: {name}"
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for option, right in NAMED.items():
            if option in given:
                value = given[option]
                right_one = isinstance(value, ast.Constant) and value.value is right
                assert right_one, f"line {node.lineno}: {option} is {ast.unparse(value)}"
        if name in ("np.load", "numpy.load", "np.save", "numpy.save"):
            assert "allow_pickle" in given, f"line {node.lineno}: {name} without allow_pickle=False"


# -- hostile checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(pipeline.folder(), tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "a\\..\0.safetensors", "config.json", "x.bin"],
)
def test_weights_of_an_index_lie_in_its_folder(model, name):
    (model / "model.safetensors").rename(model.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"leaves the folder|is missing|is no safetensors file") as caught:
        Source.open(str(model))
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


def test_code_beside_weights_is_not_run(model):
    """Neither a model's nor a tokenizer's, whatever their configs ask for."""
    (model / "evil.py").write_text(f"open({str(model / 'ran')!r}, 'w')\n", encoding="utf-8")
    for file, kind in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        told = json.loads((model / file).read_text(encoding="utf-8"))
        told["auto_map"] = {kind: "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
        (model / file).write_text(json.dumps(told), encoding="utf-8")
    source = Source.open(str(model))
    _ = source.anatomy, source.tokenizer(), source.load()
    assert not (model / "ran").exists()


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "config.json", "model.safetensors"])
def test_pipes_are_not_waited_for(model, name):
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(UserError, match=name):
        Source.open(str(model))


@pytest.mark.parametrize("name", ["log.jsonl", "record.jsonl", "checkpoints", ".lock", "checkpoints/step-1"])
def test_links_in_a_folder_are_not_written_through(tmp_path, name):
    """A run folder from elsewhere, with a link to a file of the user's: going on with it would append there, or cut it back."""
    victim, out = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    shutil.copytree(training.finished(), out)
    (out / ".lock").unlink(missing_ok=True)
    if (out / name).is_dir():
        shutil.rmtree(out / name)
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(victim)
    with pytest.raises(UserError, match=rf"{name}: is a link, and what is written there would land elsewhere"):
        training.run(out)
    assert not [*victim.iterdir()]


def test_links_in_half_prepared_data_are_not_written_through(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "victim").write_text("{}", encoding="utf-8")
    (data / "progress.json").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match=r"progress\.json: is a link"):
        prepare.prepare([prepare.Text(str(pipeline.text_file()))], pipeline.tokenizer(), data)


def test_links_are_not_uploaded(model, tmp_path):
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (model / "README.md").write_text("x", encoding="utf-8")
    (model / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"push: .*notes.txt is a link"):
        hub.push(model, "a/b", private=True, online=True)


@pytest.mark.parametrize("arm", ["..", "a/b", ".hidden", "", "a\nb", "/tmp/x", "cuts"])
def test_arms_name_folders_of_their_study(arm, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"name": "x", "arms": {arm: {"model": "m"}}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"study.yaml: arm '"):
        studies.read(path)


def test_grids_that_nobody_can_run(tmp_path):
    grid = {f"seed+data.{i}": list(range(100)) for i in range(9)}
    told = {"name": "x", "arms": {"P": {"model": "m"}}, "compare": [{"protocol": "training-tokens", "arms": ["P", "P"]}]}
    (tmp_path / "study.yaml").write_text(json.dumps(told | {"grid": grid}), encoding="utf-8")
    with pytest.raises(UserError, match=r"study\.yaml: .*its grid has 1,000,000,000,000,000,000 places, more than 2,000"):
        studies.read(tmp_path / "study.yaml")


def test_yaml_that_unfolds_is_refused_before_it_does(tmp_path):
    bomb = "a: &a [x, x]\n" + "\n".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    )
    for text, message in (
        (bomb, "unfold to more than"),
        ("a: &a [*a]", "unfold to more than"),
        ("name: 2020-99-99", "not readable as YAML"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: \0", r"holds the character U\+0000"),
    ):
        (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            studies.read(tmp_path / "study.yaml")


def test_a_message_tells_a_terminal_nothing():
    assert str(UserError("a\nb\x1b[2J\u202ec\ud800")) == "a\\nb\\x1b[2J\\u202ec\\ud800"
    assert len(str(UserError("x" * 10**6))) < 2000 and one_line("naïve 猫") == "naïve 猫"


# -- pages ----------------------------------------------------------------------------------------------------------------------

MARKDOWN = "![x](http://evil/x) [y](javascript:z) <img src=x> | `a"


def test_markdown_pages_hold_names_as_text(tmp_path):
    name = EVIL + MARKDOWN
    out = folder(tmp_path, [line(name, 0, 3.0, name=name)], name=name, compare=[{"protocol": name, "arms": [name, "S"]}])
    write_page(tmp_path / "page.md", [{"model": name, "written": ["```\n" + name]}], [name], new_tokens=3)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", page, flags=re.MULTILINE | re.DOTALL)
    assert page.count("alert") > outside.count("alert") > 0
    for text in (as_markdown(results.load(out)), report.cell(name), outside):
        assert "<script" not in text and "<img" not in text and "](" not in text.replace("]\\(", "")


def test_pages_of_runs_hold_names_as_text(tmp_path):
    run = shutil.copytree(training.finished(), tmp_path / "run")
    told = json.loads((run / "recipe.json").read_text(encoding="utf-8")) | {"name": EVIL}
    (run / "recipe.json").write_text(json.dumps(told), encoding="utf-8")
    assert cli("report", run)[0] == 0
    reader = Reader()
    reader.feed((run / "report.html").read_text(encoding="utf-8"))
    assert reader.tags.count("script") == 1 and not reader.loads and "img" not in reader.tags
