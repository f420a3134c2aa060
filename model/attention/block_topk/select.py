"""WHAT is seen, chosen from the data: scores of blocks -> the blocks that each query sees.

    MoBA  arXiv 2502.13189   a query head sees its own block, and those whose mean key it likes
    NSA   arXiv 2502.11089   a group of heads sees the first block, its own and the one before,
                             and those to whose compressed keys it attends most

Blocks count from 0 in their document. Only whole blocks are candidates: what follows a block in
its document sees all of it, so nothing leaks from the future, nor from another document.

Blocks of `size` tokens begin every `step` tokens; Z slots hold the whole ones of a row. Choosing
is no part of the gradient. Everything here runs inside shard_map: tokens [B, T] are those of one
device, `axes` are the mesh axes over which the length S of the row is sharded.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from core.sharding import device_kind
from model.attention import blocks
from model.attention.blocks import MaskedKernel
from model.attention.mask import Positions
from model.attention.strategies.local import SAVED

# Of queries and blocks at once. On a CPU they stay in its caches (at 8K tokens 0.19 s, not 0.67);
# on others 128 MiB, so that the blocks' keys are not read again for every few queries.
CPU_SCORES, SCORES = 2**20, 2**25
FORCED = 3  # blocks that NSA sees anyway: the own, the one before it, the first


class BlockIndex(NamedTuple):
    """The whole blocks of each row; equal on all devices that share it."""

    size: int
    step: int
    number_BZ: jax.Array  # int32, which block of its document
    segments_BZ: jax.Array  # 0: no block
    first_BZ: jax.Array  # rank of its first token in order of (segment, position)
    of_token_BTW: jax.Array  # slots of the size / step blocks that a token is in; Z is none

    @property
    def ends_at(self) -> Positions:
        """Positions of the last token of each block: later tokens see the block."""
        return Positions(self.number_BZ * self.step + self.size - 1, self.segments_BZ)


def slots(at: Positions, size: int, step: int, axes: tuple[str, ...]) -> BlockIndex:
    """The blocks of `size` tokens (a multiple of `step`), for tokens in any order.

    In order of (segment, position) the blocks of a document end `step` ranks apart, the first of
    them at least `size` after the end of the one before: no two end in one aligned window of
    `step` ranks. So the window is the slot, and Z = S / step is enough for any documents.
    """
    all_at = jax.tree.map(lambda x: _gather(x, axes), at)
    here_BS = jax.lax.broadcasted_iota(jnp.int32, all_at.segments_BT.shape, 1)
    segments_BS, positions_BS, order_BS = jax.lax.sort(
        (all_at.segments_BT, all_at.positions_BT, here_BS), num_keys=2
    )
    rank_BS = jnp.argsort(order_BS, axis=1).astype(jnp.int32)
    begins = functools.partial(jnp.pad, pad_width=((0, 0), (size - 1, 0)), constant_values=-1)
    ends_BS = (segments_BS > 0) & (begins(segments_BS)[:, : 1 - size or None] == segments_BS)
    ends_BS &= begins(positions_BS)[:, : 1 - size or None] == positions_BS - (size - 1)
    ends_BS &= (positions_BS + 1 - size) % step == 0

    S = segments_BS.shape[1]
    ends_BZs = jnp.pad(ends_BS, ((0, 0), (0, -S % step))).reshape(len(ends_BS), -1, step)
    end_BZ = jnp.argmax(ends_BZs, axis=2) + step * jnp.arange(ends_BZs.shape[1])[None]
    take = functools.partial(jnp.take_along_axis, indices=jnp.minimum(end_BZ, S - 1), axis=1)
    segments_BZ = jnp.where(ends_BZs.any(2), take(segments_BS), 0)
    number_BZ = (take(positions_BS) + 1 - size) // step

    T = at.segments_BT.shape[1]
    first = jax.lax.axis_index(axes) * T if axes else 0
    rank_BT = jax.lax.dynamic_slice_in_dim(rank_BS, first, T, axis=1)
    positions_BTW, segments_BTW, rank_BTW = (
        x_BT[..., None] for x_BT in (at.positions_BT, at.segments_BT, rank_BT)
    )
    number_BTW = positions_BTW // step - jnp.arange(size // step)[None, None]
    slot_BTW = (rank_BTW - positions_BTW + number_BTW * step + size - 1) // step
    Z = segments_BZ.shape[1]
    is_slot_BTW = (number_BTW >= 0) & (slot_BTW < Z) & (segments_BTW > 0)
    found = jax.vmap(lambda x_Z, slot_TW: x_Z[slot_TW])
    near_BTW = jnp.clip(slot_BTW, 0, Z - 1)
    is_slot_BTW &= found(segments_BZ, near_BTW) == segments_BTW
    is_slot_BTW &= found(number_BZ, near_BTW) == number_BTW
    slot_BTW = jnp.where(is_slot_BTW, slot_BTW, Z)
    return BlockIndex(size, step, number_BZ, segments_BZ, end_BZ - size + 1, slot_BTW)


def pooled(
    x_BTKH: jax.Array, at: Positions, of: BlockIndex, weight_CH: jax.Array, axes: tuple[str, ...]
) -> jax.Array:
    """Sums of the tokens of each block, float32 [B, Z, K, H], each times the weight of its place.

    Each device adds up what it holds: a block may lie on several.
    """
    place_BTW = at.positions_BT[..., None] % of.step + (
        of.step * jnp.arange(of.size // of.step)[None, None]
    )
    weight_BTW1H = weight_CH.astype(jnp.float32)[place_BTW][:, :, :, None]
    new_BTWKH = x_BTKH.astype(jnp.float32)[:, :, None] * weight_BTW1H
    B, Z = of.segments_BZ.shape
    zero_BZKH = blocks.fresh(new_BTWKH, (B, Z, *x_BTKH.shape[2:]), 0.0)

    def add(zero_ZKH, slot_TW, new_TWKH):
        return zero_ZKH.at[slot_TW].add(new_TWKH, mode="drop")

    sums_BZKH = jax.vmap(add)(zero_BZKH, of.of_token_BTW, new_BTWKH)
    return jax.lax.psum(sums_BZKH, axes) if axes else sums_BZKH


def moba(
    q_BTNH: jax.Array, k_BTKH: jax.Array, at: Positions, block: int, top: int, axes: tuple[str, ...]
) -> jax.Array:
    """Blocks that each head of each query sees, [B, T, N, top]; -1 is none. Equations 5 to 7."""
    of = slots(at, block, block, axes)
    mean_CH = jnp.full((block, k_BTKH.shape[-1]), 1 / block)
    mean_BZKH = pooled(jax.lax.stop_gradient(k_BTKH), at, of, mean_CH, axes)

    def scores(q_BtNH, at):
        B, t, N, H = q_BtNH.shape
        K = mean_BZKH.shape[2]
        q_BtKGH = q_BtNH.reshape(B, t, K, N // K, H).astype(jnp.float32)
        return jnp.einsum("BtKGH,BZKH->BtKGZ", q_BtKGH, mean_BZKH).reshape(B, t, N, -1)

    choose = functools.partial(best_of_moba, of=of, block=block, top=top)
    return _in_parts(scores, choose, (q_BTNH, at), q_BTNH.shape[2] * of.segments_BZ.shape[1])


def nsa(
    pair: MaskedKernel,
    q_BTNH: jax.Array,
    compressed_BZKH: jax.Array,
    lse_BTN: jax.Array,
    at: Positions,
    of: BlockIndex,
    block: int,
    top: int,
    axes: tuple[str, ...],
) -> jax.Array:
    """Blocks that each group of heads of each query sees, [B, T, K, top]; -1 is none.

    Equations 8 to 12: a block's importance is the attention that its group pays to compressed
    keys, each counted once for every `of.step` tokens that it shares with the block. `lse` is of
    that attention, `pair` what its scores are made of.
    """
    whole = slots(at, block, block, axes)
    compressed_BZKH = jax.lax.stop_gradient(compressed_BZKH)
    size, length = of.size // of.step, block // of.step
    moves = range(1 - size, length)  # from the compressed key that begins where the block does
    # Compressed keys of one document are in consecutive slots.
    slot_BZ = (whole.first_BZ + of.size - 1) // of.step

    def scores(q_BtNH, at, lse_BtN):
        B, t, N, H = q_BtNH.shape
        K = compressed_BZKH.shape[2]
        q_BtKGH = q_BtNH.reshape(B, t, K, N // K, H)
        lse_BK1tG = jnp.moveaxis(lse_BtN.reshape(B, t, K, N // K), 1, 2)[:, :, None]
        # Slots before queries: what is taken below are whole rows.
        s_BKZtG = pair.scale * jnp.einsum(
            "BZKH,BtKGH->BKZtG", compressed_BZKH, q_BtKGH, preferred_element_type=jnp.float32
        )
        if pair.softcap:
            s_BKZtG = pair.softcap * jnp.tanh(s_BKZtG / pair.softcap)
        ends = of.ends_at
        seen_BZt = (ends.segments_BT[..., None] == at.segments_BT[:, None]) & (
            ends.positions_BT[..., None] <= at.positions_BT[:, None]
        )
        # Nothing is seen where lse is -inf.
        p_BKZtG = jnp.where(seen_BZt[:, None, ..., None], jnp.exp(s_BKZtG - lse_BK1tG), 0.0)
        p_BKZt = p_BKZtG.sum(-1)
        importance_BKYt = sum(
            (min(move + size, length) - max(move, 0)) * _take(p_BKZt, slot_BZ + move)
            for move in moves
        )
        return jnp.moveaxis(importance_BKYt, 3, 1)

    choose = functools.partial(best_of_nsa, of=whole, block=block, top=top)
    queries = q_BTNH, at, lse_BTN
    return _in_parts(scores, choose, queries, q_BTNH.shape[2] * of.segments_BZ.shape[1])


def best_of_moba(
    scores_BtNZ: jax.Array, at: Positions, of: BlockIndex, block: int, top: int
) -> jax.Array:
    """[B, t, N, top]: the own block, and the best of those before it."""
    best_BtNC = _best(scores_BtNZ, at, of, block, count=top - 1, low=0, back=1)
    return _with([at.positions_BT // block], at, best_BtNC)


def best_of_nsa(
    scores_BtKZ: jax.Array, at: Positions, of: BlockIndex, block: int, top: int
) -> jax.Array:
    """[B, t, K, top]: the own block, the one before, the first, and the best of the others."""
    best_BtKC = _best(scores_BtKZ, at, of, block, count=top - FORCED, low=1, back=2)
    own_Bt = at.positions_BT // block
    return _with([own_Bt, own_Bt - 1, jnp.where(own_Bt > 1, 0, -1)], at, best_BtKC)


def _with(forced_Bt: list[jax.Array], at: Positions, best_BtMC: jax.Array) -> jax.Array:
    forced_BtF = jnp.where(at.segments_BT[..., None] > 0, jnp.stack(forced_Bt, -1), -1)
    shape = *best_BtMC.shape[:3], len(forced_Bt)
    return jnp.concatenate([jnp.broadcast_to(forced_BtF[:, :, None], shape), best_BtMC], -1)


def _best(
    scores_BtMZ: jax.Array,
    at: Positions,
    of: BlockIndex,
    block: int,
    *,
    count: int,
    low: int,
    back: int,
) -> jax.Array:
    """The blocks of the `count` best scores, [B, t, M, count], among low .. own - back."""
    own_Bt1 = at.positions_BT[..., None] // block
    number_B1Z = of.number_BZ[:, None]
    is_candidate_BtZ = (at.segments_BT[..., None] == of.segments_BZ[:, None]) & (
        at.segments_BT[..., None] > 0
    )
    is_candidate_BtZ &= (low <= number_B1Z) & (number_B1Z <= own_Bt1 - back)
    scores_BtMZ = jnp.where(is_candidate_BtZ[:, :, None], scores_BtMZ, -jnp.inf)
    count_here = min(count, scores_BtMZ.shape[-1])
    best_BtMC, slot_BtMC = jax.lax.top_k(scores_BtMZ, count_here)
    number_BtMC = jax.vmap(lambda number_Z, slot: number_Z[slot])(of.number_BZ, slot_BtMC)
    chosen_BtMC = jnp.where(jnp.isneginf(best_BtMC), -1, number_BtMC)
    missing = [(0, 0)] * 3 + [(0, count - count_here)]
    return jnp.pad(chosen_BtMC, missing, constant_values=-1)


def _in_parts(scores, choose, queries, num_scores: int) -> jax.Array:
    """choose(scores(q, at, ...), at), some queries (q, at, ...) at a time, so that S x S / step
    never is; each has `num_scores`.
    """
    B, T = queries[1].positions_BT.shape
    at_once = CPU_SCORES if device_kind() == "cpu" else SCORES
    t = max(1, min(at_once // (B * num_scores), T))
    parts = -(-T // t)

    def split(x_BT):
        x_BT = jnp.pad(x_BT, [(0, 0), (0, parts * t - T)] + [(0, 0)] * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, parts, t, *x_BT.shape[2:]), 1, 0)

    # Else, in a scan over layers, JAX makes what needs no layer (the masks) ahead of the scan, and
    # for all parts at once: 17 GiB for Llama 3 8B and 1M tokens on 128 devices.
    @jax.checkpoint
    def part(queries):
        return choose(scores(*queries), queries[1])

    queries = jax.lax.stop_gradient(jax.tree.map(split, queries))
    chosen = jnp.moveaxis(jax.lax.map(part, queries), 0, 1)
    # A few numbers a query, of many scores: backward must not choose again.
    return checkpoint_name(chosen.reshape(B, parts * t, *chosen.shape[3:])[:, :T], SAVED)


def _take(p_BKZt: jax.Array, slot_BY: jax.Array) -> jax.Array:
    """[B, K, Y, t]; 0 where there is no such slot."""
    Z = p_BKZt.shape[2]
    found_BKYt = jax.vmap(lambda p_KZt, slot_Y: p_KZt[:, slot_Y])(
        p_BKZt, jnp.clip(slot_BY, 0, Z - 1)
    )
    inside_BY = (slot_BY >= 0) & (slot_BY < Z)
    return jnp.where(inside_BY[:, None, :, None], found_BKYt, 0.0)


def _gather(x_BT: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(x_BT, axes, axis=1, tiled=True) if axes else x_BT
