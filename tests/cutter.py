"""One of the processes that torchrun starts for test_shared_calibration.py: `cutter.py FOLDER`.

Every case is cut by all processes together; each writes what it came to.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pipeline
import torch
from test_every_method import request_for

from prunus.anatomy import Anatomy
from prunus.combination import planned
from prunus.distributed import ALONE, World
from prunus.methods import ONE_SHOT
from prunus.oneshot import one_shot_
from prunus.planning import Request

WINDOWS = pipeline.windows(
    9, 16
)  # five for one process and four for the other, in batches of two; more tokens than channels
MORE = {  # what rows of the table do not do by themselves
    "owl": {"method": "wanda", "options": {"allocation": "owl"}},
    "search": {"method": "flap", "allocate": "search", "options": {"generations": "2", "offspring": "2"}},
    "sequential": {"method": "wanda-sp", "order": "sequential"},
    "refitted": {"method": "minitron-width", "compensate": "least-squares"},
    "vector": {"method": "llm-pruner", "options": {"score": "vector", "protect": "0,0"}},
    "second order": {"method": "llm-pruner", "options": {"score": "second", "protect": "0,0"}},
    "one basis each": {"method": "slicegpt", "uniform": False},
    "perplexity": {"method": "shortened-llama", "options": {"score": "perplexity", "protect": "0,0"}},
}


def cases():
    """Name -> fields of a request."""
    config = pipeline.config("llama")
    rows = {name: request_for(name, config) for name in ONE_SHOT}
    return rows | {name: rows[more["method"]] | more for name, more in MORE.items()}


def cut(fields, world=ALONE):
    """What one process came to."""
    model = pipeline.model("llama")
    plan = planned(model.config, Anatomy.of(model.config), Request(**fields))
    outcome = one_shot_(plan, model, WINDOWS, batch_size=2, world=world)
    return {
        "keep": None if outcome.keep is None else {name: list(units) for name, units in outcome.keep.units.items()},
        "mask": None if outcome.mask is None else dict(outcome.mask.kept),
        "weights": pipeline.state(outcome.model),
        "losses": outcome.losses,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with World.joined() as here:
        torch.save({name: cut(fields, here) for name, fields in cases().items()}, Path(sys.argv[1]) / f"{here.rank}.pt")
