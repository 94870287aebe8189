"""What one-shot methods cost, as ratios in one run to the bare forward of the decoder blocks over the same windows.

The bare pass (float32, no LM head) and the method alternate, so that a noisy neighbour hits both; each method's figure is
the best of `--repeats` against the best bare pass. Peak memory is of a fresh process per method.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from prunus import api, record
from prunus.builders import make_plan
from prunus.network import offline
from prunus.oneshot import one_shot_
from prunus.planning import Request
from prunus.quickstart import default_source
from prunus.source import Source

C4 = "c4/c4_sample1.jsonl"
REQUESTS = {
    "flap": Request("flap", 0.2),
    "wanda": Request("wanda", 0.5),
    "wanda 2:4": Request("wanda", pattern="2:4"),
    "magnitude": Request("magnitude", 0.5),
    "minitron-width": Request("minitron-width", 0.2),
    "minitron-depth": Request("minitron-depth", 0.2),
}


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def bare_forward(model, ids_NT: torch.Tensor, batch_size: int) -> float:
    """Seconds of the decoder blocks alone over all windows, called as any training script would call them."""
    start = time.perf_counter()
    decoder = model.get_decoder()
    for ids in ids_NT.split(batch_size):
        decoder(input_ids=ids, use_cache=False)
    return time.perf_counter() - start


def one(name: str, data: Path, batch_size: int, repeats: int) -> dict:
    source = Source.open(default_source())
    windows = api.CALIBRATION.pack(source.tokenizer(), str(data / C4), False)
    plan = make_plan(source.config, source.anatomy, REQUESTS[name])
    model = source.load()
    bare = [bare_forward(model, windows.ids_NT, batch_size)]
    base_gib = peak_gib()
    seconds, stages = [], []
    for i in range(repeats if plan.method.sweeps < 5 else 1):
        if i:
            model = source.load()
            bare.append(bare_forward(model, windows.ids_NT, batch_size))
        start = time.perf_counter()
        outcome = one_shot_(plan, model, windows, batch_size=batch_size)
        seconds.append(time.perf_counter() - start)
        stages.append(outcome.seconds)
        if not i:
            gib = peak_gib()
        del outcome, model
    return {
        "method": name,
        "bare_s": min(bare),
        "method_s": min(seconds),
        "ratio": min(seconds) / min(bare),
        "all_bare_s": bare,
        "all_method_s": seconds,
        "stages_s": stages[seconds.index(min(seconds))],
        "peak_gib": gib,
        "peak_after_load_and_bare_gib": base_gib,
        "peak_above_gib": gib - base_gib,
        "windows": windows.num_windows,
        "seq_len": windows.seq_len,
        "batch_size": batch_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=list(REQUESTS))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    offline(online=False)
    if arguments.child:
        print(json.dumps(one(arguments.methods[0], arguments.data, arguments.batch_size, arguments.repeats)))
        return
    for name in arguments.methods:
        command = [sys.executable, __file__, "--child", "--data", str(arguments.data), "--methods", name]
        command += ["--batch-size", str(arguments.batch_size), "--repeats", str(arguments.repeats)]
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(
            f"{name:<16} {figures['method_s']:7.2f} s   bare {figures['bare_s']:6.2f} s   ratio {figures['ratio']:5.2f}   "
            f"peak {figures['peak_gib']:.2f} GiB (+{figures['peak_above_gib']:.2f})",
            flush=True,
        )
        if arguments.record:
            recipe = {"command": "benchmarks/oneshot.py", "request": REQUESTS[name].describe(), "data": C4}
            record.append(arguments.record, "oneshot-cost", recipe, figures)


if __name__ == "__main__":
    main()
