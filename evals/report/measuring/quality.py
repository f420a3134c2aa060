"""Measures how a model uses its context, through the cache: chunked prefill, then greedy decoding.

    material = read(experiment, tokenizer)  # texts, kinds, questions; UserErrors come here
    by_position(engine_score, rows)         # loss in nats by position
    task("vt", 4096, material, config, answer)  # RULER's percent

Tasks need a function that continues samples; `answers` makes one of an engine.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.config import Experiment, UserError
from data.store import MANIFEST, TokenStore
from data.tokenizer.base import Tokenizer
from evals.config import BenchConfig
from evals.ruler import haystack, questions, tasks
from evals.ruler.haystack import Haystack
from evals.ruler.questions import Questions
from evals.ruler.sample import Sample
from infer.engine import Engine
from infer.sampling.params import Sampling, pack
from infer.text import Detokenizer, from_text

FIRST = 64  # positions of the first bucket; each of the others ends at twice the last
BY_DEPTH = ("needle", "passkey")
Answer = Callable[[Sequence[Sample]], list[str]]  # what a model writes after each
Score = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Material:
    """The text that the model reads: `tokens` of documents in a row, which begin at `starts`."""

    tokenizer: Tokenizer | None
    tokens: Any  # sliced like an array; None without texts
    starts: np.ndarray
    source: str  # of the tokens
    kinds: tuple[str, ...]
    haystack: Haystack | None
    questions: Questions | None


def read(experiment: Experiment, tokenizer: Tokenizer | None, vocab_size: int) -> Material:
    """Opens what `bench` names; UserError before any weights are read."""
    config: BenchConfig = experiment.bench
    kinds = chosen(config)
    if kinds and tokenizer is None:
        raise UserError(
            f"bench.tasks={config.tasks} are texts, but there is no bundle with a tokenizer: name "
            "one in bench.checkpoint, or leave bench.tasks empty"
        )
    asking = None
    if config.questions:
        asking = tasks.read_questions(config.questions, "bench.questions")
        asked = {*kinds} & {*tasks.QUESTIONS}
        if asked and config.task_samples > len(asking.questions):
            raise UserError(
                f"bench.task_samples={config.task_samples}, but bench.questions="
                f"{config.questions} has {len(asking.questions)} questions: lower the one or "
                "add to the other"
            )
    stack = tasks.read_haystack(config.haystack, "bench.haystack") if config.haystack else None
    tokens, starts, source = None, np.zeros(0, np.int64), ""
    folder = Path(experiment.workdir) / "data"
    if config.loss_rows and config.text:
        tokens, starts = _of_files(config.text, tokenizer)
        source = ", ".join(config.text)
    elif config.loss_rows and (folder / MANIFEST).is_file():
        store = TokenStore(folder, "validation")
        if store.vocab_size <= vocab_size:
            tokens, starts, source = store, store.starts[:-1], f"validation split of {folder}"
    return Material(tokenizer, tokens, starts, source, kinds, stack, asking)


def chosen(config: BenchConfig) -> tuple[str, ...]:
    """The kinds that `bench.tasks` names, in their order."""
    ruler = tuple(k for k in tasks.KINDS if config.questions or k not in tasks.QUESTIONS)
    groups = {"ruler": ruler, "all": (*ruler, *BY_DEPTH)}
    named = {kind for name in config.tasks for kind in groups.get(name, (name,))}
    known = (*tasks.KINDS, *BY_DEPTH)
    for name in sorted(named - {*known}):
        raise UserError(
            f"bench.tasks names {name!r}, which is no task: they are {', '.join(known)}, and the "
            "groups ruler and all"
        )
    if named & {*tasks.QUESTIONS} and not config.questions:
        raise UserError(
            f"bench.tasks={config.tasks} asks questions, which are not built in: name a JSON file "
            f"in bench.questions, of the form {questions.FORMAT}"
        )
    return tuple(kind for kind in known if kind in named)


def _of_files(globs: Sequence[str], tokenizer: Tokenizer | None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens of all files, where each begins)."""
    paths = [path for pattern in globs for path in haystack.matches(pattern, "bench.text")]
    texts = [
        from_text(haystack.content(path, "bench.text"), f"bench.text: {path}", tokenizer)
        for path in dict.fromkeys(paths)
    ]
    lengths = [len(text.tokens) for text in texts]
    starts = np.cumsum([0, *lengths])[:-1]
    return np.concatenate([text.tokens for text in texts]), starts


class Span(NamedTuple):
    """A text to tell the loss on."""

    tokens: np.ndarray  # int32 [T]
    begins: np.ndarray  # bool [T]: the first token of a document


def spans(material: Material, count: int, length: int) -> list[Span]:
    """Returns at most `count` texts of `length` tokens, each from the start of a document.

    The texts begin far apart. Documents that follow fill up what a shorter one leaves.
    """
    if length < 2:  # a single token has no loss
        return []
    ends = material.starts + length
    starts = material.starts[ends <= len(material.tokens)]
    picked = np.unique(np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int))
    return [
        Span(
            material.tokens[first : first + length].astype(np.int32),
            np.isin(np.arange(first, first + length), material.starts),
        )
        for first in starts[picked]
    ]


def by_position(score: Score, texts: Sequence[Span]) -> list[dict[str, Any]]:
    """Returns the mean loss in nats of the tokens at positions `first` to `last`, over all texts.

    The loss at a position is of its token, given those before it. The first token of a document
    does not count: no model is trained to tell it from the document before.
    """
    rows = [text.tokens for text in texts]
    loss_BT = -np.stack(score(rows)).astype(np.float64)  # [rows, length - 1], from position 1
    counts_BT = ~np.stack([text.begins[1:] for text in texts])
    edges = [1, *itertools.takewhile(lambda n: n <= loss_BT.shape[1], _doubling(FIRST))]
    found = []
    for first, end in itertools.pairwise([*edges, loss_BT.shape[1] + 1]):
        at = slice(first - 1, end - 1)
        part = loss_BT[:, at][counts_BT[:, at]]
        if part.size:
            one = dict(first=first, last=end - 1, loss=float(part.mean()), tokens=part.size)
            found.append(one)
    return found


def _doubling(number: int) -> Iterator[int]:
    while True:
        yield number
        number *= 2


def samples(kind: str, length: int, material: Material, config: BenchConfig) -> list[Sample]:
    """The samples of a task at a length; of BY_DEPTH as many at each depth, one after the other."""
    tokenizer, stack = material.tokenizer, material.haystack
    numbers = range(config.task_samples)
    if kind == "needle":
        made = (
            tasks.needle(length, depth, tokenizer, 0, i, stack)
            for depth in config.depths
            for i in numbers
        )
    elif kind == "passkey":
        made = (
            tasks.passkey(length, depth, tokenizer, 0, i)
            for depth in config.depths
            for i in numbers
        )
    else:
        made = (
            tasks.generate(kind, length, tokenizer, 0, i, stack, material.questions)
            for i in numbers
        )
    return list(made)


def task(
    kind: str, length: int, material: Material, config: BenchConfig, answer: Answer
) -> dict[str, Any]:
    """{"score"} in percent, with {"depths"} for BY_DEPTH; {"skipped"} if no sample is so short."""
    try:
        given = samples(kind, length, material, config)
    except UserError as error:
        return {"skipped": str(error)}
    texts = answer(given)
    references = [sample.references for sample in given]
    found = {"score": tasks.score(kind, texts, references), "samples": len(given)}
    if kind in BY_DEPTH:
        each = config.task_samples
        found["depths"] = [
            {"depth": depth, "score": tasks.score(kind, texts[part], references[part])}
            for i, depth in enumerate(config.depths)
            for part in [slice(i * each, (i + 1) * each)]
        ]
    return found


def answers(engine: Engine, tokenizer: Tokenizer) -> Answer:
    """Greedy continuations by an engine, a batch at a time."""

    def answer(given: Sequence[Sample]) -> list[str]:
        return [text for part in batches(given, engine.plan.batch) for text in one(part)]

    def one(given: Sequence[Sample]) -> list[str]:
        prompts = [from_text(sample.text, sample.kind, tokenizer).tokens for sample in given]
        new = [sample.max_tokens for sample in given]
        packed = pack([Sampling(temperature=0, max_tokens=count) for count in new])
        now = engine.prefill(prompts, new=new)
        state = engine.start(now, prompts, [0] * len(given), packed)
        writers = [Detokenizer(tokenizer, (), prompt) for prompt in prompts]
        stopped_B = np.zeros(engine.plan.batch, bool)
        for made in engine.decode(state, stopped_B):
            for writer, tokens_C in zip(writers, made.tokens_BC, strict=False):
                for token in tokens_C[tokens_C >= 0].tolist():
                    writer.push(token)
        for writer in writers:
            writer.flush()
        return [writer.text for writer in writers]

    return answer


def scores(engine: Engine) -> Score:
    """Log-probabilities by an engine, a batch at a time."""

    def score(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        parts = batches(rows, engine.plan.batch)
        return [row_T for part in parts for row_T in engine.score(part)[1]]

    return score


def batches(items: Sequence, size: int) -> list[Sequence]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The quality of a row: loss by position, the score of each task, RULER's mean of its kinds."""
    loss, results = found.pop("loss", None), found
    scored = {kind: one["score"] for kind, one in results.items() if "score" in one}
    ruler = [scored[kind] for kind in tasks.KINDS if kind in scored]
    quality = {"tasks": scored} if scored else {}
    if loss and loss["buckets"]:
        quality["loss_by_position"] = loss["buckets"]
        quality["loss"] = sum(b["loss"] * b["tokens"] for b in loss["buckets"]) / sum(
            b["tokens"] for b in loss["buckets"]
        )
    for kind in BY_DEPTH:
        if kind in scored:
            quality[kind] = results[kind]["depths"]
    if ruler:
        quality["ruler"] = sum(ruler) / len(ruler)
        quality["ruler_kinds"] = len(ruler)
    skipped = {kind: one["skipped"] for kind, one in results.items() if "skipped" in one}
    return {**quality, "skipped": skipped} if skipped else quality


def effective(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Applies RULER's rule to rows of a case: {"length", "kinds", "scores", ...}; {} without any.

    Lengths at which a kind has no sample are left out. Less than 13 kinds is less than RULER asks.
    """
    found = {row["context"]: row["quality"] for row in rows if row["quality"].get("ruler_kinds")}
    if not found:
        return {}
    most = max(quality["ruler_kinds"] for quality in found.values())
    means = {n: q["ruler"] for n, q in found.items() if q["ruler_kinds"] == most}
    return {
        "length": tasks.effective_length(means),
        "kinds": most,
        "scores": means,
        **tasks.averages(means),
    }


def by_case(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`effective` of each case that has scores, as "attention, kv"."""
    names = dict.fromkeys((row["attention"], row["kv"]) for row in rows)
    found = {}
    for attention, kv in names:
        one = effective([r for r in rows if (r["attention"], r["kv"]) == (attention, kv)])
        if one:
            found[f"{attention}, {kv}"] = one
    return found
