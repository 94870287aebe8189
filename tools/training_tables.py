"""Tables of docs/results.md about training: recovery of what was cut, speed, runs."""

from __future__ import annotations

from typing import Any

from oneshot_tables import CORPORA

from prunus.tables import markdown, number


def recovery_table(rows: list[dict[str, Any]]) -> list[str]:
    """A cut model before and after it is trained on, and its parent."""
    order = ("parent", "cut", "plain", "distilled")
    header = ["model", "parameters", "tokens", "lr", "FLOPs", "minutes", *(name for _, name in CORPORA), "commit"]
    cells = []
    for r in sorted(rows, key=lambda r: order.index(r["recipe"]["arm"])):
        f = r["figures"]
        cells.append(
            [
                r["recipe"]["arm"], f"{f['params']:,}", f"{f['tokens']:,}", f"{f['lr']:g}" if "lr" in f else "",
                f"{sum(f['flops'].values()):.3g}" if "flops" in f else "",
                f"{f['seconds'] / 60:.1f}" if "seconds" in f else "",
                *(number(f[corpus]["perplexity"]) for corpus, _ in CORPORA), r["commit"] or "",
            ]
        )  # fmt: skip
    trained = next((r["recipe"]["recipe"] for r in rows if "recipe" in r["recipe"]), None)
    how = ""
    if trained:
        how = (
            f" Trained on C4 that no evaluation reads, sequences of {trained['data']['seq_len']}, "
            f"{trained['batch_tokens']:,} tokens an update, {trained['schedule']['kind']}, {trained['precision']}; "
            "one seed; perplexity."
        )
    return [
        f"`tools/recover.py`: SmolLM2-135M cut by `flap --ratio 0.2`, then trained on.{how}",
        "",
        *markdown(header, cells),
    ]


def speed_table(rows: list[dict[str, Any]]) -> list[str]:
    """`benchmarks/train.py`: what a step and each option of a recipe costs, against a bare loop in the same run."""
    header = [
        "processor",
        "shape",
        "precision",
        "row",
        "tokens/s",
        "times the bare loop",
        "of the matmul rate",
        "first step, s",
    ]
    header += ["kept for the way back, MiB", "commit"]
    cells, besides = [], []
    for r in rows:
        f, recipe = r["figures"], r["recipe"]
        bare, peak = f["step_s"]["bare loop"], f["gemm_flops_per_s"]
        for name, seconds in f["step_s"].items():
            kept = f["kept_bytes"].get(name)
            cells.append(
                [
                    r["machine"]["cpu"], recipe["shape"], recipe["precision"], name, f"{f['tokens'] / seconds:,.0f}",
                    f"{bare / seconds:.2f}", f"{f['step_flops'] / seconds / peak:.0%}", f"{f['first_step_s'][name]:.0f}",
                    "" if kept is None else f"{kept / 2**20:,.0f}", r["commit"] or "",
                ]
            )  # fmt: skip
        besides.append(
            f"{recipe['shape']}, {r['machine']['cpu']}: {sum(f['besides_s'].values()) / f['step_s']['plain']:.2%}"
        )
    m = rows[0]["machine"]
    return [
        "`benchmarks/train.py --options`, rows taking turns in one run, each in a process of its own; "
        f"{m['threads']} threads. What a run does besides its steps (reading, log, ledger), of a plain step: {'; '.join(besides)}.",
        "",
        *markdown(header, cells),
    ]


def train_table(rows: list[dict[str, Any]]) -> list[str]:
    """Runs of `prunus train`: what they saw, what they cost, what they reached."""
    header = [
        "run",
        "parameters",
        "tokens",
        "training FLOPs",
        "minutes",
        "tokens/s",
        "of the matmul rate",
        "precision",
        "validation loss",
        "by tokens seen",
        "commit",
    ]
    cells = []
    for r in rows:
        f, recipe = r["figures"], r["recipe"]["recipe"]
        losses = [(line["tokens"], line["validation"]["loss"]) for line in f["validation"]]
        curve = ", ".join(f"{tokens / 1e6:.1f} M: {loss:.2f}" for tokens, loss in losses)
        cells.append(
            [
                recipe["name"], f"{f['params']:,}", f"{f['tokens']:,}", f"{sum(f['flops'].values()):.3g}",
                f"{f['seconds'] / 60:.1f}",
                f"{f['tokens'] / f['seconds']:,.0f}", f"{f['share_of_peak']:.0%}" if "share_of_peak" in f else "",
                recipe["precision"], f"{losses[-1][1]:.4f}" if losses else "", curve,
                r["commit"] or "",
            ]
        )  # fmt: skip
    data = sorted(
        {f"{name} (`{d['manifest']}`, range {d['range']})" for r in rows for name, d in r["recipe"]["data"].items()}
    )
    m = rows[0]["machine"]
    return [
        f"`prunus train`; loss in nats a token on the validation range; data: {', '.join(data)}; {m['cpu']}, {m['threads']} "
        "threads.",
        "",
        *markdown(header, cells),
    ]
