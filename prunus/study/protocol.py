"""What must be equal of arms that are compared: promised by their recipes before the first step, proved by ledgers after the last.

- `training-tokens`: each was trained on the same tokens in the same order, whatever its parents saw.
- `total-tokens`: all that went into each model, parents included, is the same, and what parent and child read is disjoint.
- `total-flops`: what went into each cost the same.

Protocols 1 and 2 are those of "Small LLMs: pruning vs. training from scratch" (section 3); the third is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..data.text import documents, slice_of
from ..data.windows import name_of
from ..errors import UserError
from ..ledger import SWEEP, Ledger, Stage, compare
from ..train.recipe import Recipe
from .file import Cell, CutPart, Study, shared_places
from .results import LOSS, loss_on
from .steps import ledger_of, model_of

Read = Counter[tuple[str, str, int]]  # (domains, range, seed of its order) -> tokens


# -- before the first step ------------------------------------------------------------------------------------------------


def check(study: Study) -> None:
    """UserError for arms whose recipes cannot keep what the study promises, for text that calibrates and judges, and for figures
    that no name would tell apart, or of tasks that there are not.
    """
    for part in study.file.compare:
        for cells in shared_places(study, part.arms):
            try:
                _CHECKS[part.protocol](cells)
            except UserError as error:
                raise UserError(f"{study.path}: {part.protocol} of {', '.join(part.arms)}: {error}") from error
        if not shared_places(study, part.arms):
            raise UserError(f"{study.path}: {part.protocol}: {', '.join(part.arms)} have no place of the grid in common")
    for cell in study.cells:
        if cell.cut is not None:
            _apart(study, cell, cell.cut)
    _check_names(study)


def _training(cells: Mapping[str, Cell]) -> None:
    (first, one), *others = cells.items()
    for name, other in others:
        if (mine := _order(_trained(one))) != (theirs := _order(_trained(other))):
            field = next(key for key in mine if mine[key] != theirs[key])
            raise UserError(
                f"{first} reads {_said(mine[field])} and {name} {_said(theirs[field])} ({field}); give both the same tokens"
            )


def _total(cells: Mapping[str, Cell]) -> None:
    reads = {}
    for name, cell in cells.items():
        reads[name] = Read()
        for one in (cell, *cell.ancestors()):
            if one.model is not None:
                raise UserError(f"{name}: nobody knows the tokens of {one.model}, which is released; take training-tokens")
            recipe = one.recipe
            if recipe is None:
                continue
            own = _read(recipe)
            if twice := sorted({which for _, which, _ in own} & {which for _, which, _ in reads[name]}):
                raise UserError(
                    f"{name}: it and its parent both read range '{twice[0]}', so that what they see together is not the sum of "
                    "both; give them different ranges"
                )
            reads[name] += own
    (first, mine), *rest = reads.items()
    for name, theirs in rest:
        if mine != theirs:
            raise UserError(f"{first} and its parents read {_listed(mine)}, {name} {_listed(theirs)}; give both the same")


def _flops(cells: Mapping[str, Cell]) -> None:
    for name, cell in cells.items():
        released = next((one.model for one in (cell, *cell.ancestors()) if one.model is not None), None)
        if released is not None:
            raise UserError(f"{name}: nobody knows the FLOPs of {released}, which is released; take training-tokens")
    if not any(set(_names(cell)) & set(cells) for cell in cells.values()):
        raise UserError("none of them has flops_of another, and so FLOPs would be equal by chance; give one flops_of")


def _names(cell: Cell) -> Iterator[str]:
    paid = cell.others.get("flops_of")
    if paid is not None:
        yield paid.arm


_CHECKS = {"training-tokens": _training, "total-tokens": _total, "total-flops": _flops}


def _trained(cell: Cell) -> Recipe:
    if cell.recipe is None:
        raise UserError(f"{cell.arm} trains nothing; name arms with a recipe")
    return cell.recipe


def _order(recipe: Recipe) -> dict[str, Any]:
    """What decides which tokens are read, and in which order."""
    data = recipe.plain()["data"]
    order = {key: data[key] for key in ("domains", "range", "seq_len", "seed", "epochs", "mixing")}
    return order | {"tokens": recipe.steps * recipe.batch_tokens}


def _read(recipe: Recipe) -> Read:
    data = recipe.data
    domains = str([(Path(one.folder).name, one.weight) for one in data.domains])
    tokens, out = recipe.steps * recipe.batch_tokens, Read()
    if isinstance(data.range, str):
        return Read({(domains, data.range, data.seed): tokens})
    for name, part in data.range.items():
        out[domains, name, data.seed if part.seed is None else part.seed] = min(part.tokens, tokens)
        tokens -= min(part.tokens, tokens)
    return out


def _said(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _listed(read: Read) -> str:
    return " and ".join(f"{tokens:,} tokens of '{which}' (seed {seed})" for (_, which, seed), tokens in sorted(read.items()))


def _apart(study: Study, cell: Cell, cut: CutPart) -> None:
    """UserError if the same documents choose what is cut and judge what is left: the comparison study's perplexities were
    taken on text that Minitron was calibrated on.
    """
    text = cut.calibration
    if text is None:
        return
    place = Path(text.text).expanduser()
    for i, part in enumerate(study.file.evaluate):
        for judged in part.texts:
            same = Path(judged).expanduser().resolve() == place.resolve()
            if same and _meet(place, text.documents, part.documents):
                mine, theirs = text.documents or "all", part.documents or "all"
                raise UserError(
                    f"{study.path}: arm '{cell.arm}' calibrates on documents {mine} of {text.text}, and evaluate.{i} scores on "
                    f"documents {theirs} of it; give slices that share none, such as :-100 and -100:"
                )


def _check_names(study: Study) -> None:
    """UserError for two figures of one name, of which tables would show the last alone."""
    told = {LOSS: "the validation of training"}
    for i, part in enumerate(study.file.evaluate):
        named = [(loss_on(name_of(text), part.documents), text) for text in part.texts]
        try:
            named += [((task, "score"), task) for task in part.question.tasks]
        except UserError as error:
            raise UserError(f"{study.path}: evaluate.{i}: {error}") from error
        for metric, asked in named:
            if metric in told:
                raise UserError(
                    f"{study.path}: evaluate.{i}: '{asked}' would stand under '{metric[0]}', as {told[metric]} does; give every "
                    "text a file name or documents of its own, and ask a task once"
                )
            told[metric] = f"'{asked}' of evaluate.{i}"


def _meet(text: Path, one: str | None, other: str | None) -> bool:
    """Whether two slices share a document. Only slices from both ends, such as :800 and -100:, hang on how many there are."""
    if one is None or other is None:
        return True
    ends = [(span.start, span.stop) for span in map(slice_of, (one, other))]
    mixed = {end < 0 for pair in ends for end in pair if end is not None} == {False, True}
    if _overlap(one, other, _ENDLESS) or not mixed or not text.is_file():
        return _overlap(one, other, _ENDLESS)
    return _overlap(one, other, sum(1 for _ in documents(str(text))))


_ENDLESS = 10**12  # documents


def _overlap(one: str, other: str, count: int) -> bool:
    (a, b), (c, d) = (slice_of(which).indices(count)[:2] for which in (one, other))
    return max(a, c) < min(b, d)


# -- after the last -------------------------------------------------------------------------------------------------------


def proofs(study: Study, out: Path) -> list[dict[str, Any]]:
    """What the ledgers say of every comparison whose runs are done: `holds`, and why."""
    rows = []
    for part in study.file.compare:
        for cells in shared_places(study, part.arms):
            if not all((model_of(cell, out) / "config.json").is_file() for cell in cells.values()):
                continue
            places = {name: ledger_of(cell, out) for name, cell in cells.items()}
            ledgers = {name: Ledger.read(place) for name, place in places.items() if place is not None}
            for (one, mine), (other, theirs) in pairwise(ledgers.items()):
                holds, why = _proved(part.protocol, mine, theirs, part.within)
                rows.append(
                    {
                        "protocol": part.protocol,
                        "runs": [cells[one].name, cells[other].name],
                        "holds": holds,
                        "why": why,
                        "tokens": [mine.total_tokens, theirs.total_tokens],
                        "flops": [mine.total_flops, theirs.total_flops],
                    }
                )
    return rows


def _proved(protocol: str, mine: Ledger, theirs: Ledger, within: float) -> tuple[bool, str]:
    if protocol == "total-flops":
        apart = theirs.total_flops / mine.total_flops - 1
        return abs(apart) <= within, f"{mine.total_flops:.4g} and {theirs.total_flops:.4g} FLOPs, {apart:+.2%} apart"
    parents = protocol == "total-tokens"
    alone = [_trained_alone(one) for one in (mine, theirs)]
    found = compare(*alone, parents=parents)
    seen = [sum(stage.tokens for stage in one.all_stages(parents=parents)) for one in alone]
    same = found.verdict == "same" and seen[0] == seen[1]
    order = "" if parents or not same else ", in the same order" if found.same_order else ", in another order"
    why = f"{found.verdict}: {found.shared:,} tokens in both, {found.only_a:,} and {found.only_b:,} in one alone{order}"
    for what, count in (("calibration text", _other_text), ("tried rates", _tried)):
        besides = [count(one.all_stages(parents=parents)) for one in (mine, theirs)]
        if any(besides):
            why += f"; {besides[0]:,} and {besides[1]:,} of {what} besides"
    return same and (parents or found.same_order), why


def _trained_alone(ledger: Ledger) -> Ledger:
    """Without text that no weight was trained on, and without beginnings at other rates, of which no weight is left."""
    stages = [
        stage.model_copy(update={"other_text": {}, "tokens": stage.tokens - _other_text([stage])})
        for stage in ledger.stages
        if stage.name != SWEEP
    ]
    parent = None if ledger.parent is None else _trained_alone(ledger.parent)
    return ledger.model_copy(update={"stages": stages, "parent": parent})


def _other_text(stages: Iterable[Stage]) -> int:
    return sum(sum(stage.other_text.values()) for stage in stages)


def _tried(stages: Iterable[Stage]) -> int:
    return sum(stage.tokens for stage in stages if stage.name == SWEEP)
