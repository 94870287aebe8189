"""Run by path in a clean process: load a checkpoint with stock transformers and say what it computes.

Usage: python -I reload.py REQUEST.json, where the request names the folder, the token ids, and where the logits go. For a
per-layer checkpoint the modelling file that travels in the folder is imported first; prunus itself never is.
"""

import importlib.util
import json
import sys
from pathlib import Path


def main(request_path: str) -> None:
    """Load, run, generate with a cache, write logits as safetensors and the rest as JSON on standard output."""
    request = json.loads(Path(request_path).read_text())
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    folder = request["folder"]
    modelling = Path(folder) / "modeling_pruned.py"
    if modelling.exists():
        spec = importlib.util.spec_from_file_location("modeling_pruned", modelling)
        module = importlib.util.module_from_spec(spec)
        sys.modules["modeling_pruned"] = module
        spec.loader.exec_module(module)
    where = {}
    if request["on_disk"]:  # these modules are read whenever they run: memory holds one of them, not the model
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
        where = {"device_map": dict(places(empty, request["on_disk"])), "offload_folder": request["scratch"]}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, request["dtype"]), local_files_only=True, output_loading_info=True, **where
    )
    model.eval()
    problems = {k: sorted(map(str, v)) for k, v in info.items() if v and k.endswith("_keys")}
    ids = torch.tensor(request["ids"])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        tokens = greedy(model, ids[:1, : request["prompt"]], request["new_tokens"])
    save_file({"logits": logits}, request["logits"])
    out = {"generated": tokens, "problems": problems, "class": type(model).__name__, "ours": "prunus" in sys.modules}
    print(json.dumps(out))


def places(module, on_disk, prefix=""):
    """(name, "disk") of the named modules, and (name, "cpu") of what stands beside them."""
    for leaf, child in module.named_children():
        name = prefix + leaf
        if name in on_disk:
            yield name, "disk"
        elif any(other.startswith(name + ".") for other in on_disk):
            yield from places(child, on_disk, name + ".")
        else:
            yield name, "cpu"


def greedy(model, ids, count):
    """`count` tokens by arg-max through the KV cache, whatever the generation config says."""
    cache, step, tokens = None, ids, []
    for _ in range(count):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        tokens.append(int(step))
    return tokens


if __name__ == "__main__":
    main(sys.argv[1])
