"""Clean processes that need not import torch and transformers first: forks of one that did, and did nothing else.

Run by path (`python -IB warm.py RELOAD.PY`): a request's path a line on standard input, an answer a line on standard output.
What a fork runs is what `prunus.verification` runs in a fresh interpreter, which costs 4 seconds a time.
"""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import traceback


class Forks:
    """The other end: answers as `subprocess.run` would."""

    def __init__(self, script):
        self.script, self.process = script, None

    def __call__(self, request):
        if self.process is None:
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            self.process = subprocess.Popen(
                [sys.executable, "-IB", __file__, self.script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        self.process.stdin.write(f"{request}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return subprocess.CompletedProcess([self.script, str(request)], answer["code"], answer["out"], answer["err"])

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()


def main(script):
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(__file__), "offline", "sitecustomize.py"))  # -I leaves PYTHONPATH out
    import safetensors.torch  # noqa: F401
    import torch
    import transformers.conversion_mapping
    import transformers.generation  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):  # what transformers imports as late as it can
        AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
        )
    spec = importlib.util.spec_from_file_location("__reload__", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "prunus" not in sys.modules
    for line in sys.stdin:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reads)
            with os.fdopen(writes, "w") as pipe:
                pipe.write(json.dumps(asked(module, line.strip())))
            os._exit(0)
        os.close(writes)
        with os.fdopen(reads) as pipe:
            print(pipe.read() or json.dumps({"code": 1, "out": "", "err": "the fork died"}), flush=True)
        os.waitpid(child, 0)


def asked(module, request):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main(request)
        except BaseException:  # an interpreter of its own would end with it
            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    main(sys.argv[1])
