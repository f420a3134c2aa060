"""A prompt, and how large a haystack it takes: the largest that leaves room for the answer.

A task builds its prompt around n units (lines, words, documents); `fit` finds n.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

from core.config import UserError
from data.tokenizer.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt with what must come out."""

    kind: str
    text: str  # the whole prompt; ends with `prefix`
    prefix: str  # how the answer begins, so that a model neither refuses nor explains
    references: tuple[str, ...]  # what the answer must contain
    depths: tuple[
        float, ...
    ]  # of what holds the references: 0 is the start of the context, 1 its end
    tokens: int  # of the text, bos included
    max_tokens: int  # that the model may write; with `tokens` no more than the length asked for
    haystack: str  # what the context is made of


@dataclasses.dataclass(frozen=True)
class Task:
    """A sample whose haystack has no size yet."""

    kind: str
    build: Callable[[int], tuple[str, tuple[float, ...]]]  # (prompt up to the prefix, depths)
    prefix: str
    references: tuple[str, ...]
    answer: str  # of a perfect model
    max_tokens: int  # what RULER gives
    haystack: str
    least: int = 1
    most: int | None = None  # units that there are


def stream(*parts: object) -> random.Random:
    """Random numbers that depend on the parts alone, on any platform."""
    return random.Random(" ".join(map(str, parts)))


def size(text: str, tokenizer: Tokenizer) -> int:
    """Tokens of a text as a prompt: bos counts, where there is one."""
    return len(tokenizer.encode(text)) + (tokenizer.bos is not None)


def fit(task: Task, length: int, tokenizer: Tokenizer) -> Sample:
    """The sample with as many units as `length` tokens hold, the answer's included.

    A tokenizer that needs more tokens for a perfect answer than RULER gives gets as many more.
    """
    asked, answered = tokenizer.encode_batch([task.prefix, task.prefix + task.answer])
    budget = max(task.max_tokens, len(answered) - len(asked))
    built = {}

    def tokens(units: int) -> int:
        text, depths = task.build(units)
        text += task.prefix
        built[units] = text, depths, size(text, tokenizer)
        return built[units][-1]

    # No unit is less than half a token.
    most = task.most or task.least + 2 * length
    units = largest(tokens, length - budget, task.least, most)
    if units is None:
        raise UserError(
            f"{task.kind} does not fit in length={length}: with this tokenizer it takes at least "
            f"{built[task.least][-1] + budget} tokens, of which {budget} are for the answer"
        )
    text, depths, used = built[units]
    return Sample(
        task.kind, text, task.prefix, task.references, depths, used, budget, task.haystack
    )


def largest(tokens: Callable[[int], int], limit: int, least: int, most: int) -> int | None:
    """The largest n from least to most with tokens(n) <= limit; None if least is too many.

    Takes `tokens` for nearly linear: it measures little and then at the end, where each call
    reads a whole context.
    """
    start = tokens(least)
    if start > limit:
        return None
    low, high = least, most + 1  # low fits, high does not
    guess, turn = 2 * least + 8, 0
    while high - low > 1:
        turn += 1
        guess = min(max(guess, low + 1), high - 1)
        used = tokens(guess)
        low, high = (guess, high) if used <= limit else (low, guess)
        slope = max((used - start) / (guess - least), 1e-3)
        guess += int((limit - used) // slope)
        if turn > 8 and turn % 2:
            guess = (low + high) // 2  # not linear at all
    return low


def where(context: str, start: int, part: str) -> float:
    """The depth of a part of the context that begins at a character."""
    return start / max(len(context) - len(part), 1)


def listed(words: Sequence[str]) -> str:
    """The words as a numbered list in one line."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
