"""RULER's thirteen tasks and its rules of scoring (arXiv 2404.06654); a needle by depth.

    sample = tasks.generate("vt", 4096, tokenizer, seed=0, index=0)
    texts = [...]  # what a model writes after sample.text, sample.max_tokens at most
    tasks.score("vt", texts, [sample.references])  # percent
    tasks.effective_length({4096: 91.2, 8192: 84.0})  # 4096

A sample depends on (kind, length, seed, index), the tokenizer and the texts given, nothing else;
what is asked for is the same at every length.
"""

import re
from collections.abc import Mapping, Sequence

from core.config import UserError
from data.tokenizer.base import Tokenizer
from evals.ruler import counting, haystack, needles, questions, tracing
from evals.ruler.haystack import Haystack
from evals.ruler.questions import Questions
from evals.ruler.sample import Sample, fit

QUESTIONS = ("qa_1", "qa_2")
KINDS = (*needles.SPECS, "vt", "cwe", "fwe", *QUESTIONS)
THRESHOLD = 85.6  # Llama-2-7B-chat at 4096 tokens: RULER, table 3
CONTROL = re.compile(r"[\x00-\x1f]")

read_haystack = haystack.read
read_questions = questions.read


def generate(
    kind: str,
    length: int,
    tokenizer: Tokenizer,
    seed: int,
    index: int,
    text: Haystack | None = None,
    source: Questions | None = None,
) -> Sample:
    """Sample `index` of a kind: as much of the haystack as leaves room for the answer.

    `text` takes the place of RULER's essays; without it they are our filler. `source` has the
    questions of qa_1 and qa_2.
    """
    if kind not in KINDS:
        raise UserError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    label = f"{kind} {seed} {index}"  # not the length: lengths compare like with like
    if kind in QUESTIONS:
        if source is None:
            raise UserError(
                f"{kind} needs questions, which are not built in: name a JSON file of the form "
                f"{questions.FORMAT}"
            )
        task = questions.task(kind, label, index, source)
    elif kind == "vt":
        task = tracing.task(kind, label, length, tokenizer)
    elif kind == "cwe":
        task = counting.common_words(kind, label, length, tokenizer)
    elif kind == "fwe":
        task = counting.frequent_words(kind, label, length)
    else:
        task = needles.retrieval(kind, label, text or haystack.builtin(length))
    return fit(task, length, tokenizer)


def needle(
    length: int,
    depth: float,
    tokenizer: Tokenizer,
    seed: int,
    index: int = 0,
    text: Haystack | None = None,
) -> Sample:
    """niah_single_2 with its needle at a depth from 0 to 1: one cell of a map of depth x length."""
    _check_depth(depth)
    label = f"needle {depth} {seed} {index}"
    task = needles.single("needle", label, text or haystack.builtin(length), depth)
    return fit(task, length, tokenizer)


def passkey(length: int, depth: float, tokenizer: Tokenizer, seed: int, index: int = 0) -> Sample:
    """Five digits at a depth from 0 to 1 of repeated sentences (arXiv 2305.16300)."""
    _check_depth(depth)
    task = needles.passkey(f"passkey {depth} {seed} {index}", depth)
    return fit(task, length, tokenizer)


def _check_depth(depth: float) -> None:
    if not 0 <= depth <= 1:
        raise UserError(f"depth={depth} is out of range: it must be >= 0 and <= 1")


def score(kind: str, texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Percent: of the references found in each text, or, for questions, of texts with any.

    RULER's string_match_all and string_match_part (scripts/eval/synthetic/constants.py): part of
    the text, in any case, rounded to two decimals.
    """
    pairs = list(zip(map(_cleaned, texts), references, strict=True))
    found = [[part.lower() in text for part in parts] for text, parts in pairs]
    if kind in QUESTIONS:
        points = [float(any(hits)) for hits in found]
    else:
        points = [sum(hits) / len(hits) for hits in found]
    return round(100 * sum(points) / len(points), 2)


def _cleaned(text: str) -> str:
    return CONTROL.sub("\n", text.strip()).strip().lower()


def effective_length(scores: Mapping[int, float]) -> int | None:
    """The longest length whose score, the mean of all kinds, exceeds that of Llama-2-7B at 4096.

    None if no length does.
    """
    return max((length for length, value in scores.items() if value > THRESHOLD), default=None)


def averages(scores: Mapping[int, float]) -> dict[str, float]:
    """The mean over lengths, and means whose weights 1, 2, ... rise or fall with the length."""
    values = [scores[length] for length in sorted(scores)]
    count = len(values)
    whole = count * (count + 1) / 2
    return {
        "average": sum(values) / count,
        "weighted_increasing": sum(i * x for i, x in enumerate(values, 1)) / whole,
        "weighted_decreasing": sum((count - i) * x for i, x in enumerate(values)) / whole,
    }
