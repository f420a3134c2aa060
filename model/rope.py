"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split as in LLaMA."""

import jax
import jax.numpy as jnp


def table(
    positions_BT: jax.Array, base: float, scale: float, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, 1, H / 2] float32: angles position / scale * base^(-2i / H)."""
    half = head_dim // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BTh = positions_BT[..., None].astype(jnp.float32) / scale * frequencies[None, None]
    return jnp.cos(angles_BTh)[:, :, None, :], jnp.sin(angles_BTh)[:, :, None, :]


def rotate(x_BTNH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + H / 2) of each head in float32; the dtype stays."""
    cos, sin = cos_sin
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
