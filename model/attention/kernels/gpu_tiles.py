"""The work of one block on a GPU, in Pallas for Triton: bodies of the three kernels of gpu.py.

A block of queries (or of keys) stays in registers while the tiles of its list pass: first those
where all pairs count, then those where the mask has to be evaluated. Two loops and not a branch,
which would keep Triton from fetching the next tile during this one.

R queries and C keys of a tile; Y query blocks, Z key blocks. `at` is positions, segments and until.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from model.attention.kernels.tiles import LOG2_E, ROWS_BY_COLUMNS, ROWS_BY_ROWS, dot, scores
from model.attention.mask import Positions


def forward(
    q_RH, k_SH, v_SH, q_at_3R, k_at_3S, slope_1, tiles_Z, counts_2, out_RH, lse_R, *, how, R, C
) -> None:
    """Online softmax of a query block; `out` and `lse` are float32."""
    q, q_at = q_RH[...], _columns(_at(q_at_3R, pl.ds(0, R)))

    def tile(z, carry, masked):
        out_RH, high_R, total_R = carry
        here = pl.ds(z * C, C)
        k_at = _rows(_at(k_at_3S, here)) if masked or how.alibi else None
        s_RC = dot(q, k_SH[here, :], ROWS_BY_ROWS)
        s_RC, _ = scores(how, s_RC, slope_1[0], q_at, k_at, masked)
        now_R = jnp.maximum(high_R, s_RC.max(1))
        # Queries that have seen nothing yet stay at -inf: keep -inf - -inf out.
        safe_R = jnp.where(now_R == -jnp.inf, 0.0, now_R)
        p_RC = jnp.exp2(s_RC - safe_R[:, None])
        fade_R = jnp.exp2(high_R - safe_R)
        v_CH = v_SH[here, :]
        out_RH = out_RH * fade_R[:, None] + dot(p_RC.astype(v_CH.dtype), v_CH, ROWS_BY_COLUMNS)
        return out_RH, now_R, total_R * fade_R + p_RC.sum(1)

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(R, -jnp.inf), jnp.zeros(R)
    out, high_R, total_R = _visit(tiles_Z, counts_2, tile, start)
    seen_R = total_R > 0
    safe_R = jnp.where(seen_R, total_R, 1.0)
    out_RH[...] = out / safe_R[:, None]
    lse_R[...] = jnp.where(seen_R, high_R / LOG2_E + jnp.log(safe_R), -jnp.inf)


def backward_queries(
    q_RH, k_SH, v_SH, q_at_3R, k_at_3S, slope_1, tiles_Z, counts_2,
    dout_RH, lse_R, delta_R, dq_RH, *, how, R, C
) -> None:  # fmt: skip
    """dq of a query block, float32; `lse` in base 2."""
    q, dout, lse_R1, delta_R1 = q_RH[...], dout_RH[...], lse_R[...][:, None], delta_R[...][:, None]
    q_at = _columns(_at(q_at_3R, pl.ds(0, R)))

    def tile(z, dq_RH, masked):
        here = pl.ds(z * C, C)
        k_at = _rows(_at(k_at_3S, here)) if masked or how.alibi else None
        k_CH = k_SH[here, :]
        s_RC = dot(q, k_CH, ROWS_BY_ROWS)
        dp_RC = dot(dout, v_SH[here, :], ROWS_BY_ROWS)
        s_RC, tanh_RC = scores(how, s_RC, slope_1[0], q_at, k_at, masked)
        _, ds_RC = _softmax_backward(s_RC, tanh_RC, lse_R1, dp_RC, delta_R1)
        return dq_RH + dot(ds_RC.astype(k_CH.dtype), k_CH, ROWS_BY_COLUMNS)

    dq = _visit(tiles_Z, counts_2, tile, jnp.zeros(q.shape, jnp.float32))
    dq_RH[...] = dq * how.scale


def backward_keys(
    q_TGH, k_CH, v_CH, q_at_3T, k_at_3C, slope_G, tiles_Y, counts_2,
    dout_TGH, lse_TG, delta_TG, dk_CH, dv_CH, *, how, R, C
) -> None:  # fmt: skip
    """dk and dv of a key block, float32, of all query heads that share it. Scores are [C, R]."""
    k, v, k_at = k_CH[...], v_CH[...], _columns(_at(k_at_3C, pl.ds(0, C)))

    def head(g, carry):
        def tile(y, carry, masked):
            dk_CH, dv_CH = carry
            here = pl.ds(y * R, R)
            q_at = _rows(_at(q_at_3T, here)) if masked or how.alibi else None
            q_RH, dout_RH = q_TGH[here, g, :], dout_TGH[here, g, :]
            s_CR = dot(k, q_RH, ROWS_BY_ROWS)
            s_CR, tanh_CR = scores(how, s_CR, slope_G[g], q_at, k_at, masked)
            lse_1R, delta_1R = lse_TG[here, g][None], delta_TG[here, g][None]
            dp_CR = dot(v, dout_RH, ROWS_BY_ROWS)
            p_CR, ds_CR = _softmax_backward(s_CR, tanh_CR, lse_1R, dp_CR, delta_1R)
            dv_CH += dot(p_CR.astype(dout_RH.dtype), dout_RH, ROWS_BY_COLUMNS)
            dk_CH += dot(ds_CR.astype(q_RH.dtype), q_RH, ROWS_BY_COLUMNS)
            return dk_CH, dv_CH

        return _visit(tiles_Y, counts_2, tile, carry)

    start = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dk, dv_CH[...] = jax.lax.fori_loop(0, slope_G.shape[0], head, start)
    dk_CH[...] = dk * how.scale


def _visit(tiles_Z, counts_2, tile, carry):
    """The tiles of a list, one after the other.

    Which comes next is known a tile ahead: else Triton has to wait for it before it can fetch.
    """
    whole, every = counts_2[0], counts_2[1]
    last = tiles_Z.shape[0] - 1
    for start, end, masked in ((0, whole, False), (whole, every, True)):

        def step(i, carry, masked=masked):
            z, carry = carry
            return tiles_Z[jnp.minimum(i + 1, last)], tile(z, carry, masked)

        first = tiles_Z[jnp.minimum(start, last)]
        _, carry = jax.lax.fori_loop(start, end, step, (first, carry))
    return carry


def _softmax_backward(s, tanh, lse, dp, delta):
    """(p, ds) of a tile; a soft-cap passes less back the nearer a score is to it."""
    p = jnp.exp2(s - lse)
    ds = p * (dp - delta)
    return p, ds if tanh is None else ds * (1 - tanh * tanh)


def _at(at_3T, here) -> Positions:
    return Positions(*(at_3T[i, here] for i in range(3)))


def _columns(at_R: Positions) -> Positions:
    return jax.tree.map(lambda x_R: x_R[:, None], at_R)


def _rows(at_C: Positions) -> Positions:
    return jax.tree.map(lambda x_C: x_C[None], at_C)
