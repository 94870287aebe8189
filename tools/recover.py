"""SmolLM2-135M cut by a fifth (flap) and trained on 200,000 tokens of C4, plain and taught by its parent.

Every step is a command that a user would type, in the folder `--work`, where a second call goes on. Perplexity is of text
that neither calibration nor training reads: WikiText-2, and the last 100 C4 documents. One record an arm.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from prunus import api, record
from prunus.checkpoint import read_manifest
from prunus.cli import run as prunus
from prunus.quickstart import default_source
from prunus.source import Source

C4, WIKITEXT = "c4/c4_sample1.jsonl", "wikitext2/wiki.test.raw"
SEEN = 900  # documents; those behind them are scored
CUT = ["--method", "flap", "--ratio", "0.2"]
COMMON = ["precision=float32", "validate.every=10", "validate.sequences=16", "save.every=5", "log_every=1"]
ARMS = {"plain": ("continue", []), "distilled": ("distill", ["teacher.source={parent}"])}


def do(*words: object) -> None:
    """A command; the end if it fails."""
    print("prunus", *words, file=sys.stderr)
    if code := prunus([str(word) for word in words]):
        raise SystemExit(code)


def scores(model: Path | str, data: Path) -> dict[str, Any]:
    """Perplexities, and the windows that they are of."""
    out = {}
    for name, text, options in (
        ("wikitext2", WIKITEXT, api.EVALUATION),
        ("c4-unseen", C4, api.TextOptions(16, 1024, documents="-100:")),
    ):
        found, windows = api.evaluate(str(model), str(data / text), options=options)
        out[name] = found.to_json() | {"text": windows.provenance()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext2/")
    parser.add_argument("--work", type=Path, required=True, help="where texts, tokens, checkpoints and runs go")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--tokens", default="200k")
    parser.add_argument("--lr", default="3e-4")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    arguments = parser.parse_args()
    work, parent = arguments.work, default_source()
    work.mkdir(parents=True, exist_ok=True)
    text, tokens, cut = work / "c4.jsonl", work / "tokens", work / "cut"
    if not text.exists():
        with (arguments.data / C4).open(encoding="utf-8") as file:
            text.write_text("".join(islice(file, SEEN)), encoding="utf-8")
    if not (tokens / "manifest.json").exists():
        folder = Source.open(parent).tokenizer().save_pretrained(work / "tokenizer")
        splits = [word for share in ("validation=0.04", "retrain=rest") for word in ("--split", share)]
        do("data", "prepare", text, "--tokenizer", Path(folder[0]).parent, "--out", tokens, *splits)
    if not cut.exists():
        do("prune", parent, *CUT, "--calibration", text, "--out", cut)
    made = read_manifest(cut)
    done = {row["recipe_hash"] for row in record.read(arguments.record)} if arguments.record.exists() else set()
    for name, model in (("parent", parent), ("cut", cut)):
        recipe = {
            "command": "tools/recover.py",
            "arm": name,
            "request": made.method["request"],
            "weights": made.weights_sha256,
        }
        if record.digest(recipe) not in done:
            params = Source.open(str(model)).anatomy.num_params
            record.append(
                arguments.record, "recovery", recipe, {"params": params, "tokens": 0, **scores(model, arguments.data)}
            )
    for name in arguments.arms:
        recipe_name, more = ARMS[name]
        out = work / f"{name}-{arguments.tokens}-{arguments.lr}"
        sets = [*COMMON, f"optimizer.lr={arguments.lr}", f"name={name}", *(word.format(parent=parent) for word in more)]
        flags = [word for change in sets for word in ("--set", change)]
        do("train", recipe_name, "--source", cut, "--data", tokens, "--tokens", arguments.tokens, "--out", out, *flags)
        trained = record.read(out / "record.jsonl")[-1]
        recipe = {"command": "tools/recover.py", "arm": name, **trained["recipe"]}
        if record.digest(recipe) not in done:
            record.append(arguments.record, "recovery", recipe, trained["figures"] | scores(out / "model", arguments.data))


if __name__ == "__main__":
    main()
