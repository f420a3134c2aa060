"""The two steps that are compiled: read a chunk of the prompts, make a few new tokens.

Rows are padded on the right: token t of a row has position t, and segment 0 marks padding.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp

from core.sharding import Rules
from infer import sampling
from infer.sampling import Counts, Sampling
from model import cache
from model.cache import KVCache
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
    limit_B: jax.Array  # int32, new tokens at most; 0 for rows that only fill the batch
    done_B: jax.Array  # bool
    keys_B: jax.Array  # one key a row: the result does not depend on the other rows
    counts: Counts | None  # only when penalties are on


def extend(
    model: Transformer,
    now: Prefilled,
    tokens_BT: jax.Array,
    start: jax.Array,
    length_B: jax.Array,
    new: jax.Array,
) -> Prefilled:
    """One prefill step: tokens start..start+T-1 of each row, of which `length_B` are real.

    Up to `new` tokens will follow these.
    """
    hidden_BTD, at_BT, kv = run_chunk(model, now.cache, tokens_BT, start, length_B, new)
    is_last_BT = at_BT == length_B[:, None] - 1
    last_BD = jnp.einsum(
        "BTD,BT->BD", hidden_BTD, is_last_BT.astype(hidden_BTD.dtype),
        out_sharding=model.rules("batch", None),
    )  # fmt: skip
    here_B1 = is_last_BT.any(axis=1)[:, None]
    return Prefilled(kv, jnp.where(here_B1, last_BD, now.last_BD))


def run_chunk(
    model: Transformer,
    kv: KVCache,
    tokens_BT: jax.Array,
    start: jax.Array,
    length_B: jax.Array,
    new: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """(hidden [B, T, D], positions [B, T], cache) of one chunk of every row.

    Where the length is sharded the chunk is dealt to the shards: `cache.collect` puts in order
    what comes of it.
    """
    at_BT = tokens_BT * 0 + (start + jnp.arange(tokens_BT.shape[1]))[None, :]
    tokens_BT, at_BT = (cache.deal(x_BT, start, model.rules) for x_BT in (tokens_BT, at_BT))
    segments_BT = (at_BT < length_B[:, None]).astype(jnp.int32)
    hidden_BTD, kv = model(tokens_BT, at_BT, segments_BT, kv, length_B + new)
    return hidden_BTD, at_BT, kv


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
    how: Sampling,
    eos: tuple[int, ...],
    vocab_size: int,
    steps: int = STEPS,
) -> tuple[State, jax.Array, jax.Array, jax.Array]:
    """(state, tokens [B, steps], log-probabilities [B, steps], whether all rows have ended).

    Tokens are -1 where a row had ended before.

    `stopped_B` ends rows from outside. A row ends with a token of `eos`, which it keeps, or at
    its limit. Log-probabilities are the model's own: before penalties and temperature.
    """
    rules = model.rules
    tokens_BC = jnp.full(
        (state.made_B.size, steps), -1, jnp.int32, out_sharding=rules("batch", None)
    )

    def unfinished(carry):
        i, state, _, _ = carry
        return (i < steps) & ~state.done_B.all()

    def step(carry):
        i, state, tokens_BC, logprobs_BC = carry
        logits_BV = model.logits(state.prefilled.last_BD[:, None])[:, 0]
        logits_BV = jax.sharding.reshard(logits_BV, rules("batch", None))
        token_B, logprob_B = _draw(logits_BV, state, how, vocab_size, rules)
        active_B = ~state.done_B
        tokens_BC = tokens_BC.at[:, i].set(jnp.where(active_B, token_B, -1))
        logprobs_BC = logprobs_BC.at[:, i].set(jnp.where(active_B, logprob_B, 0.0))
        return i + 1, _add(model, state, token_B, active_B, eos), tokens_BC, logprobs_BC

    state = dataclasses.replace(state, done_B=state.done_B | stopped_B)
    carry = jnp.int32(0), state, tokens_BC, tokens_BC * 0.0
    _, state, tokens_BC, logprobs_BC = jax.lax.while_loop(unfinished, step, carry)
    return state, tokens_BC, logprobs_BC, state.done_B.all()


def _draw(
    logits_BV: jax.Array, state: State, how: Sampling, vocab_size: int, rules: Rules
) -> tuple[jax.Array, jax.Array]:
    """(tokens [B], their log-probabilities [B]): every device draws for its own rows."""

    def local(logits_BV, keys_B, made_B, counts):
        real_BV = jnp.arange(logits_BV.shape[1])[None, :] < vocab_size  # the rest is padding
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, made_B)
        token_B = sampling.sample(jnp.where(real_BV, logits_BV, -jnp.inf), keys_B, counts, how)
        return token_B, token_logprobs(logits_BV, token_B)

    row, rows = rules("batch"), rules("batch", None)
    counts = None if state.counts is None else Counts(rows, rows)
    return jax.shard_map(local, in_specs=(rows, row, row, counts), out_specs=(row, row))(
        logits_BV, state.keys_B, state.made_B, state.counts
    )


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of each token [...] under its logits [..., V], float32."""
    hit = jnp.arange(logits.shape[-1]).reshape((1,) * tokens.ndim + (-1,)) == tokens[..., None]
    return jnp.where(hit, logits, 0.0).sum(axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def _add(
    model: Transformer, state: State, token_B: jax.Array, active_B: jax.Array, eos: tuple[int, ...]
) -> State:
    """The state with one more token in each active row."""
    position_B = state.length_B + state.made_B
    length_B = state.length_B + state.limit_B
    prefilled = feed(model, state.prefilled, token_B, position_B, active_B, length_B)
    made_B = state.made_B + active_B
    counts = state.counts
    if counts is not None:
        hit_BV = jnp.arange(counts.output_BV.shape[1])[None, :] == token_B[:, None]
        counts = counts._replace(output_BV=counts.output_BV + (hit_BV & active_B[:, None]))
    limited_B = made_B >= state.limit_B
    ended_B = functools.reduce(operator.or_, (token_B == mark for mark in eos), limited_B)
    return dataclasses.replace(
        state,
        prefilled=prefilled,
        made_B=made_B,
        done_B=state.done_B | ended_B,
        counts=counts,
    )
