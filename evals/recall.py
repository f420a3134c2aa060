"""Associative recall of many keys: the share of values that a model finds, by length and depth.

    python -m evals.recall --config=configs/long_context_lab.py:full

The text is prefilled in chunks, each question is a key after it, and the answer is what greedy
decoding writes: right if it is the value, token by token. Writes recall.json into the workdir, anew
after each row; "complete" tells whether all rows are in it.

    for row in rows(model, tokenizer, RecallConfig(lengths=(1024, 2048))):
        print(row["length"], row["accuracy"])
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import backend, tree
from core.command import cli
from core.config import Experiment, UserError
from core.sharding import MeshConfig, make_mesh, prefilling
from core.storage import streams
from core.storage.output import File, is_json
from data.texts import recall
from data.tokenizer.base import Tokenizer
from evals.config import RecallConfig
from infer import load
from infer.engine import Engine, Plan
from infer.sampling.params import Sampling, pack
from infer.steps import Prefilled
from model import transformer
from model.ops.rope import Rope
from model.transformer import Transformer

ANSWER = 1  # tokens of a value
KEYS = "name", "bundle", "rows"  # of recall.json


def main(experiment: Experiment) -> list[dict[str, Any]]:
    """Asks, prints and writes; the rows of recall.json."""
    config: RecallConfig = experiment.recall
    found = load.find(config.checkpoint or experiment.workdir, config.step, config.dtype)
    if found.tokenizer is None:
        raise UserError(f"{found.path} has no tokenizer: recall asks in words")
    found.config.check_length("recall.lengths", max(config.lengths))
    path = config.output or Path(experiment.workdir) / "recall.json"
    file = File(path, "recall.output", is_json(*KEYS), found.files("recall.checkpoint"))
    mesh, done = experiment.mesh, []
    count = len(config.ropes) * len(config.lengths)
    backend.keep_programs(experiment.workdir)
    with streams.guarded(file.kept), jax.set_mesh(make_mesh(mesh)):
        of = f"{found.path} step {found.step}"
        how = load.computing(found.config, "recall", config.dtype)
        print(f"{of}, {how}", file=sys.stderr, flush=True)
        model = load.restore(found, prefilling(mesh.strategy, mesh.ulysses, mesh.both_ways))
        for row in rows(model, found.tokenizer, config):
            done.append(row)
            values = experiment.name, of, done
            # After each row, so that none is lost; stdout gets the whole, once.
            if file.kept or len(done) == count:
                report = dict(zip(KEYS, values, strict=True), complete=len(done) == count)
                report["dtype"] = found.config.dtype
                file.write(json.dumps(report, indent=1) + "\n")
            print(line(row), file=sys.stderr, flush=True)
        print(table(done), file=sys.stderr if file.is_stdout else sys.stdout)
    return done


def rows(
    model: Transformer, tokenizer: Tokenizer, config: RecallConfig
) -> Iterator[dict[str, Any]]:
    """One row for each of `ropes` and `lengths`; accuracies are percent of what was asked.

    `model` is on the mesh in use. UserError, before any is read, for a length or a tokenizer
    that cannot work.
    """
    quizzes = {length: _quizzes(length, tokenizer, config) for length in config.lengths}
    for name in config.ropes:
        engines = _engines(extend(model, name, config.factor), tokenizer, config)
        for length, (texts, asked_XQ2) in quizzes.items():
            began = time.perf_counter()
            right_XQ = answers(*engines, texts, asked_XQ2)
            yield {
                "task": "recall",
                "rope": name,
                "length": length,
                "accuracy": 100 * float(right_XQ.mean()),
                "by_depth": [100 * float(x) for x in right_XQ.mean(axis=0)],
                "asked": right_XQ.size,
                "seconds": time.perf_counter() - began,
            }


def _quizzes(length: int, tokenizer: Tokenizer, config: RecallConfig):
    """(token rows [X], asked (key, value) tokens [X, Q, 2]) of the texts of a length."""
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    body = length - len(bos) - 1 - ANSWER
    how = body, config.records, config.asked
    try:
        quizzes = [recall.question(config.seed, i, *how) for i in range(config.samples)]
    except UserError as error:
        raise UserError(f"recall.lengths={length}: {error}") from None
    rows = [np.concatenate([bos, ids]) for ids in tokenizer.encode_batch([q.text for q in quizzes])]
    lines = [f" {key} {value}" for quiz in quizzes for key, value in quiz.asked]
    asked = tokenizer.encode_batch(lines)
    if any(len(row) != body + len(bos) for row in rows) or any(len(pair) != 2 for pair in asked):
        raise UserError(
            "the tokenizer has not a token a word of data.source=recall: prepare with a "
            "data.vocab_size as large as the text supports"
        )
    return rows, np.reshape(asked, (config.samples, config.asked, 2))


def extend(model: Transformer, name: str, factor: float) -> Transformer:
    """The same weights with the RoPE of every slot extended to `factor` times model.context."""
    config = model.config
    slots = tuple(
        dataclasses.replace(spec, rope=spec.rope and extended(spec.rope, name, factor, *shape))
        for spec in config.pattern
        for shape in [(config.context, config.kv_shape(spec)[1])]
    )
    abstract = transformer.abstract(dataclasses.replace(config, pattern=slots), model.rules)
    return tree.with_leaves(abstract, tree.named_leaves(model))


def extended(rope: Rope, name: str, factor: float, context: int, head_dim: int) -> Rope:
    """`rope` for `factor` times `context`, without training.

    pi: arXiv 2306.15595; ntk: a larger base, so that the slowest pair turns as slowly as with pi
    (arXiv 2309.00071, appendix A.1); dynamic: ntk by the length of each text; yarn: the same paper.
    """
    if name == "none":
        return rope
    if rope.scaling != "none":
        raise UserError(f"ropes={name!r}: the model's own RoPE is scaled already, {rope.scaling}")
    if name == "ntk":
        return dataclasses.replace(rope, base=rope.base * factor ** (head_dim / (head_dim - 2)))
    if name == "pi":
        return dataclasses.replace(rope, scaling="linear", factor=factor)
    # dynamic grows with each text: a factor beyond 1 would stretch it more than the text is.
    grows = name == "dynamic"
    return dataclasses.replace(
        rope, scaling=name, factor=1.0 if grows else factor, original=context
    )


def _engines(
    model: Transformer, tokenizer: Tokenizer, config: RecallConfig
) -> tuple[Engine, Engine]:
    """One to read texts of any of the lengths, and one that adds a key to what was read."""
    size = min(config.batch_size, config.samples)
    plan = Plan.of(size, max(config.lengths) - ANSWER, ANSWER, config.prefill_chunk)
    shortest = Plan.of(size, 1, ANSWER, 1).chunk
    return Engine(model, plan, tokenizer), Engine(model, plan._replace(chunk=shortest), tokenizer)


def answers(
    reader: Engine, asker: Engine, texts: Sequence[np.ndarray], asked_XQ2: np.ndarray
) -> np.ndarray:
    """Booleans [X, Q]: whether greedy decoding after text x and key q writes the value."""
    size, right = reader.plan.batch, []
    for first in range(0, len(texts), size):
        rows, asked_BQ2 = texts[first : first + size], asked_XQ2[first : first + size]
        read = reader.prefill(rows, new=[1 + ANSWER] * len(rows))
        tokens = [_ask(asker, read, rows, asked_B2[:, 0]) for asked_B2 in asked_BQ2.swapaxes(0, 1)]
        right.append(np.stack(tokens, axis=1) == asked_BQ2[..., 1])
    return np.concatenate(right)


def _ask(
    engine: Engine, read: Prefilled, texts: Sequence[np.ndarray], key_B: np.ndarray
) -> np.ndarray:
    """The token [B] that follows each text and its key; `read` stays as it is."""
    prompts = [np.append(text, key) for text, key in zip(texts, key_B, strict=True)]
    now = engine.prefill(prompts, jax.tree.map(jnp.copy, read), first=len(texts[0]))
    hows = [Sampling(temperature=0, max_tokens=ANSWER)] * len(prompts)
    state = engine.start(now, prompts, [0] * len(prompts), pack(hows))
    _, (_, made) = engine.advance(state, np.zeros(engine.plan.batch, bool))
    return np.asarray(made.tokens_BC)[: len(prompts), 0]


def line(row: dict[str, Any]) -> str:
    """A row as it is measured."""
    depths = " ".join(f"{value:4.0f}" for value in row["by_depth"])
    return (
        f"{row['rope']:>8} {row['length']:>7,}: {row['accuracy']:5.1f} % of {row['asked']} "
        f"| by depth {depths} | {row['seconds']:.1f} s"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line for each RoPE, a column for each length."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| rope | " + " | ".join(f"{n:,}" for n in lengths) + " |"]
    lines.append("|---|" + "---:|" * len(lengths))
    for name in dict.fromkeys(row["rope"] for row in rows):
        mine = {row["length"]: row["accuracy"] for row in rows if row["rope"] == name}
        lines.append(f"| {name} | " + " | ".join(f"{mine[n]:.1f}" for n in lengths) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, __doc__, recall=RecallConfig, mesh=MeshConfig)
