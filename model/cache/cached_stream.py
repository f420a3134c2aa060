"""StreamingLLM (arXiv 2309.17453): the last `window` tokens of a text, and its first `sinks`.

Positions count inside what is kept: the sinks are seen as if the window came right after them, so
that no distance is ever longer than window + sinks - 1, however long the text is. Keys stay turned
by where they stand in the text. A query sees its window as always; before it looks at the sinks it
is turned back to position window + sinks - 1, if it stands further on.
"""

import dataclasses

import jax
import jax.numpy as jnp

from core.sharding import Rules
from model.attention import blocks
from model.attention.blocks import PartialSoftmax
from model.attention.kernels import reference
from model.attention.mask import Full, Positions
from model.attention.spec import AttentionSpec, Heads, sliding
from model.attention.strategies.table import AttentionCall
from model.cache import kv_quant
from model.cache.cached import over_shards, see_old
from model.cache.flash_decode import LayerCache, Shard
from model.ops import rope


def stream_cached(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    at: Positions,
    cache: LayerCache,
    spec: AttentionSpec,
    *,
    kernel: str,
    rules: Rules,
    heads: Heads,
) -> jax.Array:
    """out [B, T, N, H], as `attend_cached`; queries and keys are turned by their positions."""
    near = sliding(spec.window, softcap=spec.softcap)
    call = AttentionCall.of(q_BTNH, k_BTKH, at, near, kernel, rules)
    see_new = call.way.part

    def of_device(q_BTNH, k_BTKH, v_BTKH, heads, at, cache):
        heads = jax.tree.map(lambda x_N: blocks.vary(x_N, q_BTNH), heads)
        kv_BsKH, kv_at = _sinks(k_BTKH, v_BTKH, at, cache, spec.sinks, rules)
        beside = Positions(at.positions_BT, at.segments_BT * (at.positions_BT >= spec.sinks))
        parts = (
            see_old(q_BTNH, _without(cache, spec.sinks), heads, at, call.pair, rules),
            see_new(q_BTNH, k_BTKH, v_BTKH, heads, at, beside),
            _see_sinks(q_BTNH, kv_BsKH, heads, at, kv_at, spec),
        )
        part = blocks.merge(blocks.merge(*parts[:2]), parts[2])
        return blocks.add_sink(part, heads)[0].astype(q_BTNH.dtype)

    return over_shards(of_device, q_BTNH, k_BTKH, v_BTKH, heads, at, cache, rules)


def _without(cache: LayerCache, sinks: int) -> LayerCache:
    """`cache` without the first `sinks` tokens of the text."""
    is_sink_BS = cache.positions_BS < sinks
    return cache._replace(positions_BS=jnp.where(is_sink_BS, -1, cache.positions_BS))


def _see_sinks(
    q_BTNH: jax.Array, kv_BsKH, heads: Heads, at: Positions, kv_at: Positions, spec: AttentionSpec
) -> PartialSoftmax:
    """(out, lse) over the sinks, of which each query sees those that came before it."""
    near_BT = jnp.minimum(at.positions_BT, spec.window + spec.sinks - 1)
    if spec.rope is not None:
        # What the queries were multiplied by when they were turned counts once.
        turn = dataclasses.replace(spec.rope, attention_factor=1.0)
        cos_sin = rope.table(near_BT - at.positions_BT, turn, q_BTNH.shape[-1])
        q_BTNH = rope.rotate(q_BTNH, cos_sin)
    near = Positions(near_BT, at.segments_BT)
    how = dict(scale=q_BTNH.shape[-1] ** -0.5, softcap=spec.softcap, slope_N=heads.slope_N)
    return reference.forward(q_BTNH, *kv_BsKH, near, kv_at, Full(), **how)


def _sinks(
    k_BTKH: jax.Array, v_BTKH: jax.Array, at: Positions, cache: LayerCache, sinks: int, rules: Rules
) -> tuple[list[jax.Array], Positions]:
    """Keys and values of the first `sinks` tokens [B, sinks, K, H], and where they are.

    Each is stored on one shard, or new on one, and is sent to all. Those that have not come yet
    have segment 0.
    """
    shard, spread = Shard.here(rules), rules.axes("length")
    _, B, _, S, _ = cache.k_LBKSH.shape
    slots = min(-(-sinks // shard.size), S)
    old_at_BS = cache.positions_BS[:, :slots]
    old_BS = jnp.where((old_at_BS >= 0) & (old_at_BS < sinks), old_at_BS, sinks)
    new_BT = jnp.where((at.segments_BT > 0) & (at.positions_BT < sinks), at.positions_BT, sinks)

    def place(x_BTE: jax.Array, to_BT: jax.Array) -> jax.Array:
        zero = jnp.zeros((B, sinks, *x_BTE.shape[2:]), x_BTE.dtype)
        zero = blocks.vary(blocks.vary(zero, x_BTE), to_BT)
        return zero.at[jnp.arange(B)[:, None], to_BT].set(x_BTE, mode="drop")

    def collect(old_BSE: jax.Array, new_BTE: jax.Array) -> jax.Array:
        old, new = place(old_BSE, old_BS), place(new_BTE, new_BT)
        if spread:
            return jax.lax.psum(old + new, spread)
        axes = rules.axes("kv_length")
        return (jax.lax.psum(old, axes) if axes else old) + new

    def first(held, dtype):
        part = jax.tree.map(lambda x: x[cache.layer, :, :, :slots], held)
        return jnp.moveaxis(kv_quant.dequantise(part, dtype), 1, 2)

    kv = [
        collect(first(held, x_BTKH.dtype), x_BTKH)
        for held, x_BTKH in ((cache.k_LBKSH, k_BTKH), (cache.v_LBKSH, v_BTKH))
    ]
    here_Bs = collect(jnp.ones_like(old_BS), jnp.ones_like(new_BT))
    position_Bs = jnp.broadcast_to(jnp.arange(sinks, dtype=jnp.int32)[None], (B, sinks))
    return kv, Positions(position_Bs, here_Bs)
