"""One of the processes that torchrun starts for test_distributed.py: `worker.py jobs.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import warm

from prunus import reload, verification
from prunus.errors import UserError
from prunus.train import export, opening, recipe, run
from prunus.train.loop import Hook

torch.set_num_threads(1)
verify = export.check_saved
verification.clean_process = warm.Forks(reload.__file__)


class StopError(Exception):
    pass


class At(Hook):
    """A step that no process sees the end of."""

    def __init__(self, step, how, rank):
        self.step, self.how, self.rank = step, how, rank

    def before_clip(self, training):
        pass

    def after_step(self, training):
        if training.step == self.step and self.rank in (None, int(os.environ["RANK"])):
            if self.how == "die":
                os._exit(7)
            raise StopError


for job in json.loads(Path(sys.argv[1]).read_text()):
    hooks = (At(job["at"], job["how"], job.get("rank")),) if "at" in job else ()
    asked = recipe.parse(job["recipe"], "worker")
    export.check_saved = verify if job.get("verify") else lambda stage, expected: {}  # a clean process costs seconds
    try:
        run.execute(opening.prepare(asked, Path(job["out"])), hooks=hooks)
    except StopError:
        pass
    except run.StoppedError as stop:
        sys.exit(stop.code)
    except UserError as error:
        print("refused:", error, file=sys.stderr, flush=True)
        sys.exit(2)
