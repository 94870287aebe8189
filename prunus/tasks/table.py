"""The zero-shot tasks: which of lm-eval's they are, what their rows must hold, and which means papers report. Data only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task of lm-eval by the file that defines it, and its official evaluation split.

    `columns` are what that file reads of a row. `answers` says of such a row which answers there are, and the place of the right
    one. `adapt` makes such a row of a published simpler form, whose columns are `simple`.
    """

    file: str  # below lm_eval/tasks; {subject} stands for each of `subjects`
    split: str
    rows: int  # of the official split
    metric: str  # the one that means go by
    columns: tuple[str, ...]
    answers: Callable[[Row], tuple[list[Any], Any]]
    simple: tuple[str, ...] = ()
    adapt: Callable[[Row], Row] | None = None
    by_subject: bool = False


def _labelled(row: Row) -> tuple[list[Any], Any]:
    return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"].lstrip())


def _blank(row: Row) -> tuple[list[Any], Any]:
    row["sentence"].index("_")
    return [row["option1"], row["option2"]], ("1", "2").index(row["answer"])


def _bare(query: str) -> str:
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")


def _lettered(row: Row) -> Row:
    letters = "ABCDEFGH"[: len(row["choices"])]
    return {"choices": {"text": row["choices"], "label": list(letters)}, "answerKey": dict(enumerate(letters))[row["gold"]]}


def _arc(row: Row) -> Row:
    return {"question": _bare(row["query"]), **_lettered(row)}


def _openbookqa(row: Row) -> Row:
    return {"question_stem": _bare(row["query"]), **_lettered(row)}


def _boolq(row: Row) -> Row:
    return {"question": row["question"], "passage": row["passage"], "label": int(row["answer"])}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['context']} {row['continuation']}"}


ANSWERS = ("choices", "answerKey", "label", "endings", "answer")  # columns that hold answers; all others are text
_ARC = (("question", "choices", "answerKey"), _labelled, ("query", "choices", "gold"), _arc)
TASKS: Mapping[str, Task] = {
    "arc_easy": Task("arc/arc_easy.yaml", "test", 2376, "acc_norm", *_ARC),
    "arc_challenge": Task("arc/arc_challenge.yaml", "test", 1172, "acc_norm", *_ARC),
    "boolq": Task(
        "super_glue/boolq/default.yaml", "validation", 3270, "acc",
        ("question", "passage", "label"), lambda row: (["no", "yes"], row["label"]), ("question", "passage", "answer"), _boolq,
    ),
    "hellaswag": Task(
        "hellaswag/hellaswag.yaml", "validation", 10042, "acc_norm",
        ("ctx_a", "ctx_b", "activity_label", "endings", "label"), lambda row: (row["endings"], int(row["label"])),
    ),
    "openbookqa": Task(
        "openbookqa/openbookqa.yaml", "test", 500, "acc_norm",
        ("question_stem", "choices", "answerKey"), _labelled, ("query", "choices", "gold"), _openbookqa,
    ),
    "piqa": Task(
        "piqa/piqa.yaml", "validation", 1838, "acc_norm",
        ("goal", "sol1", "sol2", "label"), lambda row: ([row["sol1"], row["sol2"]], row["label"]),
    ),
    "sciq": Task(
        "sciq/sciq.yaml", "test", 1000, "acc",
        ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"),
        lambda row: ([row[f"distractor{i}"] for i in (1, 2, 3)] + [row["correct_answer"]], 3),
    ),
    "winogrande": Task(
        "winogrande/default.yaml", "validation", 1267, "acc", ("sentence", "option1", "option2", "answer"), _blank,
    ),
    "mmlu": Task(
        "mmlu/continuation/mmlu_{subject}.yaml", "test", 14042, "acc",
        ("question", "subject", "choices", "answer"), lambda row: (row["choices"], row["answer"]), by_subject=True,
    ),
    "lambada": Task(
        "lambada/lambada_openai.yaml", "test", 5153, "acc",
        ("text",), lambda row: (row["text"].split(" ")[-1:], 0), ("context", "continuation"), _lambada,
    ),
}  # fmt: skip

_COMMON = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")
MEANS: Mapping[str, tuple[str, ...]] = {
    "seven": _COMMON,  # EfficientLLM, tables 1 to 5
    "eight": (*_COMMON, "sciq"),  # Small LLMs: pruning vs. training from scratch, appendix E
}
