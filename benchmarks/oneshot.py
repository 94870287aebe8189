"""What every one-shot method costs: seconds, their ratio to the bare passes that it needs, peak memory, and perplexity.

Each row of the method table runs once at one ratio (`STRUCTURED`, `SPARSE`) in a fresh process, whose peak is the method's.
The bare work is measured in the same process, and alternates with the method so that a noisy neighbour hits both; the best
of each counts:

- forward: the decoder blocks alone (float32, no LM head) over the method's windows;
- back: a training step's forward and backward pass over them, loss included, gradients of all block matrices;
- algebra: the products X^T X and the factorisations, solves and updates that the method is made of, at the sizes of one
  block times the number of blocks, called one after another on random numbers.

`Floor.limit` says what a method may take: 1.25 x the passes it needs, or its passes and 1.25 x (SparseGPT: 2 x) its
algebra. One that reads no text has no limit: its ratio says how far from free it is. Neither have methods that try candidates
on the whole model's loss; they use fewer windows (see `windows_of`). Perplexity is of the cut model on the first `EVALUATION`
windows of WikiText-2: enough to see that it still works.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prunus import api, record
from prunus.anatomy import Anatomy
from prunus.builders import make_plan
from prunus.evaluation import perplexity
from prunus.methods import ONE_SHOT
from prunus.network import offline
from prunus.oneshot import one_shot_
from prunus.planning import Plan, Request
from prunus.products import fast
from prunus.quickstart import default_source
from prunus.source import Source
from prunus.statistics import reading_points

C4, WIKITEXT = "c4/c4_sample1.jsonl", "wikitext2/wiki.test.raw"
EVALUATION = api.TextOptions(4, 1024)
STRUCTURED, SPARSE = 0.2, 0.5
REQUESTS = {name: Request(name, SPARSE if row.is_sparse else STRUCTURED) for name, row in ONE_SHOT.items()}
SWAPS = 32  # at most, of OSSCAR
FEW, TRIES = 8, 720  # windows, and passes over one window, of a method that tries candidates on the whole model's loss


def windows_of(plan: Plan) -> int:
    """Calibration windows: fewer where every candidate takes a pass of its own."""
    if plan.method.criterion != "loss-without":
        return api.CALIBRATION_WINDOWS
    return min(FEW, round(TRIES // plan.method.sweeps))


# -- bare work ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward(model, ids_NT: Tensor, batch_size: int) -> None:
    """The decoder blocks alone, called as any training script would call them."""
    decoder = model.get_decoder()
    for ids in ids_NT.split(batch_size):
        decoder(input_ids=ids, use_cache=False)


def back(model, anatomy: Anatomy, ids_NT: Tensor, batch_size: int) -> None:
    """Loss, and its gradients at all block matrices summed over the windows, by autograd and nothing else."""
    wanted = {name for name, tensor in anatomy.tensors.items() if tensor.layer is not None and tensor.is_matrix}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    for ids in ids_NT.split(batch_size):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def products(x_TC: Tensor, windows: int) -> Tensor:
    """X^T X in float32, window by window."""
    gram_CC = x_TC.T @ x_TC
    for _ in range(windows - 1):
        gram_CC.addmm_(x_TC.T, x_TC)
    return gram_CC


def obs(gram_CC: Tensor, out: int, kept: int) -> None:
    """SparseGPT: two Cholesky factors and an inverse, then what each block of columns does to those behind it."""
    size, block = len(gram_CC), 128
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram_CC)), upper=True)
    w_CO = torch.randn(size, out)
    for start in range(0, size, block):
        end = min(start + block, size)
        w_CO[start:].addmm_(upper[start:end, start:].T, w_CO[start:end].clone(), alpha=-1)


def admm(gram_CC: Tensor, out: int, kept: int) -> None:
    """Alternating directions: one factorisation, and thirty times all weights by its inverse."""
    inverse, weight = torch.cholesky_inverse(torch.linalg.cholesky(gram_CC)), torch.randn(out, len(gram_CC))
    weight @ gram_CC @ inverse
    for _ in range(30):
        weight @ inverse


def refit(gram_CC: Tensor, out: int, kept: int) -> None:
    """Least squares on the inputs that stay, float64."""
    gram, weight = gram_CC.double(), torch.randn(out, len(gram_CC), dtype=torch.float64)
    right = weight @ gram[:, :kept]
    torch.cholesky_solve(right.T, torch.linalg.cholesky(gram[:kept, :kept]))


def eliminate(gram_CC: Tensor, out: int, kept: int) -> None:
    """An inverse and W^T W, both updated 64 inputs at a time until `kept` stay; then `refit`. Float64."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram_CC.double()))
    weight = torch.randn(out, len(gram_CC), dtype=torch.float64)
    square = weight.T @ weight
    for left in range(len(gram_CC), kept, -64):
        rows = inverse[: min(64, left - kept), :left]
        inverse[:left, :left].addmm_(rows.T, rows, alpha=-1)
        square[:left, :left].addmm_(rows.T, rows, alpha=-2)
    refit(gram_CC, out, kept)


def judge(gram_CC: Tensor, out: int, kept: int) -> None:
    """Two eliminations a pass: in the first one of all windows and one of each half, in the second the cut's own."""
    eliminate(gram_CC, out, kept)
    eliminate(gram_CC, out, kept)


def swap(gram_CC: Tensor, out: int, kept: int) -> None:
    """`eliminate`, and `SWAPS` pivots: each updates what is known of all inputs, and asks what inside says of outside."""
    eliminate(gram_CC, out, kept)
    table, values = gram_CC.double(), torch.randn(out, len(gram_CC), dtype=torch.float64)
    for _ in range(SWAPS):
        values[:, :kept].T @ values[:, kept:]
        values.addmm_(values[:, :2], table[:2], alpha=0.0)
        table.addmm_(table[:2].T, table[:2], alpha=0.0)


def rotate(gram_CC: Tensor, out: int, kept: int) -> None:
    """The principal directions, float64."""
    torch.linalg.eigh(gram_CC.double())


# -- what a method needs, and may take ------------------------------------------------------------------------------------

Solve = Callable[[Tensor, int, int], None]


@dataclass(frozen=True)
class Floor:
    """The bare work that a method cannot do without, and what it may take in multiples of it."""

    forwards: float = 0.0
    backs: float = 0.0
    solve: Solve | None = None
    points: tuple[tuple[str, str], ...] = ()  # inputs that have a Gram matrix
    passes: float = 0  # over all Gram matrices
    share: float = 1.0  # the limit's factors: of the passes, and of the algebra
    of_algebra: float = 1.25
    most_forwards: float | None = None

    @classmethod
    def of(cls, plan: Plan) -> Floor | None:
        """None where nothing is asked: the method tries candidates, and its cost is their number."""
        method = plan.method
        if method.criterion == "loss-without":
            return None
        read = (("attention", "q"), ("mlp", "intermediate"))
        everything = (("attention", "hidden"), *read, ("mlp", "hidden"))
        if plan.compensator == "obs":
            return cls(2, solve=obs, points=everything, passes=1, of_algebra=2.0, most_forwards=3.3)
        if plan.compensator == "admm":
            return cls(2, solve=admm, points=everything, passes=1)
        if method.criterion == "output-error":  # gradients, error curves of the dense model, and the cut block by block
            return cls(3, backs=1, solve=judge, points=read, passes=2)
        if plan.allocator == "rotation":
            return cls(2, solve=rotate, points=(("attention", "hidden"), ("mlp", "hidden")), passes=1)
        if plan.compensator == "least-squares":
            return cls(2, solve=_CHOICES.get(method.criterion, refit), points=read, passes=1)
        if plan.graded_tensors:
            return cls(backs=1, share=1.25)
        return cls(method.sweeps, share=1.25)

    def limit(self, forward_s: float, back_s: float, algebra_s: float) -> float:
        """Seconds that the method may take."""
        limit = self.share * (self.forwards * forward_s + self.backs * back_s)
        if self.solve is not None:
            limit += self.of_algebra * algebra_s
        return limit if self.most_forwards is None else min(limit, self.most_forwards * forward_s)


_CHOICES: dict[str, Solve] = {"obs-units": eliminate, "least-squares-error": swap}


def algebra(floor: Floor, plan: Plan, seq_len: int, windows: int) -> Iterator[Callable[[], None]]:
    """One call for each Gram matrix of a block: its products, and what is solved with it."""
    assert floor.solve is not None
    ratio = plan.request.ratio or 0.0
    points = reading_points(plan.anatomy, 0)
    for point in floor.points:
        shapes = [plan.anatomy.tensors[name].shape for name in points[point]]
        size, out = shapes[0][1], sum(shape[0] for shape in shapes)
        x_TC = torch.randn(seq_len, size)
        yield partial(_one_matrix, floor, x_TC, windows, out, round((1 - ratio) * size))


def _one_matrix(floor: Floor, x_TC: Tensor, windows: int, out: int, kept: int) -> None:
    assert floor.solve is not None
    gram_CC = products(x_TC, windows)
    gram_CC.diagonal().add_(float(gram_CC.diagonal().mean()))
    floor.solve(gram_CC, out, kept)


# -- one method -----------------------------------------------------------------------------------------------------------


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@fast()  # bare work has the kernels that methods have
def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def one(name: str, data: Path, batch_size: int, repeats: int, count: int | None) -> dict:
    source = Source.open(default_source())
    plan = make_plan(source.config, source.anatomy, REQUESTS[name])
    tokenizer = source.tokenizer()
    text = api.TextOptions(min(count or api.CALIBRATION_WINDOWS, windows_of(plan)), api.CALIBRATION_SEQ_LEN)
    windows = text.pack(tokenizer, str(data / C4), False)
    held_out = EVALUATION.pack(tokenizer, str(data / WIKITEXT), False)
    floor = Floor.of(plan)
    times: dict[str, list[float]] = {"forward": [], "back": [], "algebra": [], "method": []}
    stages = []
    for i in range(1 if floor is None else repeats):
        model = source.load()
        times["forward"].append(seconds(partial(forward, model, windows.ids_NT, batch_size)))
        if not i:
            base_gib = peak_gib()
        start = time.perf_counter()
        outcome = one_shot_(plan, model, windows if plan.needs_text else None, batch_size=batch_size)
        times["method"].append(time.perf_counter() - start)
        stages.append(outcome.seconds)
        if not i:
            gib = peak_gib()  # before anything else in this process takes more
            quality = perplexity(outcome.model, held_out).to_json()
        del outcome, model
        if floor is not None and floor.solve is not None:
            calls = list(algebra(floor, plan, windows.seq_len, windows.num_windows))
            block = sum(min(seconds(call) for _ in range(3)) for call in calls)
            times["algebra"].append(floor.passes * block * plan.anatomy.shape.num_hidden_layers)
        if floor is not None and floor.backs:
            model = source.load()
            times["back"].append(seconds(partial(back, model, plan.anatomy, windows.ids_NT, batch_size)))
            del model
    best = {kind: min(values, default=0.0) for kind, values in times.items()}
    limit = None if floor is None else floor.limit(best["forward"], best["back"], best["algebra"])
    of = "back" if floor is not None and floor.backs and not floor.forwards else "forward"
    return {
        "method": name,
        "bare_s": best[of],
        "bare": of,
        "method_s": best["method"],
        "ratio": best["method"] / best[of],
        "limit": limit / best[of] if limit else None,  # as the ratio
        "met": best["method"] <= limit if limit else None,
        "forward_s": best["forward"],
        "back_s": best["back"] or None,
        "algebra_s": best["algebra"] or None,
        "all_s": times,
        "stages_s": stages[times["method"].index(best["method"])],
        "peak_gib": gib,
        "peak_after_load_and_bare_gib": base_gib,
        "peak_above_gib": gib - base_gib,
        "windows": windows.num_windows if plan.needs_text else 0,
        "seq_len": windows.seq_len,
        "batch_size": batch_size,
        "evaluation": held_out.provenance(),
        "wikitext2": quality,
    }


# -- all of them ----------------------------------------------------------------------------------------------------------


def line(f: dict) -> str:
    bare = ", ".join(f"{kind} {f[f'{kind}_s']:.2f}" for kind in ("forward", "back", "algebra") if f[f"{kind}_s"])
    limit = "no limit" if f["limit"] is None else f"limit {f['limit']:5.2f} {'met' if f['met'] else 'MISSED'}"
    ppl = f["wikitext2"]["perplexity"]
    return (
        f"{f['method']:<16} {f['method_s']:7.2f} s = {f['ratio']:6.2f} x {f['bare']:<7} {limit:<18} "
        f"peak {f['peak_gib']:.2f} GiB (+{f['peak_above_gib']:.2f})   ppl {ppl or float('inf'):8.1f}   "
        f"bare s: {bare}; {f['windows']} windows"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext2/")
    parser.add_argument("--methods", nargs="*", choices=[*REQUESTS], default=[*REQUESTS])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--windows", type=int, help="at most so many, to look at something quickly")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    offline(online=False)
    if a.child:
        print(json.dumps(one(a.methods[0], a.data, a.batch_size, a.repeats, a.windows)))
        return
    for name in a.methods:
        command = [sys.executable, __file__, "--child", "--data", str(a.data), "--methods", name]
        command += ["--batch-size", str(a.batch_size), "--repeats", str(a.repeats)]
        command += ["--windows", str(a.windows)] if a.windows else []
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(line(figures), flush=True)
        if a.record:
            recipe = {"command": "benchmarks/oneshot.py", "request": REQUESTS[name].describe(), "data": C4}
            recipe |= {"windows": a.windows} if a.windows else {}
            record.append(a.record, "oneshot-cost", recipe, figures)


if __name__ == "__main__":
    main()
