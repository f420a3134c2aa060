"""Guesses of the tokens to come: what followed the same words before, or what a draft model says.

Where a row has no guess its tokens are -1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from core.sharding import Rules
from infer import steps
from infer.steps import State
from model.attention.mask import Positions
from model.cache.flash_decode import NewKV
from model.cache.kv_cache import KVCache
from model.transformer import Transformer


def by_ngram(
    tokens_BS: jax.Array, end_B: jax.Array, num: int, ngram: int, rules: Rules
) -> jax.Array:
    """int32 [B, num]: what came after the latest earlier place of a row's last tokens.

    Prompt lookup decoding (Saxena, 2023): the last `ngram` tokens, else fewer, down to one.
    `end_B` tokens are known. What would lie beyond the end repeats what is before it.
    """

    def local(tokens_BS, end_B):
        at_S = jnp.arange(tokens_BS.shape[1])[None]
        last_B1 = end_B[:, None] - 1
        match_BS, found_B1 = at_S < last_B1, jnp.full_like(last_B1, -1)
        for back in range(ngram):  # tokens at s - back are those at the end - back
            token_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(last_B1 - back, 0), axis=1)
            same_BS = jnp.roll(tokens_BS == token_B1, back, axis=1) & (at_S >= back)
            match_BS = match_BS & same_BS & (last_B1 >= back)
            latest_B1 = jnp.where(match_BS, at_S, -1).max(axis=1, keepdims=True)
            found_B1 = jnp.where(latest_B1 >= 0, latest_B1, found_B1)
        period_B1 = jnp.maximum(last_B1 - found_B1, 1)
        place_Bk = found_B1 + 1 + jnp.arange(num)[None] % period_B1
        guess_Bk = jnp.take_along_axis(tokens_BS, place_Bk, axis=1)
        return jnp.where(found_B1 >= 0, guess_Bk, -1)

    rows = rules("batch", None)
    return jax.shard_map(local, in_specs=(rows, rules("batch")), out_specs=rows)(tokens_BS, end_B)


def by_draft(
    draft: Transformer,
    cache: KVCache,
    state: State,
    token_B: jax.Array,
    total_B: jax.Array,
    num: int,
    *,
    vocab_size: int,
    width: int,
    eos: tuple[int, ...],
) -> tuple[jax.Array, list[NewKV], jax.Array]:
    """int32 [B, num]: what the draft draws after `token_B`, under each row's settings and noise.

    With it what its cache will lack of these tokens, and their hidden states [B, num + 1, D]. The
    cache is only read, as no one knows yet which of them will stay: each guess reads the ones
    before it again, which a small model does in the time that its weights take to be read.
    `width` is the vocabulary of the model that checks, padding included.
    """
    rules, each_1T = draft.rules, jnp.arange(num + 1)[None]
    at_BT = (state.length_B + state.made_B - 1)[:, None] + each_1T
    tokens_BT = jnp.where(each_1T == 0, token_B[:, None], 0)

    def read(tokens_BT, known):
        active_BT = ~state.done_B[:, None] & (each_1T < known)
        at = Positions(at_BT, active_BT.astype(jnp.int32))
        return draft.read(tokens_BT, at, cache, total_B)

    def guess(i, carry):
        tokens_BT, counts = carry
        hidden_BTD, _ = read(tokens_BT, i + 1)
        hidden_BTD = jnp.where(each_1T[..., None] == i, hidden_BTD, 0)
        logits_BV = draft.logits(hidden_BTD.sum(axis=1))
        logits_BV = jax.sharding.reshard(logits_BV, rules("batch", None))[:, :width]
        more = width - logits_BV.shape[1]
        logits_BV = jnp.pad(logits_BV, ((0, 0), (0, more)), constant_values=-jnp.inf)
        there = dataclasses.replace(state, made_B=state.made_B + i, counts=counts)
        token_B = steps.drawn_of(logits_BV, there, eos, vocab_size, 0, rules).tokens_BC
        tokens_BT = jnp.where(each_1T == i + 1, token_B[:, None], tokens_BT)
        return tokens_BT, steps.counted(counts, token_B, ~state.done_B)

    tokens_BT, _ = jax.lax.fori_loop(0, num, guess, (tokens_BT, state.counts))
    hidden_BTD, new = read(tokens_BT, num + 1)
    return tokens_BT[:, 1:], new, hidden_BTD
