"""Files of every format version that was ever written are read: kept samples, which nothing may write anew.

A new format is a new folder under `samples`, and what reads it goes on reading these.
"""

import json
from pathlib import Path

import pytest

from prunus import record
from prunus.checkpoint import read_keep, read_manifest
from prunus.data.shards import Manifest, Shards
from prunus.ledger import Ledger
from prunus.study.page import of_run
from prunus.train import recipe as recipes

SAMPLES = sorted((Path(__file__).parent / "samples").iterdir())


@pytest.fixture(params=SAMPLES, ids=lambda path: path.name)
def sample(request):
    return request.param


def test_a_checkpoint(sample):
    made = read_manifest(sample)
    assert made.method["name"] == "flap" and made.before["params"] == 44768 > made.after["params"]
    kept, config = read_keep(sample), json.loads((sample / "config.json").read_text())
    assert kept is not None and len(kept.units["layers.0.intermediate"]) <= 32 and config["model_type"].endswith("llama")
    assert [stage.name for stage in Ledger.read(sample).stages] == ["flap"]


def test_a_training_run(sample, tmp_path):
    recipe = recipes.parse(json.loads((sample / "recipe.json").read_text()), "recipe.json")
    (row,) = record.read(sample / "record.jsonl")
    ledger = Ledger.read(sample / "run-ledger.json")
    assert recipe.steps * recipe.batch_tokens == row["figures"]["tokens"] == ledger.total_tokens
    page = of_run(sample)
    assert dict(page.facts)["parameters"] == "44.77 k" and len(page.charts) == 2


def test_prepared_data(sample):
    manifest = Manifest.read(sample / "tokens")
    manifest.verify(sample / "tokens")
    for name in manifest.ranges:
        assert int(Shards.open(sample / "tokens", name).ends[-1]) == manifest.tokens(name) > 0
