"""The lists that tell the kernels of picked_kernel.py what to do, made from data by XLA.

    carry = each_part(pairs, keys, starts(keys), size=2048, tile=32, see, carry)

Only pairs whose block has keys here are gone through: a shard of a ring meets few. Blocks of keys
are looked up RUNS at a time, and the pairs that chose them, block by block, are cut in parts.

Z blocks of keys, P pairs of a part, Y tiles of these, W steps at most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention.block_topk.pairs import RoutingPairs, SortedRuns

RUNS = 256  # blocks of keys at a time


class TileSchedule(NamedTuple):
    """The work of each step, W + 1 entries; step w has the pairs begin_W[w] .. begin_W[w + 1].

    A step begins with each tile of pairs, and where those of a block end. Pairs that fill the last
    tile have no keys; their step stays at those before it.
    """

    count: jax.Array
    begin_W: jax.Array  # P from `count` on
    low_W: jax.Array  # first key; -1 from `count` on
    high_W: jax.Array  # where the keys end


class Met(NamedTuple):
    """Blocks of keys and the pairs that chose them, counted one block after the other; int32."""

    first_Z: jax.Array  # place of its first pair in the lane
    begin_Z: jax.Array  # pairs of the blocks before it
    end_Z: jax.Array  # and its own: none, if nobody chose it
    low_Z: jax.Array  # its keys
    high_Z: jax.Array

    @staticmethod
    def of(pairs: SortedRuns, keys: SortedRuns, start_Z: jax.Array) -> "Met":
        """Builds the schedule of the blocks that begin with these keys; S is no block."""
        low_Z = jnp.minimum(start_Z, keys.end.size - 1)
        segment_Z, block_Z = keys.segments[low_Z], keys.blocks[low_Z]
        first_Z = jnp.minimum(pairs.first(segment_Z, block_Z), pairs.end.size - 1)
        is_met_Z = (pairs.segments[first_Z] == segment_Z) & (pairs.blocks[first_Z] == block_Z)
        is_met_Z &= start_Z < keys.end.size
        count_Z = jnp.where(is_met_Z, pairs.end[first_Z] - first_Z, 0)
        end_Z = jnp.cumsum(count_Z)
        return Met(first_Z, end_Z - count_Z, end_Z, low_Z, keys.end[low_Z])

    def places(self, here_P: jax.Array) -> jax.Array:
        """Returns the places of the pairs with these numbers in the lane; both orders are one."""
        is_before_PZ = self.begin_Z[None] <= here_P[:, None]
        return here_P + jnp.where(is_before_PZ, (self.first_Z - self.begin_Z)[None], 0).max(1)

    def steps(self, start: jax.Array, size: int, tile: int) -> TileSchedule:
        """Returns the steps of the pairs start .. start + size; `tile` divides both."""
        tile_Y = start + tile * jnp.arange(size // tile, dtype=jnp.int32)
        is_met_Z = self.begin_Z < self.end_Z
        is_step_Z = is_met_Z & (start < self.end_Z) & (self.end_Z < start + size)
        is_step_Z &= self.end_Z % tile != 0
        begin_W = jnp.concatenate([tile_Y, jnp.where(is_step_Z, self.end_Z, start + size)])
        begin_W = jnp.sort(begin_W)
        is_before_WZ = is_met_Z[None] & (self.begin_Z[None] <= begin_W[:, None])
        is_inside_WZ = is_before_WZ & (begin_W[:, None] < self.end_Z[None])
        low_W = jnp.where(is_before_WZ, self.low_Z[None], 0).max(1)
        high_W = jnp.where(is_inside_WZ, self.high_Z[None], 0).max(1)
        lists = begin_W - start, jnp.where(begin_W < start + size, low_W, -1), high_W
        ends = size, -1, 0
        lists = (
            jnp.pad(x, (0, 1), constant_values=end) for x, end in zip(lists, ends, strict=True)
        )
        begin_W, low_W, high_W = lists
        return TileSchedule((begin_W < size).sum(), begin_W, low_W, jnp.maximum(high_W, low_W))


def starts(keys: SortedRuns) -> jax.Array:
    """Returns the starts of the blocks of keys, in order, then S; int32 as the runs, [..., S]."""
    S = keys.end.shape[-1]
    here = jax.lax.broadcasted_iota(jnp.int32, keys.end.shape, keys.end.ndim - 1)
    before = jnp.roll(keys.end, 1, axis=-1)  # the last key's end is S, and so no start
    return jnp.sort(jnp.where((here == 0) | (before == here), here, S), axis=-1)


def each_part(
    pairs: RoutingPairs,
    keys: SortedRuns,
    start_S: jax.Array,
    size: int,
    tile: int,
    see,
    carry: jax.Array,
):
    """see(carry, queries_P, steps) for each part of the pairs of one lane that meet keys."""
    S, P = keys.end.size, pairs.queries.size
    Z = min(RUNS, S)
    start_S = jnp.pad(start_S, (0, -S % Z), constant_values=S)

    def look_up(i, carry):
        met = Met.of(pairs.runs, keys, jax.lax.dynamic_slice_in_dim(start_S, i * Z, Z))

        def part(j, carry):
            places_P = met.places(j * size + jnp.arange(size, dtype=jnp.int32))
            queries_P = pairs.queries[jnp.minimum(places_P, P - 1)]
            return see(carry, queries_P, met.steps(j * size, size, tile))

        return jax.lax.fori_loop(0, -(-met.end_Z[-1] // size), part, carry)

    num_blocks = (start_S < S).sum(dtype=jnp.int32)
    return jax.lax.fori_loop(0, -(-num_blocks // Z), look_up, carry)
