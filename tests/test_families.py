"""The family table's errors."""

from __future__ import annotations

import pytest

from prunus.errors import UserError, unknown
from prunus.families import BY_MODEL_TYPE, family_of


def test_unknown_families_are_told_the_nearest_the_list_and_the_page():
    with pytest.raises(UserError) as caught:
        family_of("lama")
    message = str(caught.value)
    assert message.startswith("unknown model family 'lama' (did you mean 'llama'?): prunus knows gemma, gemma2, ")
    assert all(name in message for name in BY_MODEL_TYPE)
    assert "docs/add-a-family.md" in message
    with pytest.raises(UserError, match="unknown model family 'xxxxxxxx': prunus knows"):
        family_of("xxxxxxxx")


def test_types_of_ours_belong_to_the_family_they_were_cut_from():
    assert all(family_of(f"pruned_{t}") is family for t, family in BY_MODEL_TYPE.items())


def test_unknown_names_in_general():
    error = unknown("method", "wnda", ["wanda", "flap"], "see --list")
    assert str(error) == "unknown method 'wnda' (did you mean 'wanda'?): known are flap, wanda; see --list"
    assert str(unknown("method", "zzz", ["wanda"])) == "unknown method 'zzz': known are wanda"
