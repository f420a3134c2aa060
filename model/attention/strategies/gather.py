"""WHERE: the length is sharded; every device gathers all keys and values, and keeps its queries.

Memory O(length) a device for one layer's K and V, and that of their gradients in float32: only
the shards are kept for the backward, which gathers again and scatters the sums home.
"""

import functools

import jax

from model.attention import blocks
from model.attention.blocks import MaskedKernel, PartialSoftmax
from model.attention.mask import Positions
from model.attention.spec import Heads
from model.attention.strategies import local


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(
    axes: tuple[str, ...],
    pair: MaskedKernel,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    heads: Heads,
    q_at: Positions,
    k_at: Positions,
) -> jax.Array:
    """out [B, T, N, H] in q's dtype for the T queries of this shard, over all keys of `axes`."""
    return _forward(axes, pair, q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at)[0]


def forward(
    axes: tuple[str, ...],
    pair: MaskedKernel,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    heads: Heads,
    q_at: Positions,
    k_at: Positions,
) -> PartialSoftmax:
    """(out [B, T, N, H], lse [B, T, N]) float32 of the same; no sink is among the keys."""
    k_BSKH, v_BSKH, all_at = _gather(axes, (k_BTKH, v_BTKH, k_at))
    return pair.forward(q_BTNH, k_BSKH, v_BSKH, heads, q_at, all_at)


def _forward(axes, pair, q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at):
    part = forward(axes, pair, q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at)
    out_BTNH, lse_BTN = local.saved(q_BTNH.dtype, blocks.add_sink(part, heads))
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at, out_BTNH, lse_BTN)


def _backward(axes, pair, residuals, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at, out_BTNH, lse_BTN = residuals
    k_BSKH, v_BSKH, all_at = _gather(axes, (k_BTKH, v_BTKH, k_at))
    done = dout_BTNH, lse_BTN, blocks.delta(out_BTNH, dout_BTNH)
    dq_BTNH, *dkv_BSKH = pair.backward(q_BTNH, k_BSKH, v_BSKH, heads, q_at, all_at, *done)
    # Summed in float32: rounded before, they would err more with every shard.
    dk_BTKH, dv_BTKH = (
        jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True).astype(k_BTKH.dtype)
        for x in dkv_BSKH
    )
    dheads = blocks.sink_gradient(heads, *done[1:])
    return dq_BTNH.astype(q_BTNH.dtype), dk_BTKH, dv_BTKH, dheads, None, None


attention.defvjp(_forward, _backward)


def _gather(axes: tuple[str, ...], tree):
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), tree)
