"""The work of one tile, in Pallas: bodies of the two kernels of splash.py.

Scores stand keys x queries, [C, R], in base 2. What belongs to a query (maximum, sum, lse, delta)
is then a row of lanes, what comes in and goes out is never turned, and the maximum over keys runs
over sublanes, which needs no shuffling. Arrays that a product needs turned come turned: `v_HC`.

R queries and C keys of a tile; W tiles in a list.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from model.attention.kernels.tiles import (
    LOG2_E,
    ROWS_BY_COLUMNS,
    ROWS_BY_ROWS,
    KernelParams,
    dot,
    scores,
)
from model.attention.mask import Positions

# An entry of a list: the query block, the key block and what to do there, in 13, 14 and 4 bits.
FIRST, LAST, WHOLE, PARTIAL = 1, 2, 4, 8
Z_SHIFT, Y_SHIFT = 4, 18
MAX_Z, MAX_Y = 2**14, 2**13

PRODUCTS = {"forward": 2, "backward": 5}  # of a tile
SCRATCH = {"forward": 2, "backward": 0}  # rows of R numbers that stay in VMEM between tiles


def entry(y: jax.Array, z: jax.Array, flags: jax.Array) -> jax.Array:
    return y << Y_SHIFT | z << Z_SHIFT | flags


def query_block(entry: jax.Array) -> jax.Array:
    return entry >> Y_SHIFT


def key_block(entry: jax.Array) -> jax.Array:
    return (entry >> Z_SHIFT) & (MAX_Z - 1)


def forward(
    tiles_W,  # scalars: the list,
    slope_N,  # and slopes of the heads
    out_HR,  # results, float32
    lse_1R,
    high_1R,  # scratch: largest score so far, in base 2
    total_1R,  # and the sum of 2 ^ (score - high)
    *,
    q_RH,
    k_CH,
    v_HC,
    q_at_8R,  # position, segment, until, and rows of padding
    k_at_8C,
    how: KernelParams,
    num_tiles: int,
) -> None:
    """One step of the online softmax; `out_HR` stays in VMEM from its first tile to its last."""
    entry = tiles_W[pl.program_id(0) * num_tiles + pl.program_id(3)]
    slope = slope_N[pl.program_id(1) * pl.num_programs(2) + pl.program_id(2)]

    @pl.when(entry & FIRST != 0)
    def start():
        out_HR[...] = jnp.zeros_like(out_HR)
        high_1R[...] = jnp.full_like(high_1R, -jnp.inf)
        total_1R[...] = jnp.zeros_like(total_1R)

    def tile(masked: bool):
        s_CR, _ = _scores(how, k_CH[...], q_RH[...], slope, q_at_8R, k_at_8C, masked)
        before_1R = high_1R[...]
        now_1R = jnp.maximum(before_1R, s_CR.max(0, keepdims=True))
        # Queries that have seen nothing yet stay at -inf: keep -inf - -inf out.
        safe_1R = jnp.where(now_1R == -jnp.inf, 0.0, now_1R)
        p_CR = jnp.exp2(s_CR - safe_1R)
        fade_1R = jnp.exp2(before_1R - safe_1R)
        high_1R[...] = now_1R
        total_1R[...] = total_1R[...] * fade_1R + p_CR.sum(0, keepdims=True)
        more_HR = dot(v_HC[...], p_CR.astype(v_HC.dtype), ROWS_BY_COLUMNS)
        out_HR[...] = out_HR[...] * fade_1R + more_HR

    _run(entry, tile)

    @pl.when(entry & LAST != 0)
    def finish():
        total = total_1R[...]
        seen_1R = total > 0
        safe_1R = jnp.where(seen_1R, total, 1.0)
        out_HR[...] = out_HR[...] / safe_1R
        lse_1R[...] = jnp.where(seen_1R, high_1R[...] / LOG2_E + jnp.log(safe_1R), -jnp.inf)


def backward(
    tiles_W,
    slope_N,
    dq_HR,  # results, float32; dq and dk lack the factor `scale`
    dk_ZCH,  # of all key blocks: in VMEM for all tiles of all heads that share these keys
    dv_ZCH,
    *,
    q_RH,
    dout_RH,
    lse_1R,  # in base 2; +inf where a query saw nothing
    delta_1R,
    k_CH,
    k_HC,
    v_CH,
    q_at_8R,
    k_at_8C,
    how: KernelParams,
    num_tiles: int,
) -> None:
    """Five products a tile. dQ is complete with its query block, dK and dV with their head."""
    entry = tiles_W[pl.program_id(0) * num_tiles + pl.program_id(3)]
    slope = slope_N[pl.program_id(1) * pl.num_programs(2) + pl.program_id(2)]
    z = key_block(entry)

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def start_keys():
        dk_ZCH[...] = jnp.zeros_like(dk_ZCH)
        dv_ZCH[...] = jnp.zeros_like(dv_ZCH)

    @pl.when(entry & FIRST != 0)
    def start_queries():
        dq_HR[...] = jnp.zeros_like(dq_HR)

    def tile(masked: bool):
        q, dout = q_RH[...], dout_RH[...]
        s_CR, tanh_CR = _scores(how, k_CH[...], q, slope, q_at_8R, k_at_8C, masked)
        p_CR = jnp.exp2(s_CR - lse_1R[...])
        dv_ZCH[z] += dot(p_CR.astype(dout.dtype), dout, ROWS_BY_COLUMNS)
        ds_CR = p_CR * (dot(v_CH[...], dout, ROWS_BY_ROWS) - delta_1R[...])
        if how.softcap:
            ds_CR *= 1 - tanh_CR * tanh_CR
        ds_CR = ds_CR.astype(q.dtype)
        dk_ZCH[z] += dot(ds_CR, q, ROWS_BY_COLUMNS)
        dq_HR[...] += dot(k_HC[...], ds_CR, ROWS_BY_COLUMNS)

    _run(entry, tile)


def _run(entry: jax.Array, tile) -> None:
    """The tile that the entry asks for, if any; where all pairs count no mask is evaluated."""
    pl.when(entry & WHOLE != 0)(functools.partial(tile, masked=False))
    pl.when(entry & PARTIAL != 0)(functools.partial(tile, masked=True))


def _scores(how: KernelParams, k_CH, q_RH, slope, q_at_8R, k_at_8C, masked: bool):
    """Scores in base 2, [C, R], and the tanh in them, if any."""
    q_at = k_at = None
    if masked or how.alibi:
        k_at_C8 = k_at_8C[...].T
        q_at = Positions(*(q_at_8R[i : i + 1, :] for i in range(3)))
        k_at = Positions(k_at_C8[:, 0:1], k_at_C8[:, 1:2])
    return scores(how, dot(k_CH, q_RH, ROWS_BY_ROWS), slope, q_at, k_at, masked)
