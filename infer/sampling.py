"""From logits to a token, row by row in float32, in the order of vLLM V1:

    repetition -> frequency -> presence penalty -> argmax if greedy, else
    temperature -> min_p -> top_k -> top_p -> draw

    token_B = sample(logits_BV, keys_B, counts, Sampling(temperature=0.8, top_p=0.95))

No stage sorts: top_k and top_p bisect over a threshold, so tokens that tie with the last one
kept are all kept.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.config import Section, setting

LOWEST, HIGHEST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class Sampling(Section):
    """How a token is drawn; static under jit."""

    temperature: float = setting(1.0, "divides the logits; 0 is greedy", low=0, high=2)
    top_k: int = setting(0, "keep the k likeliest tokens; 0 is off", low=0)
    top_p: float = setting(1.0, "keep the likeliest that add up to p; 1 is off", above=0, high=1)
    min_p: float = setting(0.0, "keep those with p >= min_p * the highest p", low=0, high=1)
    frequency_penalty: float = setting(
        0.0, "off the logit for each time the output has the token", low=-2, high=2
    )
    presence_penalty: float = setting(
        0.0, "off the logit if the output has the token", low=-2, high=2
    )
    repetition_penalty: float = setting(
        1.0, "divides logits > 0 and multiplies others of tokens in prompt or output", above=0
    )

    @property
    def penalises(self) -> bool:
        """Whether the past matters, so that `Counts` are needed."""
        off = self.frequency_penalty == 0 and self.presence_penalty == 0
        return not off or self.repetition_penalty != 1


class Counts(NamedTuple):
    """What penalties look at; 5 bytes a row and token of the vocabulary."""

    prompt_BV: jax.Array  # bool, the prompt holds the token
    output_BV: jax.Array  # int32, times that the output holds it


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, counts: Counts | None, sampling: Sampling
) -> jax.Array:
    """int32 [B], one token a row, drawn by the row's own key; -inf logits are never drawn."""
    logits_BV = logits_BV.astype(jnp.float32)
    if counts is not None:
        logits_BV = penalise(logits_BV, counts, sampling)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = keep(logits_BV, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def penalise(logits_BV: jax.Array, counts: Counts, sampling: Sampling) -> jax.Array:
    """Repetition over prompt and output, then frequency and presence over the output."""
    r = sampling.repetition_penalty
    seen_BV = counts.prompt_BV | (counts.output_BV > 0)
    scale_BV = jnp.where(seen_BV, jnp.where(logits_BV > 0, 1 / r, r), 1.0)
    logits_BV = logits_BV * scale_BV
    logits_BV -= sampling.frequency_penalty * counts.output_BV
    return logits_BV - sampling.presence_penalty * (counts.output_BV > 0)


def keep(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits over the temperature, their maximum 0, with -inf where a token is ruled out."""
    highest_B1 = logits_BV.max(axis=-1, keepdims=True)
    logits_BV = (logits_BV - highest_B1) / sampling.temperature  # max off first: no overflow
    if sampling.min_p > 0:
        logits_BV = jnp.where(logits_BV >= jnp.log(sampling.min_p), logits_BV, -jnp.inf)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        ones_BV = jnp.ones_like(logits_BV)
        logits_BV = _keep_heaviest(logits_BV, ones_BV, float(sampling.top_k))
    if sampling.top_p < 1:
        logits_BV = _keep_heaviest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), sampling.top_p)
    return logits_BV


def _keep_heaviest(logits_BV: jax.Array, weight_BV: jax.Array, target: float) -> jax.Array:
    """The highest logits whose weights add up to `target`; all of them if rounding forbids it."""
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    # As integers, negative floats run backwards: turned round, the order is that of the floats.
    order_BV = bits_BV ^ ((bits_BV >> 31) & HIGHEST)

    def halve(_, bounds):
        low_B1, high_B1 = bounds
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)  # the mean, no overflow
        kept_BV = jnp.where(order_BV >= middle_B1, weight_BV, 0.0)
        enough_B1 = kept_BV.sum(axis=-1, keepdims=True) >= target
        low_B1 = jnp.where(enough_B1, middle_B1, low_B1)
        return low_B1, jnp.where(enough_B1, high_B1, middle_B1)

    zero_B1 = order_BV[:, :1] * 0  # made from the logits: sharded as they are
    low_B1, _ = jax.lax.fori_loop(0, 32, halve, (zero_B1 + LOWEST, zero_B1 + HIGHEST))
    return jnp.where(order_BV >= low_B1, logits_BV, -jnp.inf)
