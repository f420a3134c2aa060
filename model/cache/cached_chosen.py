"""The layers that choose blocks, over a cache: `attend_cached` for MoBA and for NSA.

    out_BTNH, blocks = moba_cached(q_BTNH, k_BTKH, v_BTKH, at, stored, spec, kernel="auto", ...)

`blocks` are to be written beside K and V: what of the text the new tokens have made whole.
"""

import jax
import jax.numpy as jnp

from core.sharding import Rules
from model.attention import attend, blocks
from model.attention.block_topk import select
from model.attention.blocks import MaskedKernel, PartialSoftmax
from model.attention.mask import Positions
from model.attention.nsa import Compressor
from model.attention.spec import AttentionSpec, Heads, sliding
from model.attention.strategies.table import AttentionCall
from model.cache import cached_select
from model.cache.cached import everywhere, merge_shards, see_old
from model.cache.cached_select import Cached
from model.cache.flash_decode import LayerCache, NewKV


def moba_cached(
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
) -> tuple[jax.Array, NewKV]:
    """(out [B, T, N, H], mean keys of the blocks that are whole now)."""
    call = AttentionCall.of(q_BTNH, k_BTKH, at, spec, kernel, rules)

    def of_device(q_BTNH, k_BTKH, v_BTKH, heads, at, stored):
        heads = jax.tree.map(lambda x_N: blocks.vary(x_N, q_BTNH), heads)
        cached = Cached(spec, rules, stored, at)
        mean_CH = jnp.full((spec.block, q_BTNH.shape[-1]), 1 / spec.block)
        new_at, (mean_BEKH,) = cached_select.ended(
            cached, spec.block, spec.block, (k_BTKH,), (mean_CH,)
        )
        q_all_BTNH, at_all = everywhere((q_BTNH, at), rules)
        scores = cached_select.moba_scores(q_all_BTNH, cached, mean_BEKH, new_at)
        chosen = select.best_of_moba(scores, at_all, _every(scores), spec.block, spec.top)
        part = _see_chosen(cached, call, (q_BTNH, k_BTKH, v_BTKH), heads, chosen)
        out_BTNH = blocks.add_sink(part, heads)[0].astype(q_BTNH.dtype)
        return out_BTNH, NewKV(mean_BEKH, mean_BEKH[..., :0], at=new_at)

    return _sharded(of_device, rules, heads, cache)(q_BTNH, k_BTKH, v_BTKH, heads, at, cache)


def nsa_cached(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    gates_BTN3: jax.Array,
    compressors: tuple[Compressor, Compressor],
    at: Positions,
    cache: LayerCache,
    spec: AttentionSpec,
    *,
    kernel: str,
    rules: Rules,
) -> tuple[jax.Array, NewKV]:
    """(out [B, T, N, H], compressed keys and values of the blocks that are whole now)."""
    call = AttentionCall.of(q_BTNH, k_BTKH, at, spec, kernel, rules)
    near = call._replace(spec=sliding(spec.window, softcap=spec.softcap))

    def of_device(q_BTNH, k_BTKH, v_BTKH, both, at, stored):
        gates_BTN3, compressors = both
        cached = Cached(spec, rules, stored, at)
        qkv = q_BTNH, k_BTKH, v_BTKH
        compressed, scores, new = _see_compressed(cached, call.pair.pair, qkv, compressors)
        at_all = everywhere(at, rules)
        chosen = select.best_of_nsa(scores, at_all, _every(scores), spec.block, spec.top)
        parts = (
            compressed,
            _see_chosen(cached, call, qkv, Heads(), chosen),
            _see_near(cached, near, qkv),
        )
        out_BTNH = sum(gates_BTN3[..., i, None] * part[0] for i, part in enumerate(parts))
        return out_BTNH.astype(q_BTNH.dtype), new

    both = gates_BTN3, compressors
    return _sharded(of_device, rules, both, cache)(q_BTNH, k_BTKH, v_BTKH, both, at, cache)


def _see_compressed(
    cached: Cached, pair: MaskedKernel, qkv, compressors
) -> tuple[PartialSoftmax, jax.Array, NewKV]:
    """((out, lse) of the compressed branch, importance of blocks to all queries, what is new)."""
    spec, whole = cached.spec, cached.stored.blocks
    q_BTNH, *kv_BTKH = qkv
    weights = [compress.weight_CH for compress in compressors]
    new_at, sums = cached_select.ended(cached, spec.compress, spec.step, kv_BTKH, weights)
    k_BEKH, v_BEKH = (
        compress.finish(x_BEKH, q_BTNH.dtype)
        for compress, x_BEKH in zip(compressors, sums, strict=True)
    )

    def last_ended(at: Positions) -> Positions:
        return Positions((at.positions_BT + 1 - spec.compress) // spec.step, at.segments_BT)

    ended_B = jnp.maximum((whole.live_B - spec.compress) // spec.step + 1, 0)
    whole, at = whole._replace(live_B=ended_B), last_ended(cached.at)
    old = see_old(q_BTNH, whole, Heads(), at, pair, cached.rules)
    part = blocks.merge(old, pair.forward(q_BTNH, k_BEKH, v_BEKH, Heads(), at, new_at))
    q_all_BTNH, lse_all_BTN, at_all = everywhere((q_BTNH, part[1], at), cached.rules)
    scores = cached_select.nsa_scores(q_all_BTNH, cached, pair, lse_all_BTN, at_all, k_BEKH, new_at)
    return part, scores, NewKV(k_BEKH, v_BEKH, at=new_at)


def _see_chosen(cached: Cached, call, qkv, heads: Heads, chosen_BTMC: jax.Array) -> PartialSoftmax:
    """(out, lse) of the blocks that all queries chose, stored or new."""
    q_BTNH = qkv[0]
    block, T = cached.spec.block, q_BTNH.shape[1]
    q_all_BTNH, at_all = everywhere((q_BTNH, cached.at), cached.rules)
    old = cached_select.see_ranges(
        q_all_BTNH, cached, call.pair.pair, heads, at_all, chosen_BTMC * block, block
    )
    if queries := cached.rules.axes("length"):
        first = jax.lax.axis_index(queries) * T
        chosen_BTMC = jax.lax.dynamic_slice_in_dim(chosen_BTMC, first, T, axis=1)
    new = call.way.part(*qkv, heads._replace(chosen=chosen_BTMC), cached.at, cached.at)
    return blocks.merge(merge_shards(old, cached.rules), new)


def _see_near(cached: Cached, call, qkv) -> PartialSoftmax:
    """(out, lse) of the window."""
    window = call.spec.window
    q_all_BTNH, at_all = everywhere((qkv[0], cached.at), cached.rules)
    starts_BT11 = (at_all.positions_BT - window + 1)[..., None, None]
    starts_BTK1 = jnp.broadcast_to(starts_BT11, (*starts_BT11.shape[:2], qkv[1].shape[2], 1))
    old = cached_select.see_ranges(
        q_all_BTNH, cached, call.pair, Heads(), at_all, starts_BTK1, window
    )
    new = call.way.part(*qkv, Heads(), cached.at, cached.at)
    return blocks.merge(merge_shards(old, cached.rules), new)


def _every(scores_BTMY: jax.Array) -> select.BlockIndex:
    """A slot for each block of one text; those that it does not have yet are never chosen."""
    B, *_, Y = scores_BTMY.shape
    number_BY = jnp.broadcast_to(jnp.arange(Y, dtype=jnp.int32)[None], (B, Y))
    return select.BlockIndex(0, 0, number_BY, jnp.ones_like(number_BY), None, None)


def _sharded(of_device, rules: Rules, fourth, cache: LayerCache):
    """`of_device` under shard_map; `fourth` is what the layer itself brings."""
    q_spec = rules("batch", "length", "act_heads", None)
    kv_spec = rules("batch", "length", "act_kv_heads", None)
    at_spec = Positions(rules("batch", "length"), rules("batch", "length"))
    block_spec, number = rules("batch", None, "act_kv_heads", None), rules("batch", None)
    new_spec = NewKV(block_spec, block_spec, at=Positions(number, number))
    if isinstance(fourth, Heads):
        fourth_spec = attend.heads_sharding(fourth, rules)
    else:
        fourth_spec = q_spec, jax.tree.map(lambda _: rules(None, None), fourth[1])
    in_specs = q_spec, kv_spec, kv_spec, fourth_spec, at_spec, cache.sharding(rules)
    return jax.shard_map(of_device, in_specs=in_specs, out_specs=(q_spec, new_spec))
