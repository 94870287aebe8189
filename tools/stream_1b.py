"""Prune a random Llama of 1.3 billion parameters with --stream, and record the peak memory of the process that did it.

The checkpoint is made shard by shard in a process of its own and removed afterwards. The figures say nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

C4 = "c4/c4_sample1.jsonl"
WINDOWS, SEQ_LEN = 8, 512
REQUESTS = {"flap": {"method": "flap", "ratio": 0.2}, "wanda": {"method": "wanda", "ratio": 0.5}}
SIZES = {  # Sheared-LLaMA-1.3B's blocks under SmolLM2's vocabulary
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 49152,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LAYERS_A_SHARD = 4


def make(folder: Path) -> None:
    """A random bfloat16 checkpoint: matrices of unit gain, norm gains of one. Memory holds one tensor."""
    import torch
    from transformers import LlamaConfig

    from prunus import tensorfiles
    from prunus.anatomy import Anatomy
    from prunus.quickstart import default_source
    from prunus.source import Source

    config = LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    Source.open(default_source()).tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    shards: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in Anatomy.of(config).tensors.items():
        shards.setdefault(0 if tensor.layer is None else 1 + tensor.layer // LAYERS_A_SHARD, {})[name] = tensor.shape

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=generator)

    weight_map = {}
    for i, shapes in shards.items():
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        specs = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
        tensorfiles.write(folder / file, specs, ((name, random(shape)) for name, shape in shapes.items()))
        weight_map |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def prune(folder: Path, data: Path, name: str) -> dict:
    """One cut and its verification by the command line, in this process."""
    from prunus.cli import run

    request = REQUESTS[name]
    words = ["prune", str(folder), "-m", request["method"], "-r", str(request["ratio"]), "-c", str(data / C4)]
    words += ["--windows", str(WINDOWS), "--seq-len", str(SEQ_LEN), "--dtype", "bfloat16", "--stream"]
    start = time.perf_counter()
    code = run([*words, "-o", str(folder.parent / name), "--json"])
    figures = {"exit_code": code, "seconds": time.perf_counter() - start}
    for key, who in (("peak_gib", resource.RUSAGE_SELF), ("children_peak_gib", resource.RUSAGE_CHILDREN)):
        figures[key] = resource.getrusage(who).ru_maxrss / 2**20
    return figures


def keep_record(name: str, manifest: dict, figures: dict, path: Path) -> None:
    """One line with what the command line said and what was measured around it."""
    from prunus import record

    recipe = {"command": "tools/stream_1b.py", "request": REQUESTS[name], "data": C4, "sizes": SIZES}
    recipe |= {"windows": WINDOWS, "seq_len": SEQ_LEN, "dtype": "bfloat16"}
    figures |= {key: manifest[key] for key in ("ratios", "verified")} | {"stages_s": manifest["seconds"]}
    for side in ("before", "after"):
        figures[side] = {key: manifest[side][key] for key in ("params", "block_params", "weight_bytes")}
    record.append(path, "stream", recipe, figures)


def child(*words: object) -> str:
    """What this file prints in a fresh process. This one stays small: a child's peak starts at its parent's."""
    done = subprocess.run([sys.executable, __file__, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=list(REQUESTS), choices=list(REQUESTS))
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints, some 8 GB, until the end")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prune", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        return make(arguments.make)
    if arguments.prune:
        print(json.dumps(prune(arguments.prune, arguments.data, arguments.methods[0])))
        return None
    with tempfile.TemporaryDirectory(prefix="prunus-stream-", dir=arguments.folder) as place:
        source = Path(place) / "random"
        source.mkdir()
        child("--make", source, "--data", arguments.data)
        for name in arguments.methods:
            said, measured = child("--prune", source, "--data", arguments.data, "--methods", name).splitlines()[-2:]
            print(f"{name:<8} {measured}", flush=True)
            if arguments.record:
                keep_record(name, json.loads(said), json.loads(measured), arguments.record)
    return None


if __name__ == "__main__":
    main()
