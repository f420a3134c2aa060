"""The lists behind picked.py: queries in lanes, pairs and keys in order, and the walk down both.

X lanes: a row, a head that chooses, and some of the queries. P pairs of a lane, R of a tile, C
choices of a query; G query heads share them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention import blocks
from model.attention.blocks import FAR
from model.attention.spec import Where

TILE_ROWS = 512  # queries x heads of a tile, at most: what the kernels take for a block
PAIR_FLOATS = 2**24  # of the partial results of one lane: 64 MiB


class Lane(NamedTuple):
    """Where a lane's keys are; int32, [X] or of one lane."""

    row: jax.Array
    kv_head: jax.Array


class Split:
    """How queries [B, T, N, ...] are cut into lanes [X, t, G, ...], and joined again."""

    def __init__(self, q_shape: tuple[int, ...], K: int, chosen_shape: tuple[int, ...]):
        self.B, self.T, N, H = q_shape
        *_, self.M, C = chosen_shape
        self.K, self.G = K, N // self.M
        parts = -(-self.T * C * self.G * H // PAIR_FLOATS)
        self.t = -(-self.T // parts)
        self.parts = -(-self.T // self.t)

    def lanes(self) -> Lane:
        row, head, _ = jnp.indices((self.B, self.M, self.parts), jnp.int32).reshape(3, -1)
        return Lane(row, head * self.K // self.M)

    def slopes(self, slope_N: jax.Array | None) -> jax.Array | None:
        if slope_N is None:
            return None
        slope_BMYG = jnp.broadcast_to(
            slope_N.reshape(self.M, 1, self.G), (self.B, self.M, self.parts, self.G)
        )
        return slope_BMYG.reshape(-1, self.G)

    def queries(self, x_BTN: jax.Array) -> jax.Array:
        return self._split(x_BTN.reshape(*x_BTN.shape[:2], self.M, self.G, *x_BTN.shape[3:]))

    def chosen(self, chosen_BTMC: jax.Array, at: Where) -> tuple[jax.Array, Where]:
        """([X, t, C], where the queries are); those of the padding are of segment 0."""
        shape = *at.positions_BT.shape, self.M
        places = (self._split(jnp.broadcast_to(x_BT[..., None], shape)) for x_BT in at)
        return self._split(chosen_BTMC), Where(*places)

    def join(self, x_XTG: jax.Array) -> jax.Array:
        rest = x_XTG.shape[3:]
        x = x_XTG.reshape(self.B, self.M, self.parts * self.t, self.G, *rest)
        return jnp.moveaxis(x, 1, 2).reshape(self.B, -1, self.M * self.G, *rest)[:, : self.T]

    def _split(self, x_BTM: jax.Array) -> jax.Array:
        short = self.parts * self.t - self.T
        x = jnp.pad(x_BTM, [(0, 0), (0, short)] + [(0, 0)] * (x_BTM.ndim - 2))
        x = jnp.moveaxis(x, 2, 1)
        return x.reshape(self.B * self.M * self.parts, self.t, *x.shape[3:])


class Run(NamedTuple):
    """Tokens or pairs in order of (segment, block); equal ones are a run. int32 [..., S]."""

    segments: jax.Array
    blocks: jax.Array
    end: jax.Array  # where the next run begins

    @staticmethod
    def of(segments: jax.Array, blocks: jax.Array) -> "Run":
        begins = (jnp.diff(segments) != 0) | (jnp.diff(blocks) != 0)
        size = segments.shape[-1]
        next_one = jnp.where(begins, jnp.arange(1, size), size)
        end = jax.lax.cummin(next_one, axis=next_one.ndim - 1, reverse=True)
        last = jnp.full_like(segments[..., :1], size)
        return Run(segments, blocks, jnp.concatenate([end.astype(jnp.int32), last], -1))


class Order:
    """Keys in order of (segment, position), with a block of padding behind them."""

    def __init__(self, at: Where, block: int):
        self.padding = block
        segments_BS, positions_BS = at.segments_BT, at.positions_BT
        here_BS = jax.lax.broadcasted_iota(jnp.int32, segments_BS.shape, 1)
        segments_BS, positions_BS, self.order_BS = jax.lax.sort(
            (segments_BS, positions_BS, here_BS), num_keys=2
        )
        self.at = Where(*(jnp.pad(x, ((0, 0), (0, block))) for x in (positions_BS, segments_BS)))
        self.runs = Run.of(segments_BS, positions_BS // block)

    def sort(self, x_BSKH: jax.Array) -> jax.Array:
        """[B, K, S + block, H]."""
        x_BSKH = jnp.take_along_axis(x_BSKH, self.order_BS[..., None, None], axis=1)
        return jnp.pad(jnp.moveaxis(x_BSKH, 2, 1), ((0, 0), (0, 0), (0, self.padding), (0, 0)))

    def unsort(self, x_BKSH: jax.Array) -> jax.Array:
        """[B, S, K, H] from what `sort` gives."""
        back_BS = jnp.argsort(self.order_BS, axis=1)
        x_BSKH = jnp.moveaxis(x_BKSH, 1, 2)
        return jnp.take_along_axis(x_BSKH, back_BS[..., None, None], axis=1)

    def of_row(self, row: jax.Array) -> tuple[Run, Where]:
        return jax.tree.map(lambda x: x[row], (self.runs, self.at))


class Pairs(NamedTuple):
    """Pairs (query, chosen block) of one lane, in order of (segment, block)."""

    runs: Run
    index_P: jax.Array  # query x C + choice
    at: Where  # of the lane's queries, [T]

    @property
    def size(self) -> int:
        return self.index_P.size

    @property
    def choices(self) -> int:
        return self.size // self.at.positions_BT.size

    @staticmethod
    def of(chosen_TC: jax.Array, at: Where, block: int) -> "Pairs":
        # What was not chosen comes after all keys, and so is never met.
        is_chosen_TC = (chosen_TC >= 0) & (at.segments_BT > 0)[:, None]
        segments_TC = jnp.where(is_chosen_TC, at.segments_BT[:, None], FAR)
        index_P = jnp.arange(chosen_TC.size, dtype=jnp.int32)
        segments_P, blocks_P, index_P = jax.lax.sort(
            (segments_TC.ravel(), chosen_TC.ravel(), blocks.vary(index_P, chosen_TC)), num_keys=2
        )
        return Pairs(Run.of(segments_P, blocks_P), index_P, at)

    @property
    def place_TC(self) -> jax.Array:
        """Where each query's pairs are in the order."""
        here_P = jnp.arange(self.size, dtype=jnp.int32)
        place_P = here_P.at[self.index_P].set(here_P, unique_indices=True)
        return place_P.reshape(-1, self.choices)

    def sum(self, of) -> jax.Array:
        """The sum over a query's pairs of of(their places [T]); no [T, C, ...] is made."""
        place_TC = self.place_TC

        def add(c, total):
            return total + of(place_TC[:, c])

        return jax.lax.fori_loop(1, self.choices, add, of(place_TC[:, 0]))


class Tile:
    """The tiles of one lane: `rows` pairs from p on, and the keys of their block from u on."""

    def __init__(self, block: int, pairs: Pairs, keys: tuple[Run, Where], G: int):
        self.block, self.pairs, (self.runs, self.at) = block, pairs, keys
        a_block = pairs.size * block // self.runs.end.size  # pairs of a block, if all are equal
        most = max(TILE_ROWS // G, 1)
        self.rows = min(most, max(16, 1 << max(a_block - 1, 0).bit_length()))
        self.index = jnp.pad(pairs.index_P, (0, self.rows))

    def walk(self, see, carry):
        """see(p, u, carry) for each tile, in order."""

        def unfinished(state):
            p, u, _ = state
            return (p < self.pairs.size) & (u < self.runs.end.size)

        def step(state):
            p, u, carry = state
            carry = see(p, u, carry)
            p = jnp.minimum(p + self.rows, self.pairs.runs.end[p])
            return *self._meet(p, u), carry

        zero = self.pairs.index_P[0] * 0  # varies over the mesh as the pairs do
        return jax.lax.while_loop(unfinished, step, (*self._meet(zero, zero), carry))[2]

    def _meet(self, p: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next p and u of one block; one of the lists may end before there is any."""
        pairs, keys = self.pairs.runs, self.runs

        def apart(state):
            p, u = state
            same = (pairs.segments[p] == keys.segments[u]) & (pairs.blocks[p] == keys.blocks[u])
            return (p < self.pairs.size) & (u < keys.end.size) & ~same

        def step(state):
            p, u = state
            of_pair, of_key = (
                (pairs.segments[p], pairs.blocks[p]),
                (keys.segments[u], keys.blocks[u]),
            )
            key_is_behind = (of_key[0] < of_pair[0]) | (
                (of_key[0] == of_pair[0]) & (of_key[1] < of_pair[1])
            )
            return jnp.where(key_is_behind, p, pairs.end[p]), jnp.where(
                key_is_behind, keys.end[u], u
            )

        return jax.lax.while_loop(apart, step, (p, u))

    def queries(self, p, u, *xs_TG) -> tuple[tuple[jax.Array, ...], tuple[Where, Where]]:
        """Each of `xs` as [1, R, G, ...], and (where the queries are, where the keys are)."""
        index_R = jax.lax.dynamic_slice_in_dim(self.index, p, self.rows)
        t_R = index_R // self.pairs.choices
        inside_R = p + jnp.arange(self.rows) < self.pairs.runs.end[p]
        positions_R, segments_R = (x_T[t_R] for x_T in self.pairs.at)
        q_at = Where(positions_R, jnp.where(inside_R, segments_R, 0))
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=u, slice_size=self.block)
        positions_C, segments_C = (cut(x) for x in self.at)
        inside_C = u + jnp.arange(self.block) < self.runs.end[u]
        k_at = Where(positions_C, jnp.where(inside_C, segments_C, 0))
        at = jax.tree.map(lambda x: x[None], (q_at, k_at))
        return tuple(x_TG[t_R][None] for x_TG in xs_TG), at

    def keys(self, u: jax.Array, *xs_SH: jax.Array) -> list[jax.Array]:
        """The block of each of `xs`, [1, C, 1, H]."""
        cut = (jax.lax.dynamic_slice_in_dim(x_SH, u, self.block) for x_SH in xs_SH)
        return [x_CH[None, :, None] for x_CH in cut]

    def store(self, x_P: jax.Array, new_R: jax.Array, p: jax.Array) -> jax.Array:
        """The rows behind the tile's block are written again by the next tile, or see nothing."""
        return jax.lax.dynamic_update_slice_in_dim(x_P, new_R, p, 0)

    def add(self, x_SH: jax.Array, new_CH: jax.Array, u: jax.Array) -> jax.Array:
        old_CH = jax.lax.dynamic_slice_in_dim(x_SH, u, self.block)
        return jax.lax.dynamic_update_slice_in_dim(x_SH, old_CH + new_CH, u, 0)
