"""Attention of new tokens to a cache and to each other; the cache may be sharded over its length.

    out_BTNH = attend_cached(q_BTNH, k_BTKH, v_BTKH, at, stored, full(), kernel="auto", rules=rules)

The cache stays where it is. Every shard of it meets all queries, which are gathered where `length`
is sharded too, and the partial outputs are merged by log-sum-exp, each where its query is at home:
pass-Q of arXiv 2411.01783. What crosses the mesh grows with the new tokens alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from core.config import Unsupported
from core.sharding import Rules
from model.attention import blocks
from model.attention.attend import heads_sharding
from model.attention.blocks import MaskedKernel, PartialSoftmax
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec, Heads
from model.attention.strategies.table import AttentionCall
from model.cache import flash_decode, quest
from model.cache.flash_decode import LayerCache, Shard


def attend_cached(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    at: Positions,
    cache: LayerCache,
    spec: AttentionSpec,
    *,
    kernel: str,
    rules: Rules,
    heads: Heads = Heads(),  # noqa: B008 (immutable)
) -> jax.Array:
    """out [B, T, N, H]: new tokens attend to what `cache` holds and to each other.

    The cache is only read: the caller writes the new keys and values after the last layer, so
    that a ring buffer never loses a key that a token of the same chunk still sees. Among
    themselves the new tokens follow `rules.strategy` where `length` is sharded.
    """
    _check(spec, q_BTNH.shape[1])
    call = AttentionCall.of(q_BTNH, k_BTKH, at, spec, kernel, rules)
    see_new = call.way.part

    def of_device(q_BTNH, k_BTKH, v_BTKH, heads, at, cache):
        heads = jax.tree.map(lambda x_N: blocks.vary(x_N, q_BTNH), heads)
        old = see_old(q_BTNH, cache, heads, at, call.pair, rules)
        new = see_new(q_BTNH, k_BTKH, v_BTKH, heads, at, at)
        return blocks.add_sink(blocks.merge(old, new), heads)[0].astype(q_BTNH.dtype)

    return over_shards(of_device, q_BTNH, k_BTKH, v_BTKH, heads, at, cache, rules)


def over_shards(
    of_device: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    heads: Heads,
    at: Positions,
    cache: LayerCache,
    rules: Rules,
) -> jax.Array:
    """out [B, T, N, H] of `of_device`, which each device calls with its own of the arrays."""
    q_spec = rules("batch", "length", "act_heads", None)
    kv_spec = rules("batch", "length", "act_kv_heads", None)
    at_spec = jax.tree.map(lambda _: rules("batch", "length"), at)
    in_specs = q_spec, kv_spec, kv_spec, heads_sharding(heads, rules), at_spec
    return jax.shard_map(of_device, in_specs=(*in_specs, cache.sharding(rules)), out_specs=q_spec)(
        q_BTNH, k_BTKH, v_BTKH, heads, at, cache
    )


def see_old(
    q_BTNH: jax.Array,
    cache: LayerCache,
    heads: Heads,
    at: Positions,
    pair: MaskedKernel,
    rules: Rules,
) -> PartialSoftmax:
    """(out, lse) of this device's queries over the stored keys of all shards."""
    cache = cache._replace(live_B=Shard.here(rules).count(cache.live_B))
    q_BTNH, at = everywhere((q_BTNH, at), rules)
    few = cache.pages is not None and q_BTNH.shape[1] <= quest.QUERIES
    forward = quest.forward if few else flash_decode.forward
    return merge_shards(forward(q_BTNH, cache, heads, at, pair), rules)


def everywhere(tree, rules: Rules):
    """Arrays [B, T, ...] of the new tokens of this device: those of all, if they are sharded."""
    axes = rules.axes("length")
    if not axes:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), tree)


def merge_shards(part: PartialSoftmax, rules: Rules) -> PartialSoftmax:
    """`part` [B, T, ...] of all queries on each device, merged over the shards of the cache.

    Sums of what is shifted by the largest log-sum-exp: two passes over the mesh, and no device
    receives more than it ends up with. Each keeps its own of the queries, if they are sharded.
    """
    axes, queries = rules.axes("kv_length"), rules.axes("length")
    assert queries in ((), axes), f"length over {queries}, but the cache over {axes}"
    if not axes:
        return part
    out_BTNH, lse_BTN = part
    high_BTN = jax.lax.pmax(lse_BTN, axes)
    # A query that no shard has a key for has lse -inf: keep -inf - -inf out.
    safe_BTN = jnp.where(jnp.isneginf(high_BTN), 0.0, high_BTN)
    weight_BTN = jnp.exp(lse_BTN - safe_BTN)
    shifted = out_BTNH * weight_BTN[..., None], weight_BTN
    if queries:
        out_BTNH, total_BTN = (
            jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True) for x in shifted
        )
        T = total_BTN.shape[1]
        mine = jax.lax.axis_index(axes) * T
        safe_BTN = jax.lax.dynamic_slice_in_dim(safe_BTN, mine, T, axis=1)
    else:
        out_BTNH, total_BTN = jax.lax.psum(shifted, axes)
    nothing_BTN = total_BTN == 0
    out_BTNH /= jnp.where(nothing_BTN, 1.0, total_BTN)[..., None]
    return out_BTNH, jnp.where(nothing_BTN, -jnp.inf, safe_BTN + jnp.log(total_BTN))


def _check(spec: AttentionSpec, tokens: int) -> None:
    """Unsupported where what a token sees is not there yet when it is read."""
    if spec.kind == "bidirectional":
        raise Unsupported(
            "kind='bidirectional' sees what comes later, so it cannot be decoded token by token: "
            "run it without a cache, or take kind='full' or 'prefix'"
        )
    if 1 < tokens < spec.prefix:
        raise Unsupported(
            f"kind='prefix' with prefix={spec.prefix} in prefill chunks of {tokens} tokens: a "
            "chunk must hold the whole prefix; raise the chunk, or shorten the prefix"
        )
