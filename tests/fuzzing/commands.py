"""Command lines that people could type. None of them may do long work: models are tiny, and outputs theirs."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pipeline
import training

from prunus.methods import METHODS

from .mutations import hostile

_WORDS = ("0", "1", "-1", "0.3", "1e9", "nan", "inf", "-inf", "", " ", "x", "2:4", ":5", "5:", "-5:", "a=b", "=",
    "a=", "hidden_size=16", "cpu",
          "hidden_size=-1", "rest", "float32", "bfloat16", "float8", "1,2", ",", "10**3", "99999999999999999999", "٣",
          "1_000", "4M", "200k", "-", "--", "all")  # fmt: skip
_COMMON = (
    "--json",
    "--dtype",
    "--seq-len",
    "--windows",
    "--seed",
    "--documents",
    "--field",
    "--out",
    "--overwrite",
    "--help",
)
_CUT = ("-m", "--method", "-r", "--ratio", "--pattern", "--target", "--uniform", "--multiple-of", "--compensate",
    "--option", "--split", "--sparsity",
        "--allocate", "--cost", "--sequential", "--dense", "--statistics", "-c")  # fmt: skip


def _commands(out: Path) -> list[tuple[list[object], tuple[str, ...]]]:
    """(a command line that is right, options that it might be given)."""
    model, text, data = pipeline.folder(), pipeline.text_file(), training.data()
    return [
        (["plan", model, "-m", "flap", "-r", "0.3", "-c", text], _CUT + _COMMON),
        (["plan", model, "-m", "minitron-width", "--target", "hidden_size=16", "-c", text], _CUT + _COMMON),
        (["plan", "--train", "scratch", "--rate", "1e9"], ("--set", "--devices", "--rate", "--memory", "--json",
        "--latency")),
        (["methods"], ("--json",)),
        (["inspect", model], _COMMON),
        (["verify", model], _COMMON),
        (["eval", model, "-t", text, "--windows", "1", "--seq-len", "8"], (*_COMMON, "--stride", "--protocol",
        "--limit", "--tasks", "--baseline", "--batch-size")),
        (["data", "inspect", data], ("--json", "--verify", "--range", "--show")),
        (["data", "tokenizer", text, "--vocab-size", "300", "--out", out / "t"], ("--field", "--separator",
        "--vocab-size", "--json")),
        (["data", "prepare", text, "-t", model, "--out", out / "d"], ("--split", "--field", "--shard-tokens",
        "--licence", "--json", "--separator")),
        (["data", "overlap", text, text], ("--json", "--n", "--field", "--ngram")),
        (["ledger", training.finished()], ("--json", "--parents")),
        (["recipes", "list"], ("--json",)),
        (["runs", training.finished()], ("--json",)),
        (["advise", "--target-params", "1B", "--tokens", "50B", "--parent-params", "8B"], ("--target-params",
        "--tokens", "--parent-params", "--granularity", "--rate", "--device", "--json")),
        (["card", out / "model"], ("--results", "--base-model", "--licence", "--overwrite", "--json")),
        (["export", model, "--type", "f32", "-o", out / "m.gguf"], ("--type", "--format", "--overwrite", "--modelfile")),
        (["push", model, "a/b"], ("--online-not", "--private")),
        (["study", "plan", "nothing.yaml"], ("--rate", "--processes", "--json")),
        (["report", out / "run", "--out", out / "r.html"], ("--overwrite", "--json")),
    ]  # fmt: skip


def arguments(place: Path, rng: Random) -> list[object]:
    """A command line with one to three things wrong, or right by chance. Outputs stay in the folder, and nothing goes online."""
    words, options = rng.choice(_commands(place))
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        what = rng.randrange(6)
        i = rng.randrange(1, len(words)) if len(words) > 1 else 0
        if what == 0:
            words.insert(i, rng.choice(options))
        elif what == 1:
            words += [rng.choice(options), _word(rng)]
        elif what == 2:
            words[i] = _word(rng)
        elif what == 3 and len(words) > 1:
            del words[i]
        elif what == 4:
            words += (
                [rng.choice(("-m", "--method")), rng.choice((*METHODS, "flap+wanda", "x"))]
                if "plan" in words
                else [_word(rng)]
            )
        else:
            words.insert(i, _word(rng))
    return [word for word in words if word != "--online"]


def _word(rng: Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(_WORDS)
    return str(hostile(rng))[:2000].encode("utf-8", "replace").decode().replace("\0", "")
