"""MoBA and NSA over a cache: each new query fetches the blocks that it chooses, and no others.

The whole blocks of a text are tokens of a second cache, sharded like the first: block i has the
place i, and its mean or compressed key as its key. A query at position t may see those that end
before: i up to (t + 1 - size) // step, so that for them too the mask is causal.

E whole blocks end among the new tokens; Y blocks of a text can be chosen. Everything here runs
inside shard_map.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.sharding import Rules
from model.attention import blocks
from model.attention.block_topk import select
from model.attention.blocks import MaskedKernel, PartialSoftmax
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec, Heads
from model.cache import kv_quant
from model.cache.flash_decode import LayerCache, Shard
from model.cache.kv_quant import KVArray

FETCHED = 2**22  # numbers that are fetched at once: 16 MiB of float32


class Cached(NamedTuple):
    """One layer's cache as one device sees it, and what comes new."""

    spec: AttentionSpec
    rules: Rules
    stored: LayerCache
    at: Positions  # of the new tokens of this device

    @property
    def shard(self) -> Shard:
        return Shard.here(self.rules)

    @property
    def axes(self) -> tuple[str, ...]:
        return self.rules.axes("kv_length")

    def end_B(self) -> jax.Array:
        """Tokens of each row, the new ones included."""
        end_BT = jnp.where(self.at.segments_BT > 0, self.at.positions_BT + 1, 0)
        end_B = jnp.maximum(end_BT.max(1), self.stored.live_B)
        queries = self.rules.axes("length")
        return jax.lax.pmax(end_B, queries) if queries else end_B


def ended(
    cached: Cached, size: int, step: int, xs_BTKH: tuple[jax.Array, ...], weights_CH
) -> tuple[Positions, list[jax.Array]]:
    """Returns the blocks [B, E] that end among the new tokens, and sums [B, E, K, H] of each x.

    `xs` are new keys, or keys and values; what they lack of a block is stored already. The sums
    are weighted as `select.pooled` does. Blocks that do not end now have segment 0.
    """
    stored, shard = cached.stored, cached.shard
    new = cached.at.positions_BT.shape[1] * cached.rules.size("length")
    start_B1, E = stored.live_B[:, None], (new - 1) // step + 1
    first_B1 = jnp.maximum((start_B1 - size + step) // step, 0)
    number_BE = first_B1 + jnp.arange(E)[None]
    whole_BE = number_BE * step + size <= cached.end_B()[:, None]

    # The tokens before the new ones that blocks which end now may begin with.
    tail_BJ, is_tail_BJ = places(start_B1 - size + 1, size - 1, shard)
    is_mine_BT = cached.at.positions_BT % shard.size == shard.index
    at = Positions(
        jnp.concatenate([tail_BJ, cached.at.positions_BT], 1),
        jnp.concatenate([is_tail_BJ.astype(jnp.int32), cached.at.segments_BT * is_mine_BT], 1),
    )
    number_BTW = at.positions_BT[..., None] // step - jnp.arange(size // step)[None, None]
    entry_BTW = number_BTW - first_B1[..., None]
    inside_BTW = (at.segments_BT[..., None] > 0) & (entry_BTW >= 0) & (entry_BTW < E)
    entry_BTW = jnp.where(inside_BTW & (number_BTW >= 0), entry_BTW, E)
    of = select.BlockIndex(size, step, number_BE, whole_BE.astype(jnp.int32), None, entry_BTW)
    sums = []
    for x_BTKH, x_LBKSH, weight_CH in zip(xs_BTKH, stored[:2], weights_CH, strict=False):
        tail_BKJH = fetch(x_LBKSH, stored.layer, tail_BJ[:, None], shard, x_BTKH.dtype)
        x_BTKH = jnp.concatenate([jnp.moveaxis(tail_BKJH, 1, 2), x_BTKH], 1)
        sums.append(select.pooled(x_BTKH, at, of, weight_CH, cached.axes))
    return Positions(number_BE, of.segments_BZ), sums


def places(start: jax.Array, length: int, shard: Shard) -> tuple[jax.Array, jax.Array]:
    """Positions [..., J] of this shard in start .. start + length - 1, [..., 1]; are they there?

    The last of them may lie beyond, or all before the beginning of the text.
    """
    J = -(-length // shard.size)
    low = (start - shard.index + shard.size - 1) // shard.size
    each = jnp.arange(J).reshape(*[1] * (start.ndim - 1), J)
    position = (low + each) * shard.size + shard.index
    return position, (position >= 0) & (position < start + length)


def fetch(
    held_LBKSH: KVArray, layer: jax.Array, position_BMJ: jax.Array, shard: Shard, dtype: jnp.dtype
) -> jax.Array:
    """[B, K or M, J, H] of what is stored for these positions, M of them or one for all K heads.

    M is a multiple of K: neighbours share a head.
    """
    _, B, K, S, _ = held_LBKSH.shape
    M = max(position_BMJ.shape[1], K)
    slot_BMJ = jnp.clip(position_BMJ // shard.size, 0, S - 1)
    row, head = jnp.ogrid[:B, :M]
    place = layer, row[..., None], (head * K // M)[..., None], slot_BMJ
    return kv_quant.dequantise(jax.tree.map(lambda x: x[place], held_LBKSH), dtype)


def see_ranges(
    q_BTNH: jax.Array,
    cached: Cached,
    pair: MaskedKernel,
    heads: Heads,
    at: Positions,
    starts_BTMC: jax.Array,
    length: int,
) -> PartialSoftmax:
    """(out, lse) over the stored keys of this shard in C ranges of `length` tokens a query.

    A range begins at `starts`, and is none where that is less than -length.
    """
    stored, shard = cached.stored, cached.shard
    B, T, N, H = q_BTNH.shape
    M, C = starts_BTMC.shape[2:]
    G, J = N // M, -(-length // shard.size)
    numbers = 2 * B * M * C * J * H
    t = max(d for d in range(1, T + 1) if T % d == 0 and (d == 1 or d * numbers <= FETCHED))

    def some(args):
        q_BtNH, at, starts_BtMC = args
        position_BtMCJ, inside = places(starts_BtMC[..., None], length, shard)
        inside &= position_BtMCJ < stored.live_B[:, None, None, None, None]
        position_BMX = jnp.moveaxis(position_BtMCJ, 1, 2).reshape(B, M, -1)
        k_BMXH, v_BMXH = (
            fetch(x, stored.layer, position_BMX, shard, q_BTNH.dtype) for x in stored[:2]
        )
        k_BMtSH, v_BMtSH = (x.reshape(B, M, t, C * J, H) for x in (k_BMXH, v_BMXH))
        q_BtMGH = q_BtNH.reshape(B, t, M, G, H) * pair.scale
        s_BtMGS = jnp.einsum(
            "BtMGH,BMtSH->BtMGS", q_BtMGH, k_BMtSH, preferred_element_type=jnp.float32
        )
        if pair.softcap:
            s_BtMGS = pair.softcap * jnp.tanh(s_BtMGS / pair.softcap)
        k_at_BtMS = position_BtMCJ.reshape(B, t, M, C * J)
        q_at_Bt11 = at.positions_BT[..., None, None]
        if heads.slope_N is not None:
            ahead_BtM1S = (k_at_BtMS - q_at_Bt11)[:, :, :, None]
            s_BtMGS += heads.slope_N.reshape(1, 1, M, G, 1) * ahead_BtM1S
        seen_BtMS = inside.reshape(k_at_BtMS.shape) & (k_at_BtMS <= q_at_Bt11)
        seen_BtMS &= at.segments_BT[..., None, None] > 0
        s_BtMGS = jnp.where(seen_BtMS[:, :, :, None], s_BtMGS, -jnp.inf)
        lse_BtMG = jax.nn.logsumexp(s_BtMGS, axis=-1)
        # A query that sees nothing has lse -inf: keep -inf - -inf out.
        safe_BtMG = jnp.where(jnp.isneginf(lse_BtMG), 0.0, lse_BtMG)
        p_BtMGS = jnp.exp(s_BtMGS - safe_BtMG[..., None]).astype(v_BMtSH.dtype)
        out_BtMGH = jnp.einsum(
            "BtMGS,BMtSH->BtMGH", p_BtMGS, v_BMtSH, preferred_element_type=jnp.float32
        )
        return out_BtMGH.reshape(B, t, N, H), lse_BtMG.reshape(B, t, N)

    def split(x_BT):
        return jnp.moveaxis(x_BT.reshape(B, T // t, t, *x_BT.shape[2:]), 1, 0)

    parts = jax.lax.map(some, jax.tree.map(split, (q_BTNH, at, starts_BTMC)))
    return tuple(jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]) for x in parts)


def moba_scores(q_BTNH, cached: Cached, new_BEKH: jax.Array, new_at: Positions) -> jax.Array:
    """Scores each block of the text for each query head, float32 [B, T, N, Y]."""
    own_BTNZ, number_BZ, Y = _products(q_BTNH, cached)
    new_BTNE = _times(q_BTNH, new_BEKH.astype(jnp.float32))
    scores_BTNY = _spread(own_BTNZ, number_BZ, Y)
    scores_BTNY = jax.lax.psum(scores_BTNY, cached.axes) if cached.axes else scores_BTNY
    # Equal on all shards: added once, after their sum.
    return scores_BTNY + _spread(new_BTNE, _numbers(new_at), Y)


def nsa_scores(
    q_BTNH, cached: Cached, pair: MaskedKernel, lse_BTN, at: Positions, new_BEKH, new_at: Positions
) -> jax.Array:
    """The importance of each block to each group of heads, float32 [B, T, K, Y]."""
    spec = cached.spec
    step, block = spec.step, spec.block
    own_BTNZ, number_BZ, num_blocks = _products(q_BTNH, cached)
    K = cached.stored.k_LBKSH.shape[2]
    Y = -(-num_blocks * step // block) + 1
    safe_BTN1 = jnp.where(jnp.isneginf(lse_BTN), 0.0, lse_BTN)[..., None]

    def important(s_BTNZ, number_BZ):
        s_BTNZ = s_BTNZ * pair.scale
        if pair.softcap:
            s_BTNZ = pair.softcap * jnp.tanh(s_BTNZ / pair.softcap)
        seen_BTZ = (number_BZ[:, None] >= 0) & (number_BZ[:, None] <= at.positions_BT[..., None])
        p_BTNZ = jnp.where(seen_BTZ[:, :, None], jnp.exp(s_BTNZ - safe_BTN1), 0.0)
        p_BTKZ = p_BTNZ.reshape(*p_BTNZ.shape[:2], K, -1, p_BTNZ.shape[3]).sum(3)
        # Each `step` tokens of a compressed key count for the block that they are in.
        return sum(
            _spread(p_BTKZ, jnp.where(number_BZ < 0, Y, (number_BZ + move) * step // block), Y)
            for move in range(spec.compress // step)
        )

    scores_BTKY = important(own_BTNZ, number_BZ)
    scores_BTKY = jax.lax.psum(scores_BTKY, cached.axes) if cached.axes else scores_BTKY
    return scores_BTKY + important(_times(q_BTNH, new_BEKH), _numbers(new_at))


def _products(q_BTNH, cached: Cached) -> tuple[jax.Array, jax.Array, int]:
    """(q k of this shard's blocks [B, T, N, Z], which they are, -1 for none, blocks of all)."""
    whole = cached.stored.blocks
    k_BKZH = jax.lax.dynamic_index_in_dim(whole.k_LBKSH, whole.layer, keepdims=False)
    number_BZ = whole.positions_BS
    return _times(q_BTNH, k_BKZH.swapaxes(1, 2)), number_BZ, number_BZ.shape[1] * cached.shard.size


def _times(q_BTNH: jax.Array, k_BZKH: jax.Array) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    K = k_BZKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(k_BZKH.dtype)
    s_BTKGZ = jnp.einsum("BTKGH,BZKH->BTKGZ", q_BTKGH, k_BZKH, preferred_element_type=jnp.float32)
    return s_BTKGZ.reshape(B, T, N, -1)


def _numbers(at: Positions) -> jax.Array:
    """Returns the numbers of these blocks, -1 for none."""
    return jnp.where(at.segments_BT > 0, at.positions_BT, -1)


def _spread(x_BTMZ: jax.Array, place_BZ: jax.Array, Y: int) -> jax.Array:
    """Sums [B, T, M, Y] of what has the same place; places outside 0 .. Y - 1 are none."""
    place_BZ = jnp.where(place_BZ < 0, Y, place_BZ)
    zero = blocks.fresh((x_BTMZ, place_BZ), (*x_BTMZ.shape[:3], Y), 0.0)
    return jax.vmap(lambda zero, x, place: zero.at[..., place].add(x, mode="drop"))(
        zero, x_BTMZ, place_BZ
    )
