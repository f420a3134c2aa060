"""Beam search: the likeliest texts that are found by keeping the `beams` best at every length.

    search = Search(engine, beams=4, penalty=1.0)
    tokens, logprobs, scores = search(engine.prefill(prompts), lengths_B, limits_B)

As `transformers` defines it: a text scores the sum of its log-probabilities over
(new tokens) ** penalty. A beam that ends with an end token is kept as finished if it is among the
`beams` best at that length, and those that reach their limit are finished too. The search goes on
while a beam could still beat the worst text that is finished (early_stopping="never" there).

The beams of a prompt are rows next to each other, on one shard of the batch: a step copies the
state of the rows that go on, and nothing of it crosses the mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import sharding
from core.config import UserError
from infer import steps
from infer.config import AT_ITS_END, DRAWN, DRAWS_NOTHING, DecodeConfig
from infer.engine import Engine
from infer.prefix import PrefixCache, batch_dims, take
from infer.programs import bucket
from infer.rows import Request, Timing
from infer.steps import Prefilled
from model.transformer import Transformer

STEPS = 16  # tokens a call of the loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """New tokens [B, T] of each row with their log-probabilities, -1 and 0 after the last."""

    tokens_BT: jax.Array
    logprobs_BT: jax.Array
    score_B: jax.Array  # a sum while it grows, then over length ** penalty; -inf is no text

    def pick(self, row_B: jax.Array, score_B: jax.Array) -> "Hypotheses":
        """These rows, with their new scores."""
        return Hypotheses(self.tokens_BT[row_B], self.logprobs_BT[row_B], score_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """Between two steps; every prompt has as many new tokens in each of its beams."""

    prefilled: Prefilled
    beams: Hypotheses
    finished: Hypotheses  # the best of each prompt so far, best first
    length_B: jax.Array  # int32, tokens of the prompt
    limit_B: jax.Array  # int32, new tokens at most
    done_B: jax.Array  # bool, equal in the rows of a prompt
    made: jax.Array  # int32


def advance(
    model: Transformer,
    state: BeamState,
    *,
    beams: int,
    penalty: float,
    eos: tuple[int, ...],
    vocab_size: int,
    dims: Any,
) -> tuple[BeamState, jax.Array]:
    """(state after up to STEPS tokens more, whether all is done)."""
    rules = model.rules
    row = rules("batch")

    def unfinished(carry):
        i, state = carry
        return (i < STEPS) & ~state.done_B.all()

    def step(carry):
        i, state = carry
        logits_BV = model.logits(state.prefilled.last_BD)
        logits_BV = jax.sharding.reshard(logits_BV, rules("batch", None))
        texts = state.beams, state.finished, state.limit_B, state.done_B
        one_shard = functools.partial(
            _choose, beams=beams, penalty=penalty, eos=eos, vocab_size=vocab_size
        )
        grown, finished, done_B, parent_B, token_B = jax.shard_map(
            one_shard,
            in_specs=(rules("batch", None), jax.tree.map(_spec, texts), rules()),
            out_specs=(*jax.tree.map(_spec, texts[:2]), row, row, row),
        )(logits_BV, texts, state.made)
        prefilled = take(state.prefilled, parent_B, dims)
        position_B = state.length_B + state.made
        total_B = state.length_B + state.limit_B
        prefilled = steps.feed(model, prefilled, token_B, position_B, ~done_B, total_B)
        return i + 1, dataclasses.replace(
            state,
            prefilled=prefilled,
            beams=grown,
            finished=finished,
            done_B=done_B,
            made=state.made + 1,
        )

    _, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))
    return state, state.done_B.all()


def _spec(x: jax.Array) -> Any:
    return jax.typeof(x).sharding.spec


def _choose(
    logits_BV: jax.Array,
    texts: tuple[Hypotheses, Hypotheses, jax.Array, jax.Array],
    made: jax.Array,
    *,
    beams: int,
    penalty: float,
    eos: tuple[int, ...],
    vocab_size: int,
) -> tuple[Hypotheses, Hypotheses, jax.Array, jax.Array, jax.Array]:
    """(beams, finished, done, row that each beam goes on from, its token), of one shard's rows.

    K beams of G prompts, with the X best ways to go on; rows count on this shard alone.
    """
    running, finished, limit_B, done_B = texts
    (B, V), K = logits_BV.shape, beams
    logprobs_BV = logits_BV - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    real_1V = jnp.arange(V)[None] < vocab_size  # the rest is padding
    total_BV = jnp.where(real_1V, running.score_B[:, None] + logprobs_BV, -jnp.inf)
    # So many that K of them go on, whatever ends.
    X = min(K * (1 + len(eos)), K * V)
    score_GX, way_GX = jax.lax.top_k(total_BV.reshape(-1, K * V), X)
    row_GX = jnp.arange(B // K)[:, None] * K + way_GX // V
    token_GX = way_GX % V
    last_GX = (made + 1 >= limit_B.reshape(-1, K)[:, :1]) | steps.is_end(token_GX, eos)

    def grow(row_B, token_B, score_B):
        logprob_B = jnp.take_along_axis(logprobs_BV[row_B], token_B[:, None], axis=1)[:, 0]
        texts = running.pick(row_B, score_B)
        return Hypotheses(
            texts.tokens_BT.at[:, made].set(token_B),
            texts.logprobs_BT.at[:, made].set(logprob_B),
            score_B,
        )

    ends_GX = last_GX & _counts(token_GX, eos, K)
    ended_GX = jnp.where(ends_GX, score_GX / (made + 1.0) ** penalty, -jnp.inf)
    ended = grow(row_GX.ravel(), token_GX.ravel(), ended_GX.ravel())
    better = _best(finished, ended, K)
    kept_GK, at_GK = jax.lax.top_k(jnp.where(last_GX, -jnp.inf, score_GX), K)
    row_B, token_B = (jnp.take_along_axis(x, at_GK, axis=1).ravel() for x in (row_GX, token_GX))
    grown = grow(row_B, token_B, kept_GK.ravel())

    longest_G1 = limit_B.reshape(-1, K)[:, :1] if penalty > 0 else made + 1
    attainable_G1 = kept_GK[:, :1] / longest_G1.astype(jnp.float32) ** penalty
    worst_G1 = better.score_B.reshape(-1, K)[:, -1:]
    now_done_B = jnp.broadcast_to(worst_G1 >= attainable_G1, (B // K, K)).ravel()

    def unless_done(new: Any, old: Any) -> Any:
        keep = [done_B.reshape(-1, *[1] * (x.ndim - 1)) for x in jax.tree.leaves(new)]
        keep = jax.tree.unflatten(jax.tree.structure(new), keep)
        return jax.tree.map(jnp.where, keep, old, new)

    better, grown = unless_done(better, finished), unless_done(grown, running)
    return grown, better, done_B | now_done_B, row_B, token_B


def _counts(token_GX: jax.Array, eos: tuple[int, ...], beams: int) -> jax.Array:
    """The continuations that may finish: an end among the `beams` best, and at the limit the
    `beams` best that are no end.
    """
    is_end_GX = steps.is_end(token_GX, eos)
    among_GX = jnp.arange(token_GX.shape[1])[None] < beams
    before_GX = jnp.cumsum(~is_end_GX, axis=1) <= beams
    return jnp.where(is_end_GX, among_GX, before_GX)


def _best(old: Hypotheses, new: Hypotheses, beams: int) -> Hypotheses:
    """The best `beams` texts of each prompt, best first; of equals the older ones."""
    G = old.score_B.size // beams

    def join(old_B: jax.Array, new_B: jax.Array) -> jax.Array:
        parts = (x.reshape(G, -1, *x.shape[1:]) for x in (old_B, new_B))
        return jnp.concatenate(list(parts), axis=1)

    both = jax.tree.map(join, old, new)
    score_GK, at_GK = jax.lax.top_k(both.score_B, beams)
    row_B = (jnp.arange(G)[:, None] * both.score_B.shape[1] + at_GK).ravel()
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), both)
    return flat.pick(row_B, score_GK.ravel())


class Search:
    """Beam search by one engine, whose rows are the beams of a prompt, then of the next."""

    def __init__(self, engine: Engine, beams: int, penalty: float):
        self.engine, self.beams = engine, beams
        static = dict(engine.static, beams=beams, penalty=penalty, dims=batch_dims(engine))
        del static["top_logprobs"]
        self._advance = jax.jit(functools.partial(advance, **static), donate_argnums=1)

    def __call__(
        self, now: Prefilled, length_B: np.ndarray, limit_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens [B, T], log-probabilities [B, T], scores [B]), best first for each prompt.

        `now` holds a prompt of `length_B` tokens in each row, `beams` rows of each; up to
        `limit_B` tokens are new, none where a row only fills the batch.
        """
        engine, K, B = self.engine, self.beams, len(limit_B)
        T = bucket(int(limit_B.max()))

        def texts(score_B: np.ndarray) -> Hypotheses:
            tokens_BT = np.full((B, T), -1, np.int32)
            return Hypotheses(tokens_BT, np.zeros((B, T), np.float32), score_B.astype(np.float32))

        first_B = np.where(np.arange(B) % K == 0, 0.0, -np.inf)  # of K equal rows one goes on
        beams, none = texts(first_B), texts(np.full(B, -np.inf))
        rest = beams, none, length_B.astype(np.int32), limit_B.astype(np.int32), limit_B == 0
        state = BeamState(now, *jax.tree.map(engine.place, rest), jnp.int32(0))
        finished = False
        while not finished:
            state, finished = engine.programs.run(("beam", T), self._advance, engine.decoder, state)
        best = jax.device_get(state.finished)
        return best.tokens_BT, best.logprobs_BT, best.score_B


def asked(rows: Sequence[Request], beams: int) -> list[Request]:
    """Returns the first row of each prompt, `beams` times."""
    return [row for row in rows if row.sample == 0 for _ in range(beams)]


def at_once(rows: int, prompts: int, beams: int) -> int:
    """Rows of a batch of up to `rows`: the beams of as many prompts, alike on every shard."""
    shards = sharding.prefilling().size("batch")
    return math.ceil(min(max(1, rows // beams), prompts) / shards) * shards * beams


def decode(
    search: Search, reader: PrefixCache, rows: Sequence[Request], part: slice, spent: Timing
) -> Iterator[None]:
    """Searches for the rows of one batch, `part` of what is `asked`; yields when they are found."""
    engine, K, B = search.engine, search.beams, reader.engine.plan.batch
    began = engine.clock()
    now, scores = reader.read(part.start, part.stop)
    now = jax.block_until_ready(now)
    prefilled = engine.clock()
    first = asked(rows, K)[part]
    length_B, limit_B = np.ones(B, np.int32), np.zeros(B, np.int32)
    length_B[: len(first)] = [len(row.prompt.tokens) for row in first]
    limit_B[: len(first)] = [row.how.max_tokens for row in first]
    tokens_BT, logprobs_BT, score_B = search(now, length_B, limit_B)
    seconds = engine.clock() - prefilled
    for b in range(0, len(first), K):
        for row in (row for row in rows if row.prompt is first[b].prompt):
            place = b + row.sample
            row.prefill_seconds, row.decode_seconds = prefilled - began, seconds
            row.score = float(score_B[place])
            row.prompt_logprobs = scores[b].tolist() if scores else []
            pairs = zip(tokens_BT[place].tolist(), logprobs_BT[place].tolist(), strict=True)
            for token, logprob in pairs:
                if token >= 0:
                    row.add(token, logprob, [], engine.static["eos"])
    spent.add(prefilled - began, seconds)
    yield


def check(config: DecodeConfig, rows: Sequence[Request], vocab_size: int) -> None:
    """UserError where beam search contradicts the `decode` section or the settings of a row."""
    if not config.beams:
        return
    beams = f"decode.beams={config.beams}"
    if config.stream:  # which it is unless a user says otherwise
        raise UserError(f"{beams} with stream=True: {AT_ITS_END}; set stream=False")
    if config.beams > vocab_size:
        raise UserError(f"{beams} is more than the vocabulary of {vocab_size}: lower it")
    for row in rows:
        for field in DRAWN:
            value = getattr(row.how, field.name)
            if value != field.default:
                raise UserError(
                    f"{row.prompt.where}: {beams} with {field.name}={value}: {DRAWS_NOTHING}; "
                    f"leave {field.name} at {field.default}"
                )
        if row.how.n > config.beams:
            raise UserError(
                f"{row.prompt.where}: n={row.how.n} with {beams}: a search finds as many texts as "
                "it has beams; raise beams or lower n"
            )
