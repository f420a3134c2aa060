"""The lists behind picked.py: pairs and keys in order of (segment, block), and the walk down both.

X lanes: a row and a head that chooses. P pairs of a lane, R of a tile; the G query heads of a lane
share its choices.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention import blocks
from model.attention.mask import FAR, Positions

TILE_ROWS = 512  # queries x heads of a tile, at most: what the kernels take for a block


class SortedRuns(NamedTuple):
    """Pairs or keys in order of (segment, block); int32 [..., S]."""

    segments: jax.Array
    blocks: jax.Array
    end: jax.Array  # where the next run of equal ones begins

    @staticmethod
    def of(segments: jax.Array, blocks: jax.Array) -> "SortedRuns":
        begins = (jnp.diff(segments) != 0) | (jnp.diff(blocks) != 0)
        size = segments.shape[-1]
        next_one = jnp.where(begins, jnp.arange(1, size, dtype=jnp.int32), size)
        end = jax.lax.cummin(next_one, axis=next_one.ndim - 1, reverse=True)
        last = jnp.full_like(segments[..., :1], size)
        return SortedRuns(segments, blocks, jnp.concatenate([end, last], -1))

    def first(self, segment: jax.Array, block: jax.Array) -> jax.Array:
        """The first place, of those of one lane, that is not before (segment, block), for each."""
        size = self.end.size

        def step(i, low):
            probe = low + (1 << size.bit_length() - 1 - i)
            at = jnp.minimum(probe, size) - 1
            is_before = (self.segments[at] < segment) | (
                (self.segments[at] == segment) & (self.blocks[at] < block)
            )
            return jnp.where((probe <= size) & is_before, probe, low)

        return jax.lax.fori_loop(0, size.bit_length(), step, blocks.vary(segment * 0, self.end))


class RoutingPairs(NamedTuple):
    """Pairs (query, chosen block) of each lane, in order; int32 [X, P], or [P] of one lane."""

    runs: SortedRuns
    queries: jax.Array

    @staticmethod
    def of(chosen_BTMC: jax.Array, at: Positions) -> "RoutingPairs":
        """Builds the pairs from the blocks that each query chose, -1 for none, and its position."""
        B, T, M, C = chosen_BTMC.shape
        # What was not chosen comes after all keys, and so is never met.
        is_chosen_BTMC = (chosen_BTMC >= 0) & (at.segments_BT > 0)[..., None, None]
        segments_BTMC = jnp.where(is_chosen_BTMC, at.segments_BT[..., None, None], FAR)
        queries_BTMC = jax.lax.broadcasted_iota(jnp.int32, chosen_BTMC.shape, 1)
        queries_BTMC = blocks.vary(queries_BTMC, chosen_BTMC)
        in_lanes = (
            jnp.moveaxis(x, 2, 1).reshape(B * M, T * C)
            for x in (segments_BTMC, chosen_BTMC, queries_BTMC)
        )
        segments, numbers, queries = jax.lax.sort(tuple(in_lanes), num_keys=2)
        return RoutingPairs(SortedRuns.of(segments, numbers), queries)

    def alike(self, block: int, length: int) -> int:
        """Pairs of a block, in a row of `length`, if all blocks have the same number."""
        return -(-self.queries.shape[-1] * block // length)

    def tile(self, block: int, length: int, G: int, least: int) -> int:
        """Pairs of a tile: as many, within TILE_ROWS."""
        power = 1 << (self.alike(block, length) - 1).bit_length()
        return min(max(TILE_ROWS // G, 1), max(least, power))


class Keys:
    """Keys in order of (segment, position), with padding behind them."""

    def __init__(self, at: Positions, block: int, padding: int):
        self.padding = padding
        here_BS = jax.lax.broadcasted_iota(jnp.int32, at.segments_BT.shape, 1)
        segments_BS, positions_BS, self.order_BS = jax.lax.sort(
            (at.segments_BT, at.positions_BT, here_BS), num_keys=2
        )
        self.at = Positions(
            *(jnp.pad(x, ((0, 0), (0, padding))) for x in (positions_BS, segments_BS))
        )
        self.runs = SortedRuns.of(segments_BS, positions_BS // block)

    def sort(self, x_BSKH: jax.Array) -> jax.Array:
        """[B, K, S + padding, H]."""
        x_BSKH = jnp.take_along_axis(x_BSKH, self.order_BS[..., None, None], axis=1)
        return jnp.pad(jnp.moveaxis(x_BSKH, 2, 1), ((0, 0), (0, 0), (0, self.padding), (0, 0)))

    def unsort(self, x_BKSH: jax.Array) -> jax.Array:
        """[B, S, K, H] from what `sort` gives."""
        back_BS = jnp.argsort(self.order_BS, axis=1)
        x_BSKH = jnp.moveaxis(x_BKSH, 1, 2)
        return jnp.take_along_axis(x_BSKH, back_BS[..., None, None], axis=1)

    def of_row(self, row: jax.Array) -> tuple[SortedRuns, Positions]:
        return jax.tree.map(lambda x: x[row], (self.runs, self.at))


class Tile(NamedTuple):
    """Pairs of one block, and its keys."""

    queries_R: jax.Array  # in the lane
    inside_R: jax.Array  # bool: pairs of the block; others fill the tile
    q_at: Positions  # [1, R]
    k_at: Positions  # [1, C], of segment 0 where keys of another block fill it
    u: jax.Array  # where the keys begin

    def rows(self, x_TG: jax.Array) -> jax.Array:
        """[1, R, G, ...] of a lane's queries."""
        return x_TG[self.queries_R][None]

    def block(self, x_SH: jax.Array) -> jax.Array:
        """[1, C, 1, H] of a lane's keys."""
        size = self.k_at.positions_BT.size
        return jax.lax.dynamic_slice_in_dim(x_SH, self.u, size)[None, :, None]

    def put(self, x_TG: jax.Array, new_1RG: jax.Array) -> jax.Array:
        return x_TG.at[self._places(x_TG)].set(new_1RG[0], mode="drop", unique_indices=True)

    def add(self, x_TG: jax.Array, new_1RG: jax.Array) -> jax.Array:
        return x_TG.at[self._places(x_TG)].add(new_1RG[0], mode="drop", unique_indices=True)

    def add_block(self, x_SH: jax.Array, new_1C1H: jax.Array) -> jax.Array:
        new_CH = new_1C1H[0, :, 0]
        old_CH = jax.lax.dynamic_slice_in_dim(x_SH, self.u, len(new_CH))
        return jax.lax.dynamic_update_slice_in_dim(x_SH, old_CH + new_CH, self.u, 0)

    def _places(self, x_TG: jax.Array) -> jax.Array:
        """Returns the rows to write to: all differ, as a query chooses a block once."""
        beyond_R = len(x_TG) + jnp.arange(self.queries_R.size, dtype=jnp.int32)
        return jnp.where(self.inside_R, self.queries_R, beyond_R)


def walk(
    pairs: RoutingPairs,
    q_at: Positions,
    keys: tuple[SortedRuns, Positions],
    block: int,
    size: int,
    see,
    carry,
):
    """see(tile, carry) for each tile of `size` pairs of one lane; `q_at` [T]: where queries are."""
    runs, k_at = keys

    def tile(p, u) -> Tile:
        start = jnp.minimum(p, pairs.queries.size - size)  # the last one begins earlier
        place_R = start + jnp.arange(size, dtype=jnp.int32)
        inside_R = (place_R >= p) & (place_R < pairs.runs.end[p])
        queries_R = jax.lax.dynamic_slice_in_dim(pairs.queries, start, size)
        q_at_R = jax.tree.map(lambda x_T: x_T[queries_R], q_at)
        q_at_R = q_at_R._replace(segments_BT=q_at_R.segments_BT * inside_R)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=u, slice_size=block)
        k_at_C = jax.tree.map(cut, k_at)
        of_block_C = u + jnp.arange(block, dtype=jnp.int32) < runs.end[u]
        k_at_C = k_at_C._replace(segments_BT=k_at_C.segments_BT * of_block_C)
        at = jax.tree.map(lambda x: x[None], (q_at_R, k_at_C))
        return Tile(queries_R, inside_R, *at, u)

    begin_S = pairs.runs.first(runs.segments, runs.blocks)
    end_S = pairs.runs.first(runs.segments, runs.blocks + 1)

    def of_block(state):
        u, carry = state

        def step(state):
            p, carry = state
            return p + size, see(tile(p, u), carry)

        pairs_of_u = begin_S[u], carry
        _, carry = jax.lax.while_loop(lambda state: state[0] < end_S[u], step, pairs_of_u)
        return runs.end[u], carry

    start = begin_S[0] * 0, carry  # varies over the mesh as the pairs and the keys do
    return jax.lax.while_loop(lambda state: state[0] < runs.end.size, of_block, start)[1]
