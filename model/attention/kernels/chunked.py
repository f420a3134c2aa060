"""Attention in portable XLA, tile by tile: any backend, linear memory, and THE path on CPUs.

An online softmax (Milakov and Gimelshein, 2018; Rabe and Staats, 2021) over tiles of queries x
keys, and the backward of FlashAttention (Dao et al., 2022). Only the key tiles that the mask may
allow are visited:

    out_BTNH, lse_BTN = forward(q_BTNH, k_BSKH, v_BSKH, at, at, Full(), scale=0.125, softcap=0.0)

Beyond the letters of the repo: P lanes (kv heads, or rows x kv heads) worked on together, X groups
of lanes, Y query blocks, Z key blocks, R rows of a tile (G heads x queries), C keys of a tile.
"""

import functools
import math

import jax
import jax.numpy as jnp

from model.attention import blocks
from model.attention.mask import Mask, Positions, bounds

# Measured on 2 Zen 5 cores, float32, H=64. Forward, causal 4K, GFLOP/s: 512 x 512 in two lanes
# 201, in one 138; 1024 x 256 in two 173; 256 x 256 in eight 130. Forward and backward of 8 rows of
# 512, ms: full 163 by 512, 132 by 256; window 128: 120 by 512, 92 by 128. So: about half of what
# a query can see, within these bounds, and two lanes or more (one operation, two cores).
MIN_BLOCK, MAX_BLOCK = 128, 512
MIN_LANES, TILE_SCORES = 2, 2**17

LOG2_E = math.log2(math.e)


def forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_at: Positions,
    k_at: Positions,
    mask: Mask,
    *,
    scale: float,
    softcap: float,
    slope_N: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H], log-sum-exp [B, T, N]), both float32; no key seen: 0 and -inf."""
    tiling = _Tiling(q_BTNH.shape, k_BSKH.shape, mask)
    fresh = functools.partial(blocks.fresh, (q_BTNH, k_BSKH, v_BSKH, q_at, k_at))

    def group(args):
        q_YPRH, slope_YPR, k_ZPCH, v_ZPCH, q_at_YPR, k_at_ZPC = args
        q_bounds_Y, k_bounds_Z = bounds(q_at_YPR), bounds(k_at_ZPC)

        def query_block(args):
            q_PRH, slope_PR, q_at_PR, q_bounds = args

            def key_block(z, carry):
                out_PRH, high_PR, total_PR = carry
                k_PCH, v_PCH, k_at_PC = _pick((k_ZPCH, v_ZPCH, k_at_ZPC), z)
                bias_PRC = _bias(slope_PR, q_at_PR, k_at_PC)
                s_PRC, unit = _scores(q_PRH, k_PCH, scale, softcap, bias_PRC)
                s_PRC = jnp.where(_allowed(mask, q_at_PR, k_at_PC), s_PRC, -jnp.inf)
                new_PR = jnp.maximum(high_PR, s_PRC.max(-1))
                # Rows that have seen nothing yet stay at -inf: keep -inf - -inf out.
                safe_PR = jnp.where(jnp.isneginf(new_PR), 0.0, new_PR)
                p_PRC = jnp.exp2((s_PRC - safe_PR[..., None]) * unit)
                fade_PR = jnp.exp2((high_PR - safe_PR) * unit)
                total_PR = total_PR * fade_PR + p_PRC.sum(-1)
                out_PRH = out_PRH * fade_PR[..., None] + _dot(
                    "PRC,PCH->PRH", p_PRC.astype(v_PCH.dtype), v_PCH
                )
                return out_PRH, new_PR, total_PR

            rows = q_PRH.shape[:2]
            start = fresh(q_PRH.shape, 0.0), fresh(rows, -jnp.inf), fresh(rows, 0.0)
            seen_Z = mask.may_see(q_bounds, k_bounds_Z)
            out_PRH, high_PR, total_PR = _visit(seen_Z, key_block, start)
            seen_PR = total_PR > 0
            out_PRH /= jnp.where(seen_PR, total_PR, 1.0)[..., None]
            unit = 1.0 if softcap or slope_N is not None else scale
            lse_PR = jnp.where(seen_PR, high_PR * unit, -jnp.inf) + jnp.log(
                jnp.where(seen_PR, total_PR, 1.0)
            )
            return out_PRH, lse_PR

        return jax.lax.map(query_block, (q_YPRH, slope_YPR, q_at_YPR, q_bounds_Y))

    out_XYPRH, lse_XYPR = jax.lax.map(
        group,
        (
            tiling.split_queries(q_BTNH),
            tiling.split_slopes(slope_N),
            tiling.split_keys(k_BSKH),
            tiling.split_keys(v_BSKH),
            tiling.split_queries_at(q_at),
            tiling.split_keys_at(k_at),
        ),
    )
    return tiling.join_queries(out_XYPRH), tiling.join_queries(lse_XYPR)


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_at: Positions,
    k_at: Positions,
    mask: Mask,
    dout_BTNH: jax.Array,
    lse_BTN: jax.Array,
    delta_BTN: jax.Array,
    *,
    scale: float,
    softcap: float,
    slope_N: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dq, dk, dv), float32, of these keys' part in an attention with `lse` and `delta`.

    `lse` is over all keys that the queries see, here or elsewhere; `delta` is <out, dout>.
    """
    tiling = _Tiling(q_BTNH.shape, k_BSKH.shape, mask)
    fresh = functools.partial(blocks.fresh, (q_BTNH, k_BSKH, v_BSKH, q_at, k_at, dout_BTNH))
    # Rows that see nothing have lse -inf; any finite value will do, their p is masked to 0.
    lse_BTN = jnp.where(jnp.isneginf(lse_BTN), 0.0, lse_BTN)

    def group(args):
        queries_Y, k_ZPCH, v_ZPCH, k_at_ZPC = args
        q_bounds_Y, k_bounds_Z = bounds(queries_Y[-1]), bounds(k_at_ZPC)

        def key_block(dq_YPHR, args):
            k_PCH, v_PCH, k_at_PC, k_bounds = args
            k_PHC = k_PCH.swapaxes(1, 2)

            def query_block(y, carry):
                # Scores stand keys x queries here, so that no large tile is ever transposed.
                dq_YPHR, dk_PCH, dv_PCH = carry
                q_PRH, dout_PRH, lse_PR, delta_PR, slope_PR, q_at_PR = _pick(queries_Y, y)
                bias_PCR = _bias(slope_PR, q_at_PR, k_at_PC, keys_first=True)
                s_PCR, unit = _scores(k_PCH, q_PRH, scale, softcap, bias_PCR)
                p_PCR = jnp.exp2(s_PCR * unit - lse_PR[:, None] * LOG2_E)
                p_PCR = jnp.where(_allowed(mask, q_at_PR, k_at_PC, keys_first=True), p_PCR, 0.0)
                dv_PCH += _dot("PCR,PRH->PCH", p_PCR.astype(dout_PRH.dtype), dout_PRH)
                ds_PCR = p_PCR * (_dot("PCH,PRH->PCR", v_PCH, dout_PRH) - delta_PR[:, None])
                if softcap:
                    ds_PCR *= 1 - (s_PCR / softcap) ** 2
                ds_PCR = ds_PCR.astype(q_PRH.dtype)
                dk_PCH += _dot("PCR,PRH->PCH", ds_PCR, q_PRH)
                dq_PHR = _pick(dq_YPHR, y) + _dot("PHC,PCR->PHR", k_PHC, ds_PCR)
                dq_YPHR = jax.lax.dynamic_update_index_in_dim(dq_YPHR, dq_PHR, y, 0)
                return dq_YPHR, dk_PCH, dv_PCH

            start = dq_YPHR, fresh(k_PCH.shape, 0.0), fresh(v_PCH.shape, 0.0)
            seen_Y = mask.may_see(q_bounds_Y, k_bounds)
            dq_YPHR, dk_PCH, dv_PCH = _visit(seen_Y, query_block, start)
            return dq_YPHR, (dk_PCH * scale, dv_PCH)

        q_YPRH = queries_Y[0]
        dq_YPHR, (dk_ZPCH, dv_ZPCH) = jax.lax.scan(
            key_block,
            fresh(q_YPRH.swapaxes(2, 3).shape, 0.0),
            (k_ZPCH, v_ZPCH, k_at_ZPC, k_bounds_Z),
        )
        return dq_YPHR.swapaxes(2, 3) * scale, dk_ZPCH, dv_ZPCH

    queries_XY = (
        tiling.split_queries(q_BTNH),
        tiling.split_queries(dout_BTNH),
        tiling.split_queries(lse_BTN),
        tiling.split_queries(delta_BTN),
        tiling.split_slopes(slope_N),
        tiling.split_queries_at(q_at),
    )
    keys_XZ = tiling.split_keys(k_BSKH), tiling.split_keys(v_BSKH), tiling.split_keys_at(k_at)
    dq_XYPRH, dk_XZPCH, dv_XZPCH = jax.lax.map(group, (queries_XY, *keys_XZ))
    return tiling.join_queries(dq_XYPRH), tiling.join_keys(dk_XZPCH), tiling.join_keys(dv_XZPCH)


class _Tiling:
    """Cuts [B, length, heads, ...] into groups of lanes and blocks, and joins them again."""

    def __init__(self, q_shape: tuple[int, ...], k_shape: tuple[int, ...], mask: Mask):
        self.B, self.T, N, _ = q_shape
        _, self.S, self.K, _ = k_shape
        self.G = N // self.K
        extent = min(mask.extent or self.S, self.S)
        block = max(MIN_BLOCK, min(MAX_BLOCK, 2 ** (max(extent // 2, 1).bit_length() - 1)))
        self.queries, self.keys = min(block, self.T), min(block, self.S)
        lanes = max(MIN_LANES, TILE_SCORES // (self.G * self.queries * self.keys))
        self.heads = _divisor(self.K, lanes)
        self.rows = _divisor(self.B, lanes // self.heads) if self.heads == self.K else 1

    def split_queries(self, x_BTN: jax.Array) -> jax.Array:
        """[B, T, N, ...] -> [X, Y, P, R, ...]."""
        return self._split(x_BTN, self.queries, self.G)

    def split_keys(self, x_BSK: jax.Array) -> jax.Array:
        """[B, S, K, ...] -> [X, Z, P, C, ...]."""
        return self._split(x_BSK, self.keys, 1)

    def split_queries_at(self, at: Positions) -> Positions:
        N = self.K * self.G
        return jax.tree.map(lambda x_BT: self.split_queries(_repeat(x_BT, N)), at)

    def split_keys_at(self, at: Positions) -> Positions:
        return jax.tree.map(lambda x_BS: self.split_keys(_repeat(x_BS, self.K)), at)

    def split_slopes(self, slope_N: jax.Array | None) -> jax.Array | None:
        if slope_N is None:
            return None
        return self.split_queries(jnp.broadcast_to(slope_N, (self.B, self.T, slope_N.size)))

    def join_queries(self, x_XYPR: jax.Array) -> jax.Array:
        return self._join(x_XYPR, self.T, self.queries, self.G)

    def join_keys(self, x_XZPC: jax.Array) -> jax.Array:
        return self._join(x_XZPC, self.S, self.keys, 1)

    def _split(self, x, block, G):
        """Padding is all zeros, hence of segment 0: seen by nobody."""
        if short := -x.shape[1] % block:
            x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
        rest = x.shape[3:]
        x = x.reshape(
            -1, self.rows, x.shape[1] // block, block, self.K // self.heads, self.heads, G, *rest
        )
        x = jnp.moveaxis(x, (0, 4, 2, 1, 5, 6, 3), range(7))
        return x.reshape(
            x.shape[0] * x.shape[1], x.shape[2], self.rows * self.heads, G * block, *rest
        )

    def _join(self, x, length, block, G):
        rest = x.shape[4:]
        x = x.reshape(-1, self.K // self.heads, x.shape[1], self.rows, self.heads, G, block, *rest)
        x = jnp.moveaxis(x, range(7), (0, 4, 2, 1, 5, 6, 3))
        return x.reshape(self.B, -1, self.K * G, *rest)[:, :length]


def _scores(
    x_PRH: jax.Array,
    y_PCH: jax.Array,
    scale: float,
    softcap: float,
    bias_PRC: jax.Array | None,
) -> tuple[jax.Array, float]:
    """Scores up to a factor, and that factor (in base 2): exp2 can then scale for free."""
    s_PRC = _dot("PRH,PCH->PRC", x_PRH, y_PCH)
    if softcap:
        return softcap * jnp.tanh(s_PRC * (scale / softcap)), LOG2_E
    if bias_PRC is not None:
        return s_PRC * scale + bias_PRC, LOG2_E
    return s_PRC, scale * LOG2_E


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _allowed(
    mask: Mask, q_at_PR: Positions, k_at_PC: Positions, keys_first: bool = False
) -> jax.Array:
    """The mask of a tile: [P, R, C], or [P, C, R]."""
    q_dim, k_dim = (1, 2) if keys_first else (2, 1)
    return mask.pairs(_expand(q_at_PR, q_dim), _expand(k_at_PC, k_dim))


def _bias(
    slope_PR: jax.Array | None, q_at_PR: Positions, k_at_PC: Positions, keys_first: bool = False
) -> jax.Array | None:
    """slope x (key - query), of the shape of the tile."""
    if slope_PR is None:
        return None
    q_dim, k_dim = (1, 2) if keys_first else (2, 1)
    q_at, k_at = _expand(q_at_PR, q_dim), _expand(k_at_PC, k_dim)
    return _expand(slope_PR, q_dim) * (k_at.positions_BT - q_at.positions_BT)


def _expand(tree, dim: int):
    return jax.tree.map(lambda x: jnp.expand_dims(x, dim), tree)


def _pick(tree, index):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _visit(seen_Z: jax.Array, step, carry):
    """step(z, carry) for each z of the true elements, in order."""
    if seen_Z.size == 1:  # to look whether it meets costs as much as a small tile
        return step(0, carry)
    visited_Z = jnp.argsort(~seen_Z, stable=True)
    return jax.lax.fori_loop(0, seen_Z.sum(), lambda i, carry: step(visited_Z[i], carry), carry)


def _repeat(x_BT: jax.Array, heads: int) -> jax.Array:
    return jnp.broadcast_to(x_BT[..., None], (*x_BT.shape, heads))


def _divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to the limit."""
    return max(d for d in range(1, min(n, limit) + 1) if n % d == 0)
