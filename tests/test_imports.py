"""Modules import downwards only, and `prunus --help` imports nothing heavy."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import prunus

ROOT = Path(prunus.__file__).parent
LAYERS = (  # the lowest first; a new module is placed here
    "errors place reading sealed manifest heap products tables network distributed axes shape families anatomy keep cut",
    "methods headers tensorfiles modeling_pruned hf source data data.text data.windows",
    "data.tokenizer data.encode data.shards data.writer data.prepare data.mixing data.order data.overlap ledger",
    "gates scaling spent statistics criteria allocate compensate solve eliminate sizes",
    "record latency costs search kv_copies",
    "planning asked shaping builders",
    "findings evaluation job combination streaming units weights taylor curves surgeon depth rotation oneshot",
    "saliency reload verification checkpoint measure",
    "api",
    "train train.strict train.parts train.shrink train.shrink.part train.shrink.pace",
    "train.schedule train.loss train.optim train.saved train.recipe train.shapes train.learner train.loop "
    "train.drawn train.stopping train.assembly train.feeds train.export train.lora train.track train.log train.sweep train.cache",
    "train.shrink.goal train.shrink.carried train.shrink.activations train.shrink.saliency train.shrink.groups "
    "train.shrink.clocked train.shrink.adaptive train.shrink.repair train.shrink.resize "
    "train.shrink.snapshot train.shrink.cutting train.shrink.pruner train.shrink.masks train.shrink.forecast",
    "train.opening train.estimate train.searched train.teaching train.run train.shearing train.tuning train.listing",
    "tasks tasks.table tasks.local tasks.paired tasks.tree tasks.harness tasks.run generations judge appraisal",
    "plots report checkpoint_plots shrink_plots train_plots comparison",
    "bench export export.vocabulary export.gguf_file export.onnx_file quantize trim export.card export.hub export.serving",
    "study study.file study.steps study.protocol study.charts study.results study.claims study.formats study.advise study.page "
    "study.run study.plan study.cluster",
    "printed show show_data show_train show_bench show_study progress quickstart cli_options cli_compare cli_data cli_eval "
    "cli_export cli_train cli_study cli __main__",
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules.split()}
TOP = len(LAYERS)  # where the package itself stands
PURE = (
    "distributed axes shape keep cut allocate anatomy solve eliminate criteria statistics".split()
)  # torch and the standard library
LIGHT = (
    "cli cli_options cli_compare cli_data cli_eval cli_export cli_study cli_train errors methods network progress".split()
)
HEAVY = {"torch", "transformers", "pydantic", "numpy", "safetensors", "datasets", "accelerate", "gguf", "yaml", "rich"}


def level(module: str) -> int:
    """One file a family: they need no line in the table."""
    return LEVEL["families"] if module.startswith("families.") else LEVEL.get(module, TOP)


@cache
def modules() -> dict[str, Path]:
    """Name without the package -> file; the package itself is the empty name."""
    out = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def statements(node: ast.AST, top: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import that runs, and whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, top
        in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from statements(child, top and not in_function)


@cache
def imports(module: str) -> frozenset[tuple[str, bool, bool]]:
    """(what, whether it is ours, whether at the top) of one module's imports."""
    path = modules()[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    out = set()
    for statement, top in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            names = [(alias.name, []) for alias in statement.names]
        elif statement.level:
            base = [*package[: len(package) - statement.level + 1], *filter(None, [statement.module])]
            names = [(".".join(["prunus", *base]), [alias.name for alias in statement.names])]
        else:
            names = [(statement.module or "", [alias.name for alias in statement.names])]
        for name, inside in names:
            if name.split(".")[0] != "prunus":
                out.add((name.split(".")[0], False, top))
                continue
            own = name.removeprefix("prunus").removeprefix(".")
            for leaf in inside or [""]:
                deeper = ".".join(filter(None, [own, leaf]))
                out.add((deeper if deeper in modules() else own, True, top))
    return frozenset(out)


def ours(module: str, *, top_only: bool = False) -> set[str]:
    return {name for name, own, top in imports(module) if own and (top or not top_only)}


def closure(module: str, *, top_only: bool = False) -> set[str]:
    seen, todo = set(), [module]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo.extend(ours(current, top_only=top_only))
    return seen


def test_every_module_has_a_layer():
    assert {m for m in modules() if m and not m.startswith("families.")} == set(LEVEL)


@pytest.mark.parametrize("module", sorted(LEVEL))
def test_imports_point_downwards(module):
    assert module in modules(), f"{module} is gone: take it out of LAYERS"
    upward = {name for name in ours(module) if level(name) > LEVEL[module]}
    assert not upward, f"{module} imports {sorted(upward)}, which stand above it (the package itself stands above all)"


def test_families_import_no_more_than_families_and_errors():
    for module in modules():
        if module.startswith("families"):
            assert {m for m in ours(module) if not m.startswith("families")} <= {"errors"}, module


def test_there_is_no_circle():
    graph = {module: ours(module) - {module} for module in modules()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules())


def test_one_file_knows_of_process_groups():
    """Besides it, checkpoints are written by torch.distributed.checkpoint, which asks for no group."""
    for module, path in modules().items():
        named = set(re.findall(r"(?:import|from) (torch\.distributed(?:\.\w+)?)", path.read_text(encoding="utf-8")))
        allowed = {"train.saved": {"torch.distributed.checkpoint"}}.get(module, set())
        assert module == "distributed" or named <= allowed, module
    assert "torch" in {name for name, own, top in imports("distributed") if not own and not top}  # only when asked for


def test_the_checker_sees_imports():
    """What it must find: lazy imports, imports of modules and of names, and what it must not: those for type checkers."""
    assert "checkpoint" in ours("cli") and "checkpoint" not in ours("cli", top_only=True)
    assert "data.windows" in ours("api") and "families" in ours("anatomy") and "families.base" in ours("families.llama")
    assert ("transformers", False, False) in imports("hf") and ("torch", False, True) in imports("hf")
    assert "transformers" not in {name for name, _, _ in imports("statistics")}  # only under TYPE_CHECKING


def test_the_package_imports_nothing_by_itself():
    assert {name for name, own, top in imports("") if top} <= {"__future__", "importlib", "os", "typing"}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_know_no_transformers(module):
    """Neither they nor anything they reach, at whatever moment."""
    reached = {name for m in closure(module) for name, own, _ in imports(m) if not own}
    assert reached <= {"torch", "numpy"} | set(sys.stdlib_module_names), module
    assert "logging" not in reached


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(module):
    reached = {name for m in closure(module, top_only=True) for name, own, top in imports(m) if top and not own}
    assert not reached & HEAVY
    assert reached <= {"typer"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", ["modeling_pruned", "reload"])
def test_files_that_run_without_the_package_need_nothing_of_it(module):
    assert not ours(module)
    roots = {name for name, _, _ in imports(module)}
    assert roots <= {"torch", "transformers", "huggingface_hub", "safetensors"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"]])
def test_help_answers_without_the_libraries(arguments):
    """In a process of its own, where the interpreter lists what it imports."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "prunus.cli", *arguments], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and "prune" in result.stdout.lower()
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines() if "|" in line}
    assert "typer" in imported  # the listing is there
    assert not imported & (HEAVY - {"rich", "pydantic"})  # typer itself looks for these: its own business
