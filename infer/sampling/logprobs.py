"""Log-probabilities as the model gives them: before penalties, temperature and all that.

logprob_B = of_tokens(logits_BV, token_B)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from model.cache import kv_cache
from model.transformer import Transformer

LOGITS = 64  # tokens of a row whose logits exist at the same time


def of_tokens(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of each token [...] under its logits [..., V], float32."""
    hit = jnp.arange(logits.shape[-1]).reshape((1,) * tokens.ndim + (-1,)) == tokens[..., None]
    return jnp.where(hit, logits, 0.0).sum(axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def likeliest(logits_BV: jax.Array, vocab_size: int, num: int) -> tuple[jax.Array, jax.Array]:
    """(tokens [B, J], their log-probabilities [B, J]) of the `num` likeliest, best first."""
    real_1V = jnp.arange(logits_BV.shape[1])[None, :] < vocab_size  # the rest is padding
    best_BJ, token_BJ = jax.lax.top_k(jnp.where(real_1V, logits_BV, -jnp.inf), num)
    return token_BJ, best_BJ - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)


def following(model: Transformer, now: Any, token_B: jax.Array) -> jax.Array:
    """float32 [B]: the log-probability of each token right after the state `now`."""
    return of_tokens(model.logits(now.last_BD), token_B)


def of_chunk(
    model: Transformer, hidden_BTD: jax.Array, targets_BT: jax.Array, start: jax.Array
) -> jax.Array:
    """float32 [B, T]: the log-probability of each target after its token.

    Where the length is sharded the hidden states are dealt to the shards; targets are in order.
    """
    rules = model.rules
    targets_BT = kv_cache.deal(targets_BT, start, rules)
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
        return of_tokens(model.logits(hidden_BCD), targets_BC)

    logprobs_ZBC = jax.lax.map(some, (split(hidden_BTD), split(targets_BT)))
    of_shard = rules(None, "batch", "length", None)
    logprobs_ZBPC = jnp.reshape(logprobs_ZBC, (-1, B, P, size), out_sharding=of_shard)
    logprobs_BPZ = jnp.moveaxis(logprobs_ZBPC, 0, 2)
    logprobs_BT = jnp.reshape(logprobs_BPZ, (B, T), out_sharding=rules("batch", "length"))
    return kv_cache.collect(logprobs_BT, start, rules)
