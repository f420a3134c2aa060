"""New queries over a cache: key blocks in a loop as long as the cache is full, merged by lse."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from core.sharding import Rules, device_kind
from model.attention import blocks
from model.attention.blocks import MaskedKernel
from model.attention.mask import Positions
from model.attention.spec import Heads
from model.cache import kv_quant
from model.cache.kv_quant import KVArray, QuantisedKV

BLOCK = 512  # keys a step: scores of one query and 32 heads stay in cache
FEW = 8  # queries at a time, for which the scores of all keys fit beside these


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Bounds of each page of neighbouring slots: the lowest and highest number of a key channel."""

    low_LBKZH: jax.Array  # the highest number there is where nothing is stored
    high_LBKZH: jax.Array  # the lowest
    page: int = dataclasses.field(metadata=dict(static=True))  # tokens
    count: int = dataclasses.field(metadata=dict(static=True))  # pages that a shard reads

    def add(self, k_LBTKH: jax.Array, index_BT: jax.Array) -> "Pages":
        """Returns pages with these keys, in slots `index`; keys beyond the pages are dropped."""
        L, B, K, _, _ = self.low_LBKZH.shape
        layer, row, _, head = jnp.ogrid[:L, :B, :1, :K]
        place = layer, row, head, (index_BT // self.page)[None, :, :, None]
        k_LBTKH = k_LBTKH.astype(self.low_LBKZH.dtype)
        low_LBKZH = self.low_LBKZH.at[place].min(k_LBTKH, mode="drop")
        high_LBKZH = self.high_LBKZH.at[place].max(k_LBTKH, mode="drop")
        return dataclasses.replace(self, low_LBKZH=low_LBKZH, high_LBKZH=high_LBKZH)


class LayerCache(NamedTuple):
    """One layer's view of a stacked cache; the layers are not copied apart."""

    k_LBKSH: KVArray
    v_LBKSH: KVArray
    positions_BS: jax.Array  # int32; -1 where nothing is stored
    layer: jax.Array  # int32, which of the L layers
    live_B: jax.Array  # int32, slots 0..live-1 of the row may hold something
    blocks: "LayerCache | None" = None  # the text's whole blocks, for kinds that choose among them
    pages: Pages | None = None  # of a cache of which new tokens read a part (quest.py)

    def as_read(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        """New keys and values as they will be read from here, when they are stored.

        So what a token sees does not hang on how a text is cut into chunks.
        """
        return kv_quant.as_read(k_BTKH, self.k_LBKSH), kv_quant.as_read(v_BTKH, self.v_LBKSH)

    def sharding(self, rules: Rules) -> "LayerCache":
        """The PartitionSpec of each field."""
        kv = rules(None, "batch", "act_kv_heads", "kv_length", None)
        of_blocks = None if self.blocks is None else self.blocks.sharding(rules)
        k, v = (kv_quant.sharding(x, kv) for x in self[:2])
        at, rows = rules("batch", "kv_length"), rules("batch")
        pages = jax.tree.map(lambda _: kv, self.pages)
        return LayerCache(k, v, at, PartitionSpec(), rows, of_blocks, pages)


class NewKV(NamedTuple):
    """The keys and values that one layer adds, [B, T, K, H]; stacked once all layers have run."""

    k_BTKH: jax.Array
    v_BTKH: jax.Array
    blocks: "NewKV | None" = None  # [B, E, K, H], equal on all shards of the length
    at: Positions | None = None  # of blocks, [B, E]: their number, and segment 0 for none


class Shard(NamedTuple):
    """One of `size` parts of a cache's length: it keeps the tokens at positions p % size == index.

    So each has as much to keep and to read, however long the text is and however short the reach;
    a text's n-th token here has position n * size + index.
    """

    index: jax.Array | int
    size: int

    @staticmethod
    def here(rules: Rules) -> "Shard":
        """Returns the shard of this device, inside shard_map."""
        axes = rules.axes("kv_length")
        return Shard(jax.lax.axis_index(axes) if axes else 0, rules.size("kv_length"))

    def count(self, tokens: jax.Array) -> jax.Array:
        """Counts those of the first `tokens` tokens of a text that are kept here."""
        return (tokens + self.size - 1 - self.index) // self.size


def forward(
    q_BTNH: jax.Array,
    cache: LayerCache,
    heads: Heads,
    q_at: Positions,
    pair: MaskedKernel,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H] float32, lse [B, T, N] float32) over the stored keys alone."""
    T, S = q_BTNH.shape[1], cache.k_LBKSH.shape[3]
    whole = device_kind() == "cpu" and not any(isinstance(x, QuantisedKV) for x in cache[:2])
    if not whole or T > FEW or S <= BLOCK:
        return _walk(q_BTNH, cache, heads, q_at, pair, min(BLOCK, S))
    # XLA's CPU backend copies a block before it multiplies it, but not the whole of an array.
    see = functools.partial(_walk, q_BTNH, cache, heads, q_at, pair)
    mostly_live = 2 * cache.live_B.max() > S
    return jax.lax.cond(mostly_live, lambda: see(S), lambda: see(BLOCK))


def _walk(
    q_BTNH: jax.Array,
    cache: LayerCache,
    heads: Heads,
    q_at: Positions,
    pair: MaskedKernel,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """`forward`, so many keys at a time."""
    B, T, N, H = q_BTNH.shape
    _, _, K, S, _ = cache.k_LBKSH.shape
    G = N // K
    q_BKGTH = jnp.moveaxis((q_BTNH * pair.scale).reshape(B, T, K, G, H), 1, 3)
    # One free dim: with two XLA would transpose the keys.
    dtype = kv_quant.product_dtype(cache.k_LBKSH, q_BTNH.dtype)
    q_BKMH = q_BKGTH.reshape(B, K, G * T, H).astype(dtype)

    def step(i, carry):
        out_BKGTH, max_BKGT, sum_BKGT = carry
        start = jnp.minimum(i * block, S - block)  # the last block overlaps: mask what was seen
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block)
        (k_BKCH, k_scale), (v_BKCH, v_scale) = (
            _layer_block(x, cache.layer, start, block, q_BTNH.dtype) for x in cache[:2]
        )
        at_BC = cut(cache.positions_BS, axis=1)
        s_BKMC = jnp.einsum("BKMH,BKCH->BKMC", q_BKMH, k_BKCH, preferred_element_type=jnp.float32)
        s_BKGTC = kv_quant.scaled(s_BKMC.reshape(B, K, G, T, block), k_scale)
        if pair.softcap:
            s_BKGTC = pair.softcap * jnp.tanh(s_BKGTC / pair.softcap)
        if heads.slope_N is not None:
            ahead_BTC = at_BC[:, None, :] - q_at.positions_BT[:, :, None]
            slope_KG11 = heads.slope_N.reshape(K, G, 1, 1)
            s_BKGTC = s_BKGTC + slope_KG11[None] * ahead_BTC[:, None, None]
        fresh_C = start + jnp.arange(block) >= i * block
        q_at_BT1 = jax.tree.map(lambda x_BT: x_BT[:, :, None], one_document(q_at))
        seen_BTC = fresh_C[None, None, :] & pair.mask.pairs(q_at_BT1, stored_at(at_BC[:, None, :]))
        s_BKGTC = jnp.where(seen_BTC[:, None, None], s_BKGTC, -jnp.inf)
        new_max_BKGT = jnp.maximum(max_BKGT, s_BKGTC.max(axis=-1))
        safe_BKGT = jnp.where(jnp.isneginf(new_max_BKGT), 0.0, new_max_BKGT)
        p_BKGTC = jnp.exp(s_BKGTC - safe_BKGT[..., None])
        fade_BKGT = jnp.exp(max_BKGT - safe_BKGT)
        weight_BKMC = kv_quant.scaled(p_BKGTC, v_scale).reshape(B, K, G * T, block)
        added_BKMH = jnp.einsum(
            "BKMC,BKCH->BKMH", weight_BKMC.astype(v_BKCH.dtype), v_BKCH,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        out_BKGTH = out_BKGTH * fade_BKGT[..., None] + added_BKMH.reshape(B, K, G, T, H)
        return out_BKGTH, new_max_BKGT, sum_BKGT * fade_BKGT + p_BKGTC.sum(axis=-1)

    fresh = functools.partial(blocks.fresh, (q_BTNH, *cache[:3], q_at))
    rows = q_BKGTH.shape[:-1]
    empty = fresh(q_BKGTH.shape, 0.0), fresh(rows, -jnp.inf), fresh(rows, 0.0)
    if block == S:
        out_BKGTH, max_BKGT, sum_BKGT = step(0, empty)
    else:
        num_blocks = (jnp.minimum(cache.live_B.max(), S) + block - 1) // block
        out_BKGTH, max_BKGT, sum_BKGT = jax.lax.fori_loop(0, num_blocks, step, empty)
    nothing_BKGT = sum_BKGT == 0
    out_BKGTH /= jnp.where(nothing_BKGT, 1.0, sum_BKGT)[..., None]
    lse_BKGT = max_BKGT + jnp.log(sum_BKGT)
    lse_BKGT = jnp.where(nothing_BKGT, -jnp.inf, lse_BKGT)
    out_BTNH = jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, N, H)
    return out_BTNH, jnp.moveaxis(lse_BKGT, 3, 1).reshape(B, T, N)


def one_document(at: Positions) -> Positions:
    """Queries whose segments are 1, as those of stored keys are, or 0 for padding."""
    return at._replace(segments_BT=jnp.minimum(at.segments_BT, 1))


def stored_at(position_BS: jax.Array) -> Positions:
    """Stored keys: segment 1, or 0 where a slot is empty and its position -1."""
    return Positions(position_BS, (position_BS >= 0).astype(jnp.int32))


def _layer_block(
    kept: KVArray, layer: jax.Array, start: jax.Array, block: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array | None]:
    """([B, K, C, H], the scales [B, K, 1, 1, C] of what is quantised)."""

    def cut(x_LBKS: jax.Array) -> jax.Array:
        _, B, K, _, *widths = x_LBKS.shape
        start_at = (layer, 0, 0, start, *[0] * len(widths))
        return jax.lax.dynamic_slice(x_LBKS, start_at, (1, B, K, block, *widths))[0]

    part = jax.tree.map(cut, kept)
    scale = part.scale[:, :, None, None] if isinstance(part, QuantisedKV) else None
    return kv_quant.levels(part, kv_quant.product_dtype(part, dtype)), scale
