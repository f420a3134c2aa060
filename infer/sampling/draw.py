"""Draws a token from logits, row by row in float32. The order is that of vLLM V1:

    allowed_tokens     the logits of all others become -inf
    banned_tokens      these become -inf
    min_tokens         so do end tokens, until a row has so many new tokens
    logit_bias         is added
    repetition_penalty over prompt and output
    frequency_penalty  over the output
    presence_penalty   over the output; argmax of this where the temperature is 0
    temperature        divides
    min_p, top_k, top_p, typical_p    make more of them -inf; each sees what the former left
    draw               by softmax, with the key of the row

typical_p (arXiv 2202.00666), which vLLM lacks, is where Hugging Face has it: the last of those
that rule out. `SamplingBatch` of params.py holds a row's settings. A stage that a row leaves out
gives it its logits back bit for bit, so the others in its batch never matter to it.

No stage sorts: top_k, top_p and typical_p bisect over a threshold, so tokens that tie with the
last one kept are all kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from infer.sampling.params import NO_ID, Penalties, SamplingBatch

LOWEST, HIGHEST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


class Counts(NamedTuple):
    """The counts that penalties read; 5 bytes a row and token of the vocabulary."""

    prompt_BV: jax.Array  # bool, the prompt holds the token
    output_BV: jax.Array  # int32, times that the output holds it


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    made_B: jax.Array,
    counts: Counts | None,
    packed: SamplingBatch,
    eos: tuple[int, ...] = (),
) -> jax.Array:
    """int32 [B], one token a row, drawn by the row's own key; -inf logits are never drawn.

    `made_B` counts the new tokens so far; `counts` is there if `packed.penalties` is.
    """
    logits_BV = restrict(logits_BV.astype(jnp.float32), made_B, packed, eos)
    if packed.penalties is not None:
        logits_BV = penalise(logits_BV, counts, packed.penalties)
    if packed.temperature_B is not None:
        V = logits_BV.shape[1]
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, (V,), jnp.float32))(keys_B)
        greedy_B1 = packed.temperature_B[:, None] == 0
        # The highest of logit + Gumbel noise is a draw by softmax.
        logits_BV = jnp.where(greedy_B1, logits_BV, keep(logits_BV, packed) + noise_BV)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def restrict(
    logits_BV: jax.Array, made_B: jax.Array, packed: SamplingBatch, eos: tuple[int, ...]
) -> jax.Array:
    """allowed_tokens, then banned_tokens and logit_bias at once, and end tokens by min_tokens.

    Any order of these gives the same: three of them only make logits -inf, which stays.
    """
    row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    if packed.allowed_BJ is not None:
        none_BV = jnp.zeros_like(logits_BV, bool)
        allowed_BV = none_BV.at[row_B1, packed.allowed_BJ].set(True, mode="drop")
        all_B1 = packed.allowed_BJ[:, :1] == NO_ID
        logits_BV = jnp.where(allowed_BV | all_B1, logits_BV, -jnp.inf)
    if packed.bias is not None:
        tokens_BJ, values_BJ = packed.bias
        logits_BV = logits_BV.at[row_B1, tokens_BJ].add(values_BJ, mode="drop")
    if packed.min_tokens_B is not None and eos:
        early_B1 = (made_B < packed.min_tokens_B)[:, None]
        is_end_1V = jnp.isin(jnp.arange(logits_BV.shape[1]), jnp.array(eos))[None, :]
        logits_BV = jnp.where(early_B1 & is_end_1V, -jnp.inf, logits_BV)
    return logits_BV


def penalise(logits_BV: jax.Array, counts: Counts, penalties: Penalties) -> jax.Array:
    """Repetition over prompt and output, then frequency and presence over the output."""
    repetition_B1, frequency_B1, presence_B1 = (x_B[:, None] for x_B in penalties)
    seen_BV = counts.prompt_BV | (counts.output_BV > 0)
    scaled_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(seen_BV, scaled_BV, logits_BV)
    logits_BV -= frequency_B1 * counts.output_BV
    return logits_BV - presence_B1 * (counts.output_BV > 0)


def keep(logits_BV: jax.Array, packed: SamplingBatch) -> jax.Array:
    """Logits over the temperature, their maximum 0, with -inf where a token is ruled out."""
    temperature_B1 = packed.temperature_B[:, None]
    temperature_B1 = jnp.where(temperature_B1 == 0, 1.0, temperature_B1)
    highest_B1 = logits_BV.max(axis=-1, keepdims=True)
    logits_BV = (logits_BV - highest_B1) / temperature_B1  # max off first: no overflow
    if packed.min_p_B is not None:
        least_B1 = jnp.log(packed.min_p_B)[:, None]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if packed.top_k_B is not None:
        k_B1, V = packed.top_k_B[:, None], logits_BV.shape[1]
        off_B1 = (k_B1 == 0) | (k_B1 >= V)
        kept_BV = _heaviest(logits_BV, jnp.ones_like(logits_BV), k_B1.astype(jnp.float32))
        logits_BV = jnp.where(off_B1 | kept_BV, logits_BV, -jnp.inf)
    if packed.top_p_B is not None:
        p_B1, p_BV = packed.top_p_B[:, None], jax.nn.softmax(logits_BV, axis=-1)
        kept_BV = (p_B1 == 1) | _heaviest(logits_BV, p_BV, p_B1)
        logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
    if packed.typical_p_B is not None:
        p_B1, p_BV = packed.typical_p_B[:, None], jax.nn.softmax(logits_BV, axis=-1)
        kept_BV = (p_B1 == 1) | _heaviest(_typicality(logits_BV), p_BV, p_B1)
        logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
    return logits_BV


def _typicality(logits_BV: jax.Array) -> jax.Array:
    """Minus the distance of a token's surprise from its mean, the entropy: arXiv 2202.00666."""
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    possible_BV = logprobs_BV > -jnp.inf
    share_BV = jnp.where(possible_BV, jnp.exp(logprobs_BV) * logprobs_BV, 0.0)
    minus_entropy_B1 = share_BV.sum(axis=-1, keepdims=True)
    return jnp.where(possible_BV, -jnp.abs(logprobs_BV - minus_entropy_B1), -jnp.inf)


def _heaviest(by_BV: jax.Array, weight_BV: jax.Array, target_B1: jax.Array) -> jax.Array:
    """bool [B, V]: the highest `by_BV` whose weights add up to the target; all of them if
    rounding forbids it.
    """
    bits_BV = jax.lax.bitcast_convert_type(by_BV, jnp.int32)
    # As integers, negative floats run backwards: turned round, the order is that of the floats.
    order_BV = bits_BV ^ ((bits_BV >> 31) & HIGHEST)

    def halve(_, bounds):
        low_B1, high_B1 = bounds
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)  # the mean, no overflow
        kept_BV = jnp.where(order_BV >= middle_B1, weight_BV, 0.0)
        enough_B1 = kept_BV.sum(axis=-1, keepdims=True) >= target_B1
        low_B1 = jnp.where(enough_B1, middle_B1, low_B1)
        return low_B1, jnp.where(enough_B1, high_B1, middle_B1)

    zero_B1 = order_BV[:, :1] * 0  # made from the logits: sharded as they are
    low_B1, _ = jax.lax.fori_loop(0, 32, halve, (zero_B1 + LOWEST, zero_B1 + HIGHEST))
    return order_BV >= low_B1
