"""Needles in a haystack: RULER's eight kinds, one needle at a given depth, and the passkey.

Templates and figures are those of RULER (scripts/data/synthetic/{niah.py, constants.py},
scripts/synthetic.yaml) and of the passkey of Mohtashami and Jaggi (arXiv 2305.16300).
"""

import dataclasses
import random
from collections.abc import Callable, Collection, Sequence
from typing import Literal

from evals.ruler import words
from evals.ruler.haystack import Haystack
from evals.ruler.sample import Task, stream, where

NEEDLE = "One of the special magic {type} for {key} is: {value}."
MANY = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.\n{context}\n"
    "What are all the special magic {type} for {query} mentioned in the provided text?"
)
ONE = (
    "A special magic {type} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.\n{context}\n"
    "What is the special magic {type} for {query} mentioned in the provided text?"
)
PREFIX = " The special magic {type} for {query} mentioned in the provided text {verb}"
TOKENS = 128
DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]  # 40 whole percents from 0 to 100

PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there.\n{context}\n"
    "What is the pass key?"
)
PASSKEY_NEEDLE = "The pass key is {value}. Remember it. {value} is the pass key."
PASSKEY_PREFIX = " The pass key is"


@dataclasses.dataclass(frozen=True)
class Spec:
    """One kind: how many keys, values of each and questions, and what stands around them."""

    haystack: Literal["noise", "text", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


SPECS = {
    "niah_single_1": Spec("noise"),
    "niah_single_2": Spec("text"),
    "niah_single_3": Spec("text", value="uuids"),
    "niah_multikey_1": Spec("text", keys=4),
    "niah_multikey_2": Spec("needles"),
    "niah_multikey_3": Spec("needles", key="uuids", value="uuids"),
    "niah_multivalue": Spec("text", values=4),
    "niah_multiquery": Spec("text", keys=4, queries=4),
}
DRAW = {"words": words.key, "numbers": words.number, "uuids": words.identifier}


def retrieval(kind: str, label: str, haystack: Haystack) -> Task:
    """One of SPECS; `label` is what chance depends on."""
    spec, draw = SPECS[kind], stream(label)
    keys = _different(draw, DRAW[spec.key], spec.keys, haystack.text)
    values = _different(draw, DRAW[spec.value], spec.keys * spec.values, haystack.text)
    pairs = [(keys[i // spec.values], value) for i, value in enumerate(values)]
    asked = draw.sample(keys, spec.queries)
    pairs_asked = [pair for key in asked for pair in pairs if pair[0] == key]
    if spec.haystack == "text":
        depths = sorted(draw.sample(DEPTHS, len(pairs)))
        units, joint = haystack.sentences, " "
    else:
        depths = sorted(draw.random() for _ in pairs)
        units, joint = _lines(spec, label, {*keys, *values}), "\n"
    name = {"noise": "noise", "text": haystack.name, "needles": "needles"}[spec.haystack]
    task = _Hidden(spec.value, pairs, pairs_asked, depths, units, joint)
    return task.named(kind, name)


def single(kind: str, label: str, haystack: Haystack, depth: float) -> Task:
    """niah_single_2 with its needle at a depth."""
    draw = stream(label)
    key = _different(draw, words.key, 1, haystack.text)[0]
    pair = (key, _different(draw, words.number, 1, haystack.text)[0])
    task = _Hidden("numbers", [pair], [pair], [depth], haystack.sentences, " ")
    return task.named(kind, haystack.name)


def passkey(label: str, depth: float) -> Task:
    """Five digits between repeated sentences."""
    value = words.number(stream(label), digits=5)
    needle = PASSKEY_NEEDLE.format(value=value)
    sentences = [part.rstrip(".") + "." for part in words.NOISE.split(". ")]

    def build(count: int) -> tuple[str, tuple[float, ...]]:
        units = [sentences[i % len(sentences)] for i in range(count)]
        context, starts = hide(units, [needle], [depth], " ")
        return PASSKEY.format(context=context), (where(context, starts[0], needle),)

    return Task("passkey", build, PASSKEY_PREFIX, (value,), f" {value}", 10, "noise")


def hide(
    units: Sequence[str], needles: Sequence[str], depths: Sequence[float], joint: str
) -> tuple[str, list[int]]:
    """The context with needles at rising depths, and the character each begins at."""
    assert list(depths) == sorted(depths)
    parts, starts, last, at = [], [], 0, 0
    for needle, depth in zip(needles, depths, strict=True):
        place = int(len(units) * depth)
        before = [*units[last:place], needle]
        parts += before
        at += sum(map(len, before)) + len(joint) * len(before)
        starts.append(at - len(joint) - len(needle))
        last = place
    return joint.join([*parts, *units[last:]]), starts


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """Needles (key, value) at rising depths, and those that are asked for."""

    type: str  # of the values
    pairs: list[tuple[str, str]]
    asked: list[tuple[str, str]]
    depths: list[float]
    units: Callable[[int], list[str]]
    joint: str

    def build(self, count: int) -> tuple[str, tuple[float, ...]]:
        """The prompt around `count` units."""
        needles = [NEEDLE.format(type=self.type, key=k, value=v) for k, v in self.pairs]
        context, starts = hide(self.units(count), needles, self.depths, self.joint)
        found = [
            where(context, starts[self.pairs.index(pair)], needles[self.pairs.index(pair)])
            for pair in self.asked
        ]
        return self._ask(MANY if len(self.asked) > 1 else ONE, context=context), tuple(found)

    def named(self, kind: str, haystack: str) -> Task:
        """The task."""
        values = tuple(value for _, value in self.asked)
        prefix = self._ask(PREFIX, verb="are" if len(values) > 1 else "is")
        answer = " " + ", ".join(values)
        return Task(kind, self.build, prefix, values, answer, TOKENS, haystack)

    def _ask(self, template: str, **fields: str) -> str:
        keys = list(dict.fromkeys(key for key, _ in self.asked))
        query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        kind = self.type if len(self.asked) > 1 else self.type.removesuffix("s")
        return template.format(type=kind, query=query, **fields)


def _lines(spec: Spec, label: str, taken: Collection[str]) -> Callable[[int], list[str]]:
    """Makes lines of noise, or needles nobody asks for: none has a key or a value of `taken`."""
    if spec.haystack == "noise":
        return lambda count: [words.NOISE] * count
    draw, lines = stream(label, "lines"), []

    def more(count: int) -> list[str]:
        while len(lines) < count:
            key, value = (_other(draw, DRAW[what], taken) for what in (spec.key, spec.value))
            lines.append(NEEDLE.format(type=spec.value, key=key, value=value))
        return lines[:count]

    return more


def _other(draw: random.Random, make: Callable, taken: Collection[str]) -> str:
    return next(new for new in iter(lambda: make(draw), None) if new not in taken)


def _different(draw: random.Random, make: Callable, count: int, text: str) -> list[str]:
    """`count` different ones that are not in `text`."""
    found = []
    while len(found) < count:
        new = make(draw)
        if new not in found and new not in text:
            found.append(new)
    return found
