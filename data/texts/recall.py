"""Texts made to be remembered: records `VALUE key` among filler, and later `key VALUE` for some.

    text = document(seed=0, index=3, tokens=1024)
    quiz = question(seed=0, index=3, tokens=4096, records=32, asked=8)

Associative recall of many keys (Zoology, arXiv 2312.04927): a key that comes again is followed by
the value that stood before it, and nothing else tells it. Keys, values, words of the filler and
line ends are a token each once the tokenizer has all the pieces that such texts support, and
"tokens" here are these; a bos and an eos come on top.

Why the value stands before the key: to find it takes a look at the same key, which then has its
value beside it. With the value after the key a model must first learn to look for what comes
after the same key, and these tiny ones do not within 2 million tokens; this they do within 0.5.
"""

import dataclasses
import random
import string
from collections.abc import Iterator

from core.config import UserError
from data.texts.document import Document

# RULER's noise (arXiv 2404.06654), a sentence a line. A line begins with a space, because with it
# a word is the same token at the start of a line and in it.
FILLER = (
    " the grass is green",
    " the sky is blue",
    " the sun is yellow",
    " here we go",
    " there and back again",
)
KEYS, VALUES = 128, 32
RECORD = 3  # tokens: value, key, line end


@dataclasses.dataclass(frozen=True)
class Quiz:
    """A text whose records were each written once, and some of them to ask for."""

    text: str  # ends with a line end: `text + " " + key` is a prompt
    asked: tuple[tuple[str, str], ...]  # (key, value), in the order of their depths
    depths: tuple[float, ...]  # of these records in the text: 0 is its start, 1 its end


def pairs(letters: str, count: int) -> list[str]:
    """`count` words of two letters, the same ones always."""
    words = [a + b for a in letters for b in letters]
    return sorted(random.Random("words").sample(words, count))


KEY = pairs(string.ascii_lowercase, KEYS)
VALUE = pairs(string.ascii_uppercase, VALUES)


def documents(seed: int, shortest: int, longest: int) -> Iterator[Document]:
    """Endless documents of `shortest` to `longest` tokens; each doubling has as many tokens.

    Short ones teach to look back for a key at all, long ones from how far.
    """
    index = 0
    while True:
        part = random.Random(f"length {seed} {index}").random()
        size = int(1 / (1 / shortest - part * (1 / shortest - 1 / longest)))
        yield Document(f"recall {seed} {index}", document(seed, index, size).encode())
        index += 1


def document(seed: int, index: int, tokens: int) -> str:
    """Records, filler, and again and again a key with its value: `tokens` at most.

    What was written long ago comes again more often than what was written lately.
    """
    draw = random.Random(f"document {seed} {index}")
    keys, values = draw.sample(KEY, KEYS), {}
    known = []  # keys, by when they were written last
    dull, fresh = draw.uniform(0, 0.6), draw.uniform(0.2, 0.6)  # chances, of one text
    lines = []
    while True:
        if draw.random() < dull:
            line = draw.choice(FILLER)
        else:
            if not known or (keys and draw.random() < fresh):
                key = keys.pop()
                values[key] = draw.choice(VALUE)
                line = f" {values[key]} {key}"
            else:
                key = known.pop(int(len(known) * draw.random() ** 2))
                line = f" {key} {values[key]}"
            known.append(key)
        tokens -= count(line)
        if tokens < 0:
            return "\n".join(lines) + "\n"
        lines.append(line)


def question(seed: int, index: int, tokens: int, records: int, asked: int) -> Quiz:
    """A text of exactly `tokens`: records at even depths, of which `asked` are to be asked for.

    Keys, values and which are asked for depend on (seed, index), not on the length.
    """
    least = RECORD * records + max(map(count, FILLER)) ** 2
    if records > KEYS or asked > records or tokens < least:
        raise UserError(
            f"a quiz of {tokens} tokens with records={records}, asked={asked}: there are {KEYS} "
            f"keys, no more can be asked for than there are, and so many take {least} tokens"
        )
    draw = random.Random(f"question {seed} {index}")
    known = {key: draw.choice(VALUE) for key in draw.sample(KEY, records)}
    depths = [(i + draw.random()) / records for i in range(records)]
    chosen = [int((i + draw.random()) * records / asked) for i in range(asked)]
    filler = sentences(draw, tokens - RECORD * records)
    lines, last = [], 0
    for depth, (key, value) in zip(depths, known.items(), strict=True):
        place = int(depth * (len(filler) + 1))
        lines += [*filler[last:place], f" {value} {key}"]
        last = place
    text = "\n".join([*lines, *filler[last:]]) + "\n"
    found = list(known.items())
    return Quiz(text, tuple(found[i] for i in chosen), tuple(depths[i] for i in chosen))


def sentences(draw: random.Random, tokens: int) -> list[str]:
    """Filler of exactly `tokens`, at least 12."""
    lines = []
    while tokens:
        fits = [line for line in FILLER if tokens - count(line) not in (1, 2, 3, 6, 7, 11)]
        fits = [line for line in fits if count(line) <= tokens]
        lines.append(draw.choice(fits))
        tokens -= count(lines[-1])
    return lines


def count(line: str) -> int:
    """Tokens of a line: its words, and its end."""
    return line.count(" ") + 1
