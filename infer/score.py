"""The log-probability of every given token, in chunks through the cache: bounded memory.

    python -m infer.score --config=configs/quickstart.py --config.score.input=texts.jsonl

A summary goes to stdout, score.output gets JSON lines.
"""

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from core import cli
from core.checkpoint import write_text
from core.config import Experiment, UserError
from core.sharding import MeshConfig, make_mesh, prefilling
from infer import load, steps, text
from infer.config import ScoreConfig
from infer.engine import Engine, Plan
from model import cache
from model.cache import KVCache
from model.transformer import Transformer

LOGITS = 64  # tokens of a row whose logits exist at the same time


def main(experiment: Experiment) -> list[dict]:
    """Scores score.input; the rows of score.output."""
    config: ScoreConfig = experiment.score
    if not config.input:
        raise UserError("score.input is empty: name a .jsonl or a .txt, or - for stdin")
    found = load.find(config.checkpoint or experiment.workdir, config.step)
    vocab_size = (found.tokenizer or found.config).vocab_size
    prompts = text.read(config.input, "score.input", found.tokenizer, vocab_size)
    rows = [prompt.tokens for prompt in prompts]
    for number, row in enumerate(rows, 1):
        if len(row) > found.config.context:
            raise UserError(
                f"score.input={config.input}: text {number} has {len(row)} tokens, more than "
                f"model.context={found.config.context}: shorten it"
            )
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with jax.set_mesh(make_mesh(experiment.mesh)):
        mesh = experiment.mesh
        model = load.restore(found, prefilling(mesh.strategy, mesh.ulysses, mesh.both_ways))
        size = min(config.batch_size, len(rows))
        plan = Plan.of(size, max(map(len, rows)), 0, config.prefill_chunk)
        scorer = Scorer(Engine(model, plan))
        scores = [s for i in range(0, len(rows), size) for s in scorer.score(rows[i : i + size])]
    results = [result(row, score) for row, score in zip(rows, scores, strict=True)]
    if config.output:
        write_text(Path(config.output), "".join(json.dumps(row) + "\n" for row in results))
        print(f"{len(rows)} rows in {config.output}", file=sys.stderr)
    print(summary(results, time.perf_counter() - began))
    return results


class Scorer:
    """Scores batches of rows, with one compiled step."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._step = jax.jit(score_chunk, donate_argnums=1)

    def score(self, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """For each row [T], the log-probability [T - 1] of all its tokens but the first."""
        engine = self._engine
        shifted = engine.chunks([np.append(row[1:], 0) for row in rows])
        kv, parts = engine.empty().cache, []
        for (tokens_BT, start, length_B), (targets_BT, _, _) in zip(
            engine.chunks(rows), shifted, strict=True
        ):
            kv, logprobs_BT = self._step(engine.model, kv, tokens_BT, targets_BT, start, length_B)
            parts.append(np.asarray(logprobs_BT))
        logprobs_BT = np.concatenate(parts, axis=1)
        return [logprobs_BT[b, : len(row) - 1] for b, row in enumerate(rows)]


def score_chunk(
    model: Transformer,
    kv: KVCache,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    start: jax.Array,
    length_B: jax.Array,
) -> tuple[KVCache, jax.Array]:
    """(cache, float32 [B, T]): the log-probability of each target after its token."""
    rules = model.rules
    hidden_BTD, _, kv = steps.run_chunk(model, kv, tokens_BT, start, length_B)
    targets_BT = cache.deal(targets_BT, start, rules)
    B, T, _ = hidden_BTD.shape
    P = rules.size("length")
    size = math.gcd(T // P, LOGITS)

    def split(x_BT):
        """[Z, B, C, ...]: Z parts, with C / P tokens of every shard in each."""
        rest = x_BT.shape[2:]
        place = rules("batch", "length", None, None, *[None] * len(rest))
        x_BPZ = jnp.reshape(x_BT, (B, P, -1, size, *rest), out_sharding=place)
        place = rules(None, "batch", "length", *[None] * len(rest))
        shape = (-1, B, P * size, *rest)
        return jnp.reshape(jnp.moveaxis(x_BPZ, 2, 0), shape, out_sharding=place)

    def some(args):
        hidden_BCD, targets_BC = args
        return steps.token_logprobs(model.logits(hidden_BCD), targets_BC)

    logprobs_ZBC = jax.lax.map(some, (split(hidden_BTD), split(targets_BT)))
    logprobs_BPZ = jnp.moveaxis(logprobs_ZBC.reshape(-1, B, P, size), 0, 2)
    return kv, cache.collect(logprobs_BPZ.reshape(B, T), start, rules)


def result(tokens: np.ndarray, logprobs: np.ndarray) -> dict:
    """The row of score.output; a single token has no mean and no perplexity."""
    mean = float(logprobs.mean(dtype=np.float64)) if logprobs.size else None
    return {
        "tokens": tokens.tolist(),
        "logprobs": [None, *logprobs.tolist()],
        "mean_logprob": mean,
        "perplexity": None if mean is None else math.exp(-mean),
    }


def summary(results: list[dict], seconds: float) -> str:
    """One line over all tokens that have a score."""
    scored = [x for row in results for x in row["logprobs"][1:]]
    if not scored:
        return f"{len(results)} texts, and none has a second token to score"
    mean = math.fsum(scored) / len(scored)
    return (
        f"{len(results)} texts, {len(scored)} tokens scored in {seconds:.1f} s: "
        f"mean log-probability {mean:.4f} nats, perplexity {math.exp(-mean):.2f}"
    )


if __name__ == "__main__":
    cli.run(main, __doc__, score=ScoreConfig, mesh=MeshConfig)
