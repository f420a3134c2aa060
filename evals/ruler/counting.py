"""Common words (cwe) and frequent words (fwe) of a long list.

Templates and figures are those of RULER (scripts/data/synthetic/{common_words_extraction.py,
freq_words_extraction.py, constants.py}).
"""

import math
import string

from data.tokenizer.base import Tokenizer
from evals.ruler import words
from evals.ruler.sample import Task, listed, size, stream

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON_TOKENS = 120
COMMON_WORDS = 10
SHORT = 4096  # tokens; below it words appear less often
# (times a common word appears, times another does, words) of the example and of the list.
EXAMPLE, LIST = (10, 3, 40), (30, 3)
SHORT_EXAMPLE, SHORT_LIST = (3, 1, 20), (6, 1)

FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three "
    "most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
FREQUENT_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
FREQUENT_TOKENS = 50
ALPHA = 2.0
LETTERS = 6
LEAST_WORDS = 27  # so that the third word appears once


def common_words(kind: str, label: str, length: int, tokenizer: Tokenizer) -> Task:
    """Ten words that appear more often than the others, after an example.

    From 4096 tokens on they appear as often as in RULER, unless they are too many tokens.
    """
    full = _common(kind, label, EXAMPLE, LIST)
    room = length - size(full.build(full.least)[0] + full.prefix + full.answer, tokenizer)
    if length >= SHORT and room >= full.max_tokens:
        return full
    return _common(kind, label, SHORT_EXAMPLE, SHORT_LIST)


def _common(kind: str, label: str, example: tuple[int, int, int], times: tuple[int, int]) -> Task:
    *shown_times, skipped = example
    draw, found = stream(label), {}

    def different(first: int, last: int) -> list[str]:
        while len(found) < last:
            found[words.plain(draw)] = None
        return list(found)[first:last]

    shown, answer = different(0, skipped), different(skipped, skipped + COMMON_WORDS)
    start = _list(f"{label} example", shown, *shown_times)
    start += COMMON_PREFIX + " " + listed(shown[:COMMON_WORDS]) + "\n"

    def build(count: int) -> tuple[str, tuple[float, ...]]:
        return start + _list(label, different(skipped, skipped + count), *times), ()

    return Task(
        kind, build, COMMON_PREFIX, tuple(answer), " " + listed(answer), COMMON_TOKENS,
        "words", least=COMMON_WORDS + 1, most=words.PLAIN * 9 // 10,
    )  # fmt: skip


def _list(label: str, chosen: list[str], often: int, seldom: int) -> str:
    entries = chosen[:COMMON_WORDS] * often + chosen[COMMON_WORDS:] * seldom
    stream(label, "list").shuffle(entries)
    return COMMON.format(context=listed(entries))


def frequent_words(kind: str, label: str, length: int) -> Task:
    """Made-up words as often as Zipf's law says; the most frequent is dots, which do not count."""
    draw = stream(label)
    vocabulary = {"...": None}
    while len(vocabulary) < max(length // 50, 5):
        vocabulary["".join(draw.choices(string.ascii_lowercase, k=LETTERS))] = None
    vocabulary = list(vocabulary)
    answer = vocabulary[1:4]

    def build(count: int) -> tuple[str, tuple[float, ...]]:
        times = frequencies(count, len(vocabulary))
        entries = [w for word, n in zip(vocabulary, times, strict=True) for w in [word] * n]
        stream(label, "list").shuffle(entries)
        return FREQUENT.format(context=" ".join(entries)), ()

    return Task(
        kind, build, FREQUENT_PREFIX, tuple(answer), " " + " ".join(answer), FREQUENT_TOKENS,
        "coded words", least=LEAST_WORDS,
    )  # fmt: skip


def frequencies(count: int, ranks: int) -> list[int]:
    """Returns the frequency of each rank: count / (rank^2 zeta(2)), rounded down.

    Of a small count, the largest below it for which the fourth rank is ahead of the fifth.
    """
    while True:
        scale = count / (math.pi**2 / 6)  # zeta(ALPHA)
        times = [int(scale * rank**-ALPHA) for rank in range(1, ranks + 1)]
        if times[3] > times[4]:
            return times
        count -= 1
