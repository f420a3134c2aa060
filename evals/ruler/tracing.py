"""Variable tracking (vt): RULER's one chain of four hops in noise, after an example.

Templates and figures are those of RULER (scripts/data/synthetic/{variable_tracking.py,
constants.py}).
"""

import random
import string

from data.tokenizer.base import Tokenizer
from evals.ruler import words
from evals.ruler.needles import hide
from evals.ruler.sample import Task, largest, size, stream, where

TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text."
    "\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
PREFIX = (  # "assgined" is RULER's
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assgined the value {value}, they are:"
)
TOKENS = 30
HOPS = 4
LETTERS, EXAMPLE_LETTERS = 5, 3  # of a variable
EXAMPLE_TOKENS, EXAMPLE_STEP = 500, 5  # the example has a multiple of 5 lines of noise
LONG = 2000  # tokens of a prompt that has room for such an example


def task(kind: str, label: str, length: int, tokenizer: Tokenizer) -> Task:
    """The chain after an example, which has but one line of noise in a short prompt."""
    draw = stream(label)
    values = [str(number) for number in draw.sample(range(10000, 99999), 2)]
    chain = _Chain(draw, values[0], LETTERS)
    shown = _Chain(draw, values[1], EXAMPLE_LETTERS)
    limit = EXAMPLE_TOKENS - TOKENS if length >= LONG else 0
    lines = largest(lambda n: size(shown.whole(n), tokenizer), limit, 1, EXAMPLE_TOKENS) or 1
    example = shown.whole(lines - lines % EXAMPLE_STEP or lines) + "\n\n"

    def build(count: int) -> tuple[str, tuple[float, ...]]:
        text, depths = chain.text(count)
        return example + text, depths

    names = tuple(chain.names)
    return Task(kind, build, chain.prefix, names, chain.answer, TOKENS, "noise")


class _Chain:
    """VAR A = 12345, VAR B = VAR A, ...: in order, anywhere in the noise."""

    def __init__(self, draw: random.Random, value: str, letters: int):
        names = {}
        while len(names) <= HOPS:
            name = "".join(draw.choices(string.ascii_uppercase, k=letters))
            if name != "VAR":
                names[name] = None
        self.names, self.value = list(names), value
        sources = [value, *(f"VAR {name}" for name in self.names)]
        self._lines = [f"VAR {a} = {b}" for a, b in zip(self.names, sources, strict=False)]
        self._depths = sorted(draw.random() for _ in self.names)
        self.prefix = PREFIX.format(count=len(self.names), value=value)
        self.answer = " " + " ".join(self.names)

    def text(self, count: int) -> tuple[str, tuple[float, ...]]:
        """The question about the chain in `count` lines of noise, and the depths."""
        units = [words.NOISE + "\n"] * count
        if count <= len(self._lines):  # too few places: between sentences
            units = [part for line in units for part in _sentences(line)]
        context, starts = hide(units, self._lines, self._depths, " ")
        depths = map(where, [context] * len(starts), starts, self._lines)
        return TEXT.format(context=context, value=self.value), tuple(depths)

    def whole(self, count: int) -> str:
        """Returns the text with its answer."""
        return self.text(count)[0] + self.prefix + self.answer


def _sentences(line: str) -> list[str]:
    parts = line.split(". ")
    return [part + "." for part in parts[:-1]] + parts[-1:]
