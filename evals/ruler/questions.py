"""Questions over documents (qa_1, qa_2) from a file that the user gives.

The file is JSON, a list of

    {"question": "...", "answers": ["...", ...], "context": "..." or ["...", ...], "more": [...]}

`context` is what must be in the prompt: the paragraph of a question of SQuAD (qa_1), or all ten of
HotpotQA (qa_2), as title, newline, text. `more`, which may be missing, is what to add first: the
other paragraphs of the article in SQuAD. Contexts of other questions fill the rest, as in RULER
(scripts/data/synthetic/qa.py).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from core.config import UserError
from core.storage import json_lines
from evals.ruler.sample import Task, stream, where

TEXT = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nQuestion: {query}"
)
DOCUMENT = "Document {number}:\n{text}"
PREFIX = " Answer:"
TOKENS = 32
FORMAT = '[{"question": "...", "answers": ["..."], "context": "..." or ["...", ...]}, ...]'


@dataclasses.dataclass(frozen=True)
class Question:
    """One question. Documents are numbers."""

    text: str
    answers: tuple[str, ...]
    context: tuple[int, ...]
    more: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Questions:
    """All of a file."""

    name: str
    documents: Sequence[str]
    questions: Sequence[Question]


def read(path: str, field: str) -> Questions:
    """The questions of a file; `field` is what errors name."""
    if not Path(path).is_file():
        raise UserError(f"{field}={path}: there is no such file; it must be JSON: {FORMAT}")
    try:
        rows = json_lines.parse(Path(path).read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{field}={path} is not JSON: {error}; it must be {FORMAT}") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{field}={path} is not a list of questions; it must be {FORMAT}")
    rows = [_checked(row, f"{field}={path} question {i}") for i, row in enumerate(rows, 1)]
    every = [text for _, _, context, more in rows for text in (*context, *more)]
    number = {text: i for i, text in enumerate(dict.fromkeys(every))}
    questions = []
    for text, answers, context, more in rows:
        needed = dict.fromkeys(number[part] for part in context)
        added = dict.fromkeys(number[part] for part in more)
        added = tuple(i for i in added if i not in needed)
        questions.append(Question(text, tuple(answers), tuple(needed), added))
    return Questions(path, list(number), questions)


def _checked(row: object, where: str) -> tuple[str, list[str], list[str], list[str]]:
    if not isinstance(row, dict):
        raise UserError(f"{where} is {type(row).__name__}; the file must be {FORMAT}")
    context = row.get("context")
    context = [context] if isinstance(context, str) else context
    answers, more = row.get("answers"), row.get("more", [])
    if not isinstance(row.get("question"), str):
        raise UserError(f"{where}: question must be a string")
    for name, value in dict(answers=answers, context=context, more=more).items():
        texts = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
        if not texts or (not value and name != "more"):
            raise UserError(f"{where}: {name} must be a list of texts; the file must be {FORMAT}")
    return row["question"], answers, context, more


def task(kind: str, label: str, index: int, source: Questions) -> Task:
    """The question of that index among documents in any order."""
    if index >= len(source.questions):
        raise UserError(
            f"{source.name} has {len(source.questions)} questions, so there is no sample {index} "
            f"of {kind}: ask for fewer samples, or give a file with more questions"
        )
    asked, draw = source.questions[index], stream(label)
    near = draw.sample(asked.more, len(asked.more))
    rest = sorted(set(range(len(source.documents))) - {*asked.context, *asked.more})
    draw.shuffle(rest)
    order = [*asked.context, *near, *rest]

    def build(count: int) -> tuple[str, tuple[float, ...]]:
        chosen = order[:count]
        stream(label, "order").shuffle(chosen)
        parts = [
            DOCUMENT.format(number=i, text=source.documents[n]) for i, n in enumerate(chosen, 1)
        ]
        context, depths, at = "\n\n".join(parts), {}, 0
        for n, part in zip(chosen, parts, strict=True):
            depths[n] = where(context, at, part)
            at += len(part) + 2
        text = TEXT.format(context=context, query=asked.text)
        return text, tuple(depths[n] for n in asked.context)

    answer = " " + max(asked.answers, key=len)
    return Task(
        kind, build, PREFIX, asked.answers, answer, TOKENS, source.name,
        least=len(asked.context), most=len(order),
    )  # fmt: skip
