"""What a method measured, beside its checkpoint: it comes back, or it is refused."""

from __future__ import annotations

import pytest
import torch

from prunus import saliency
from prunus.criteria import Scores
from prunus.errors import UserError


def test_scores_come_back(tmp_path):
    scores = Scores({"layers.0.intermediate": torch.tensor([1.0, 3.0]), "hidden": torch.arange(4.0)})
    saliency.save_scores(scores, tmp_path / "prunus")
    found = saliency.load_scores(tmp_path / "prunus")
    assert set(found) == set(scores.values) and all(torch.equal(found[n], v) for n, v in scores.values.items())
    assert saliency.load_scores(tmp_path) == {} and saliency.load_measured(tmp_path, "losses") == {}


def test_scores_that_cannot_be_read(tmp_path):
    (tmp_path / "scores.safetensors").write_bytes(b"\x01")
    with pytest.raises(UserError, match=r"scores.safetensors"):
        saliency.load_scores(tmp_path)
    (tmp_path / "losses.json").write_text("{")
    with pytest.raises(UserError, match=r"losses.json: not readable as JSON"):
        saliency.load_measured(tmp_path, "losses")
    (tmp_path / "losses.json").write_text("[]")
    with pytest.raises(UserError, match=r"losses.json: expected a JSON object"):
        saliency.load_measured(tmp_path, "losses")


def test_what_older_versions_saved(tmp_path):
    """Losses without each layer, as JSON: a loss that was no number is none in JSON, and comes back as one that is no number."""
    (tmp_path / "scores.json").write_text('{"losses": [2.5, null, 3.0], "more": [1.0]}')
    found = saliency.load_scores(tmp_path)
    assert set(found) == {"layers"} and found["layers"].dtype == torch.float32
    assert found["layers"][[0, 2]].tolist() == [2.5, 3.0] and found["layers"].isnan().tolist() == [False, True, False]
    assert saliency.load_measured(tmp_path, "scores")["more"] == [1.0]


def test_scores_are_saved_in_float32(tmp_path):
    wide = torch.arange(6, dtype=torch.float64).reshape(2, 3).T[0]  # neither float32 nor side by side in memory
    for _ in range(2):  # into a folder that is there by now
        saliency.save_scores(Scores({"hidden": wide}), tmp_path / "prunus")
    found = saliency.load_scores(tmp_path / "prunus")["hidden"]
    assert found.dtype == torch.float32 and found.tolist() == [0.0, 3.0]
    (tmp_path / "prunus" / "scores.safetensors").write_bytes(b"\x02" + 7 * b"\x00" + b"{}")
    assert saliency.load_scores(tmp_path / "prunus") == {}
