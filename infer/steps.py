"""The two steps that are compiled: read a chunk of the prompts, make a few new tokens.

Rows are padded on the right: token t of a row has position t, and segment 0 marks padding.
"""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.sharding import Rules
from infer.sampling import draw, logprobs
from infer.sampling.draw import Counts
from infer.sampling.params import SamplingBatch
from model.cache import kv_cache as cache
from model.cache.kv_cache import KVCache
from model.transformer import Transformer

STEPS = 8  # tokens a call of the decode loop: text comes in pieces of so many tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """The cache after the tokens so far, and what the model says at each row's last one."""

    cache: KVCache
    last_BD: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Between two calls of the decode loop."""

    prefilled: Prefilled
    length_B: jax.Array  # int32, tokens of the prompt
    made_B: jax.Array  # int32, new tokens so far
    done_B: jax.Array  # bool
    keys_B: jax.Array  # one key a row: the result does not depend on the other rows
    packed: SamplingBatch  # max_tokens 0 in rows that only fill the batch
    counts: Counts | None  # only when penalties are on


class PromptChunk(NamedTuple):
    """The tokens that one prefill step reads: start .. start + T - 1 of each row."""

    tokens_BT: jax.Array
    start: jax.Array
    length_B: jax.Array  # tokens that each row has in all
    until_BT: jax.Array | None = None  # the last token that each of them sees
    end: jax.Array | None = None  # with until: the tokens from here on are left to the next step


class Made(NamedTuple):
    """Results of a call of the decode loop: tokens, -1 where a row had ended before, and the
    model's own log-probabilities of them and of the likeliest.
    """

    tokens_BC: jax.Array
    logprobs_BC: jax.Array
    top_tokens_BCJ: jax.Array | None
    top_logprobs_BCJ: jax.Array | None


def extend(
    model: Transformer,
    now: Prefilled,
    chunk: PromptChunk,
    new_B: jax.Array,
    targets_BT: jax.Array | None = None,
) -> tuple[Prefilled, jax.Array | None]:
    """One prefill step; up to `new_B` tokens will follow those of the rows.

    Returns the state after the chunk and, if `targets_BT` is given, the log-probability [B, T] of
    each target after its token. A sharded length deals the chunk to its shards; `cache.collect`
    puts these log-probabilities in order.
    """
    tokens_BT, start, length_B, until_BT, end = chunk
    at_BT = tokens_BT * 0 + (start + jnp.arange(tokens_BT.shape[1]))[None, :]
    tokens_BT, at_BT, until_BT = jax.tree.map(
        lambda x_BT: cache.deal(x_BT, start, model.rules), (tokens_BT, at_BT, until_BT)
    )
    is_read_BT = at_BT < length_B[:, None]
    if end is not None:
        is_read_BT &= at_BT < end
    hidden_BTD, kv = model(
        tokens_BT,
        at_BT,
        is_read_BT.astype(jnp.int32),
        now.cache,
        length_B + new_B,
        until_BT=until_BT,
    )
    is_last_BT = at_BT == length_B[:, None] - 1
    last_BD = jnp.einsum(
        "BTD,BT->BD", hidden_BTD, is_last_BT.astype(hidden_BTD.dtype),
        out_sharding=model.rules("batch", None),
    )  # fmt: skip
    here_B1 = is_last_BT.any(axis=1)[:, None]
    after = Prefilled(kv, jnp.where(here_B1, last_BD, now.last_BD))
    if targets_BT is None:
        return after, None
    return after, logprobs.of_chunk(model, hidden_BTD, targets_BT, start)


def feed(
    model: Transformer,
    now: Prefilled,
    token_B: jax.Array,
    position_B: jax.Array,
    active_B: jax.Array,
    length_B: jax.Array,
) -> Prefilled:
    """One token more in each active row, whose text comes to `length_B` tokens at most."""
    at_B1, active_B1 = position_B[:, None], active_B[:, None].astype(jnp.int32)
    last_B1D, kv = model(token_B[:, None], at_B1, active_B1, now.cache, length_B)
    return Prefilled(kv, last_B1D[:, 0])


def advance(
    model: Transformer,
    state: State,
    stopped_B: jax.Array,
    *,
    eos: tuple[int, ...],
    vocab_size: int,
    top_logprobs: int = 0,
    steps: int = STEPS,
) -> tuple[State, Made, jax.Array]:
    """(state, `steps` tokens a row with `top_logprobs` of the likeliest, whether all have ended).

    `stopped_B` ends rows from outside. A row ends with a token of `eos`, which it keeps, or at
    its limit.
    """
    rules = model.rules
    rows, rows_of = rules("batch", None), rules("batch", None, None)
    tokens_BC = jnp.full((state.made_B.size, steps), -1, jnp.int32, out_sharding=rows)
    made = Made(tokens_BC, tokens_BC * 0.0, None, None)
    if top_logprobs:
        shape = (*tokens_BC.shape, top_logprobs)
        tokens_BCJ = jnp.zeros(shape, jnp.int32, out_sharding=rows_of)
        made = made._replace(top_tokens_BCJ=tokens_BCJ, top_logprobs_BCJ=tokens_BCJ * 0.0)

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~state.done_B.all()

    def step(carry):
        i, state, made = carry
        logits_BV = model.logits(state.prefilled.last_BD)
        logits_BV = jax.sharding.reshard(logits_BV, rows)
        drawn = drawn_of(logits_BV, state, eos, vocab_size, top_logprobs, rules)
        token_B, active_B = drawn.tokens_BC, ~state.done_B
        drawn = drawn._replace(
            tokens_BC=jnp.where(active_B, token_B, -1),
            logprobs_BC=jnp.where(active_B, drawn.logprobs_BC, 0.0),
        )
        made = jax.tree.map(lambda all_BC, new_B: all_BC.at[:, i].set(new_B), made, drawn)
        return i + 1, _add(model, state, token_B, active_B, eos), made

    state = dataclasses.replace(state, done_B=state.done_B | stopped_B)
    _, state, made = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, made))
    return state, made, state.done_B.all()


def drawn_of(
    logits_BV: jax.Array,
    state: State,
    eos: tuple[int, ...],
    vocab_size: int,
    top_logprobs: int,
    rules: Rules,
) -> Made:
    """One token a row, without the dim C: every device draws for its own rows."""

    def local(logits_BV, keys_B, made_B, counts, packed):
        real_BV = jnp.arange(logits_BV.shape[1])[None, :] < vocab_size  # the rest is padding
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, made_B)
        real_logits_BV = jnp.where(real_BV, logits_BV, -jnp.inf)
        token_B = draw.sample(real_logits_BV, keys_B, made_B, counts, packed, eos)
        top = (None, None)
        if top_logprobs:
            top = logprobs.likeliest(logits_BV, vocab_size, top_logprobs)
        return Made(token_B, logprobs.of_tokens(logits_BV, token_B), *top)

    row = rules("batch")
    return jax.shard_map(local, in_specs=row, out_specs=row)(
        logits_BV, state.keys_B, state.made_B, state.counts, state.packed
    )


def _add(
    model: Transformer, state: State, token_B: jax.Array, active_B: jax.Array, eos: tuple[int, ...]
) -> State:
    """The state with one more token in each active row."""
    position_B = state.length_B + state.made_B
    limit_B = state.packed.max_tokens_B
    length_B = state.length_B + limit_B
    prefilled = feed(model, state.prefilled, token_B, position_B, active_B, length_B)
    made_B = state.made_B + active_B
    ended_B = is_end(token_B, eos) | (made_B >= limit_B)
    return dataclasses.replace(
        state,
        prefilled=prefilled,
        made_B=made_B,
        done_B=state.done_B | ended_B,
        counts=counted(state.counts, token_B, active_B),
    )


def is_end(token: jax.Array, eos: tuple[int, ...]) -> jax.Array:
    """Whether each is a token of `eos`."""
    return functools.reduce(operator.or_, (token == mark for mark in eos), token < 0)


def counted(counts: Counts | None, token_B: jax.Array, active_B: jax.Array) -> Counts | None:
    """Returns the counts with one token more in the output of each active row."""
    if counts is None:
        return None
    hit_BV = jnp.arange(counts.output_BV.shape[1])[None, :] == token_B[:, None]
    return counts._replace(output_BV=counts.output_BV + (hit_BV & active_B[:, None]))
