"""What is shipped: licences that are known, and a wheel that is the same when it is built again."""

import subprocess
import sys
import zipfile
from pathlib import Path

TOOLS = Path(__file__).parent.parent / "tools"


def test_licences_of_the_core_are_known():
    done = subprocess.run([sys.executable, TOOLS / "licences.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") > 20 and "torch " in done.stdout and "transformers " in done.stdout


def test_a_licence_that_is_not_known_is_said(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import licences

    monkeypatch.setattr(licences, "named", lambda found: "GPL-3.0")
    lines, wrong = licences.unknown(["pyyaml"])
    assert len(lines) == len(wrong) == 1 and wrong[0].startswith("PyYAML ")
    said = {"MIT AND GPL-3.0": False, "GPL-2.0 OR MIT": True, "nothing": False, "MIT License; MIT": True, "LIMITED": False}
    assert {text: licences.is_known(text) for text in said} == said


def test_vulnerabilities_that_nobody_looked_at_are_said(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import audit

    hole = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"], "description": "bad"}
    known, other, unknown = {"name": "x", "version": "1.0", "vulns": [hole]}, {"name": "y", "vulns": []}, {"name": "z"}
    told = {"dependencies": [known, other, unknown]}
    assert audit.found(told) == (["x 1.0: PYSEC-1, mended in 2.0"], [], 2)
    monkeypatch.setattr(audit, "LOOKED_AT", {"CVE-1": "not called here"})
    assert audit.found(told) == ([], ["x 1.0: PYSEC-1, mended in 2.0 (not called here)"], 2)


def test_ci_audits():
    assert "make audit" in (TOOLS.parent / ".ci" / "run").read_text(encoding="utf-8")


def test_a_wheel_is_the_same_when_it_is_built_again(tmp_path):
    done = subprocess.run([sys.executable, TOOLS / "wheel.py", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "prunus/py.typed" in names and "prunus/recipes/scratch.yaml" in names
    assert not [name for name in names if name.startswith(("tests/", "runs/", "results/"))]
