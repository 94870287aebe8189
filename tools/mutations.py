"""Mutants of a module: small changes of its code that a good test notices, by the operators of mutmut.

As with mutmut they are in the bodies of functions, but here also of those with decorators. No mutants are made of what says
nothing to the machine: annotations, docstrings, and text for people (a literal with a space, all that is raised).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import NEVER_MUTATE_FUNCTION_CALLS
from mutmut.mutation.mutators import mutation_operators


@dataclass(frozen=True)
class Mutant:
    """One change in the body of a `function` (`Class.method`): `source` is the whole module with it.

    `lines` are those of its statement, first and last; of a compound statement those of its head.
    """

    id: str  # of the module, the line's text, the change, and which of several alike it is; lines may move
    module: str
    function: str
    line: int
    lines: tuple[int, int]
    operator: str
    before: str
    after: str
    source: str


@dataclass(frozen=True)
class Change:
    """A node and what it might be. `path`: the module, then what leads to the node, then the node itself."""

    path: tuple[cst.CSTNode, ...]
    mutated: cst.CSTNode
    operator: str
    line: int
    lines: tuple[int, int]

    @property
    def function(self) -> str:
        """Its outermost function, and the class around that."""
        names = []
        for node in self.path:
            if isinstance(node, cst.ClassDef | cst.FunctionDef):
                names.append(node.name.value)
            if isinstance(node, cst.FunctionDef):
                break
        return ".".join(names)

    @property
    def source(self) -> str:
        """The whole module with it. What `deep_replace` gives, which visits every node for one."""
        new: cst.CSTNode | Sequence[cst.CSTNode] = self.mutated
        for parent, old in zip(reversed(self.path[:-1]), reversed(self.path[1:]), strict=True):
            name, value = next(
                (f.name, v) for f in fields(parent) for v in [getattr(parent, f.name)] if _holds(value=v, node=old)
            )
            new = parent.with_changes(**{name: new if value is old else [new if item is old else item for item in value]})
        assert isinstance(new, cst.Module)
        return new.code


def _holds(value: object, node: cst.CSTNode) -> bool:
    return value is node or (isinstance(value, list | tuple) and any(item is node for item in value))


class _Finder(cst.CSTVisitor):
    """Pairs of a node and what it might be, with the operator and the lines of the innermost statement around it."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Change] = []
        self._path: list[cst.CSTNode] = []
        self._statements: list[tuple[int, int]] = []
        self._functions: list[cst.FunctionDef] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        self._path.append(node)
        if isinstance(node, cst.FunctionDef):
            self._functions.append(node)
        if _says_nothing(node):
            return False
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            self._statements.append(self._lines(node))
        if self._functions and not _is_prose(node):
            for kind, operator in mutation_operators:
                if isinstance(node, kind):
                    self.found += [self._change(node, new, operator.__name__) for new in operator(node)]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self._path.pop()
        if isinstance(original_node, cst.FunctionDef):
            self._functions.pop()
        if isinstance(original_node, cst.SimpleStatementLine | cst.BaseCompoundStatement) and not _says_nothing(
            original_node
        ):
            self._statements.pop()

    def _change(self, node: cst.CSTNode, new: cst.CSTNode, operator: str) -> Change:
        return Change(tuple(self._path), new, operator.removeprefix("operator_"), self._line(node), self._around(node))

    def _lines(self, node: cst.CSTNode) -> tuple[int, int]:
        """Of a statement; of a compound one its head alone."""
        place = self.get_metadata(PositionProvider, node)
        if isinstance(node, cst.BaseCompoundStatement):
            body = self.get_metadata(PositionProvider, node.body)
            return place.start.line, max(place.start.line, body.start.line - 1)
        return place.start.line, place.end.line

    def _line(self, node: cst.CSTNode) -> int:
        """Where it begins; an operator has no place, so that of what it is in."""
        for at in (node, *reversed(self._path)):
            place = self.get_metadata(PositionProvider, at, None)
            if place is not None:
                return place.start.line
        raise AssertionError("a module has a place")

    def _around(self, node: cst.CSTNode) -> tuple[int, int]:
        first, last = self._statements[-1]
        return min(first, self._line(node)), max(last, self._line(node))


def _says_nothing(node: cst.CSTNode) -> bool:
    """With all that is in it."""
    if isinstance(node, cst.Annotation | cst.Decorator | cst.Parameters | cst.Raise):
        return True
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Name):
        return node.func.value in NEVER_MUTATE_FUNCTION_CALLS
    return False


def _is_prose(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleString) and " " in node.value


def changes(code: str) -> list[Change]:
    """All changes of one module, in the order of its lines."""
    wrapper = MetadataWrapper(cst.parse_module(code), unsafe_skip_copy=True)
    finder = _Finder()
    wrapper.visit(finder)
    return sorted(finder.found, key=lambda change: change.line)


def mutants(module: str, code: str, found: Sequence[Change], order: Sequence[int], count: int) -> list[Mutant]:
    """The first `count` of the changes, taken in this `order`, that make a module unlike any other; by line."""
    lines, places = code.splitlines(), [_key(change) for change in found]
    seen, out = {code}, dict[int, Mutant]()
    for i in order:
        if len(out) == count:
            break
        source, change = found[i].source, found[i]
        if source in seen or not _compiles(source):
            continue
        seen.add(source)
        alike = sum(place == places[i] for place in places[:i])
        key = (module, lines[change.line - 1].strip(), *places[i][1:], alike)
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:10]
        out[i] = Mutant(digest, module, change.function, change.line, change.lines, change.operator, *places[i][2:], source)
    return [out[i] for i in sorted(out)]


def _key(change: Change) -> tuple[int, str, str, str]:
    module = change.path[0]
    assert isinstance(module, cst.Module)
    texts = (module.code_for_node(node).strip() for node in (change.path[-1], change.mutated))
    return (change.line, change.operator, *texts)  # type: ignore[return-value]


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True


def sample(codes: Mapping[str, str], count: int, seed: int) -> list[Mutant]:
    """`count` mutants of the modules by name, of each as many as is its share of all changes; the seed chooses which."""
    found = {name: changes(code) for name, code in codes.items()}
    total = sum(map(len, found.values()))
    exact = {name: count * len(own) / total for name, own in found.items()}
    sizes = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: (sizes[name] - exact[name], name))[: count - sum(sizes.values())]:
        sizes[name] += 1
    out: list[Mutant] = []
    for name, own in found.items():
        order = random.Random(f"{seed} {name}").sample(range(len(own)), len(own))
        out += mutants(name, codes[name], own, order, sizes[name])
    return out
