"""The log-probability of every given token, in chunks through the cache: bounded memory.

    python -m infer.score --config=configs/quickstart.py --config.score.input=texts.jsonl

A summary goes to stdout. score.output gets JSON lines, appended batch by batch.
"""

import math
import sys
import time

import jax
import numpy as np

from core import backend
from core.command import cli
from core.config import Experiment, UserError
from core.sharding import MeshConfig, make_mesh, prefilling
from core.storage import rows_file, streams
from infer import load, text
from infer.config import ScoreConfig
from infer.engine import Engine, Plan
from model.cache.form import CacheConfig
from model.sizes import weights


def main(experiment: Experiment) -> list[dict]:
    """Scores score.input; the rows of score.output."""
    config: ScoreConfig = experiment.score
    if not config.input:
        raise UserError("score.input is empty: name a .jsonl or a .txt, or - for stdin")
    found = load.find(config.checkpoint or experiment.workdir, config.step, config.dtype)
    form = CacheConfig.of(config)
    form.apply(found.config)  # refuses what cannot be
    vocab_size = (found.tokenizer or found.config).vocab_size
    prompts = text.read(config.input, "score.input", found.tokenizer, vocab_size)
    rows = [prompt.tokens for prompt in prompts]
    for number, row in enumerate(rows, 1):
        if len(row) > found.config.context and not config.cache_window:
            raise UserError(
                f"score.input={config.input}: text {number} has {len(row)} tokens, more than "
                f"model.context={found.config.context}: shorten it, or set score.cache_window"
            )
    inputs = [("score.input", config.input), *found.files("score.checkpoint")]
    file = rows_file.RowsFile(config.output, "score.output", inputs)
    began, results = time.perf_counter(), []
    backend.keep_programs(experiment.workdir)
    mesh = experiment.mesh
    with file, streams.guarded(file.kept), jax.set_mesh(make_mesh(mesh)):
        rules = prefilling(mesh.strategy, mesh.ulysses, mesh.both_ways)
        rounding = weights.rounding(found.config, rules, config.weights, config.weights_group)
        model = load.restore(found, rules, rounding)
        size = min(config.batch_size, len(rows))
        plan = Plan.of(size, max(map(len, rows)), 0, config.prefill_chunk)
        engine = Engine(model, plan, form=form)
        how = load.computing(found.config, "score", config.dtype)
        print(f"{found.path} step {found.step}, {how}", file=sys.stderr, flush=True)
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            _, scores = engine.score(batch)
            done = [result(row, score) for row, score in zip(batch, scores, strict=True)]
            file.append(done)
            results += done
        if config.output:
            print(file.told(), file=sys.stderr)
        # Rows that go to stdout have it to themselves.
        to = sys.stderr if file.is_stdout else sys.stdout
        print(summary(results, time.perf_counter() - began), file=to)
    return results


def result(tokens: np.ndarray, logprobs: np.ndarray) -> dict:
    """The row of score.output; a single token has no mean and no perplexity."""
    mean = float(logprobs.mean(dtype=np.float64)) if logprobs.size else None
    return {
        "tokens": tokens.tolist(),
        "logprobs": [None, *logprobs.tolist()],
        "mean_logprob": mean,
        "perplexity": None if mean is None else perplexity(mean),
    }


def perplexity(mean_logprob: float) -> float:
    """Returns exp(-mean), which is infinite where no float is as large."""
    try:
        return math.exp(-mean_logprob)
    except OverflowError:
        return math.inf


def summary(results: list[dict], seconds: float) -> str:
    """One line over all tokens that have a score."""
    scored = [x for row in results for x in row["logprobs"][1:]]
    if not scored:
        return f"{len(results)} texts, and none has a second token to score"
    mean = math.fsum(scored) / len(scored)
    return (
        f"{len(results)} texts, {len(scored)} tokens scored in {seconds:.1f} s: "
        f"mean log-probability {mean:.4f} nats, perplexity {perplexity(mean):.2f}"
    )


if __name__ == "__main__":
    cli.run(main, __doc__, score=ScoreConfig, mesh=MeshConfig)
