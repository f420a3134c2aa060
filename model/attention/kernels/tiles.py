"""Shared by the Pallas kernels: the tiles that count, and the scores of one.

    seen_BYZ, whole_BYZ = met(mask, cut(q_at, R), cut(k_at, C))    # before the kernel, in XLA
    s_RC, tanh_RC = scores(how, s_RC, slope, q_at, k_at, masked)    # in the kernel

Beyond the letters of the repo: Y query blocks of R, Z key blocks of C.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention.mask import Bounds, Mask, Positions, bounds

LOG2_E = math.log2(math.e)

ROWS_BY_ROWS = ((1,), (1,)), ((), ())  # x_MK y_NK
ROWS_BY_COLUMNS = ((1,), (0,)), ((), ())  # x_MK y_KN


class KernelParams(NamedTuple):
    """The parameters that are fixed when the kernel is made."""

    mask: Mask
    scale: float
    softcap: float
    alibi: bool


def cut(at: Positions, block: int) -> Positions:
    """[B, T] -> [B, Y, R]."""
    return jax.tree.map(lambda x_BT: x_BT.reshape(x_BT.shape[0], -1, block), at)


def met(mask: Mask, q_at_BYR: Positions, k_at_BZC: Positions) -> tuple[jax.Array, jax.Array]:
    """Booleans [B, Y, Z]: tiles with pairs that may count, and those where all pairs do."""
    (q_bounds, q_whole_BY), (k_bounds, k_whole_BZ) = _bounds(q_at_BYR), _bounds(k_at_BZC)
    q_bounds = jax.tree.map(lambda x_BY: x_BY[:, :, None], q_bounds)
    k_bounds = jax.tree.map(lambda x_BZ: x_BZ[:, None, :], k_bounds)
    seen_BYZ = mask.may_see(q_bounds, k_bounds)
    whole_BYZ = mask.sees_all(q_bounds, k_bounds) & seen_BYZ
    return seen_BYZ, whole_BYZ & q_whole_BY[:, :, None] & k_whole_BZ[:, None, :]


def _bounds(at_BYR: Positions) -> tuple[Bounds, jax.Array]:
    """The bounds of each block, [B, Y], and whether it is of one document, without padding."""
    B, Y, R = at_BYR.segments_BT.shape
    of_blocks = bounds(jax.tree.map(lambda x: x.reshape(B * Y, 1, R), at_BYR))
    low_BY, high_BY = at_BYR.segments_BT.min(2), at_BYR.segments_BT.max(2)
    whole_BY = (low_BY == high_BY) & (low_BY > 0)
    return jax.tree.map(lambda x: x.reshape(B, Y), of_blocks), whole_BY


def scores(
    how: KernelParams,
    s: jax.Array,
    slope: jax.Array,
    q_at: Positions,
    k_at: Positions,
    masked: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Turns q k^T into scores in base 2, -inf where the mask rules; and the tanh of a soft-cap.

    Queries x keys or keys x queries, as `q_at` and `k_at` stand: [R, 1] and [1, C], or turned.
    They are not looked at where there is neither a mask to evaluate nor ALiBi.
    """
    tanh = None
    if how.softcap:
        tanh = jnp.tanh(s * (how.scale / how.softcap))
        s = tanh * (how.softcap * LOG2_E)
    else:
        s = s * (how.scale * LOG2_E)
    if how.alibi:
        ahead = k_at.positions_BT - q_at.positions_BT
        s += (slope * LOG2_E) * ahead.astype(jnp.float32)
    if masked:
        s = jnp.where(how.mask.pairs(q_at, k_at), s, -jnp.inf)
    return s, tanh


def dot(x: jax.Array, y: jax.Array, dims) -> jax.Array:
    """A product with float32 sums; of float32 inputs a chip would else take the first bits."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dims, exact, jnp.float32)


def slopes(slope_N: jax.Array | None, N: int) -> jax.Array:
    """Returns ALiBi's slopes, or zeros that no kernel reads."""
    return jnp.zeros(N, jnp.float32) if slope_N is None else slope_N


def base_2(lse_BTN: jax.Array) -> jax.Array:
    """Returns lse in base 2, inf for queries that saw nothing: 2 ** (score - inf) is 0."""
    return jnp.where(jnp.isneginf(lse_BTN), jnp.inf, lse_BTN * LOG2_E)
