"""HOW a query meets the key blocks that were chosen for it (select.py), and no others.

Pairs (query, chosen block) and the keys are both put in order of (document, block), so that one
walk down the two lists finds every tile: some queries that chose a block, and that block.

    pairs   (query 7, block 2) (query 9, block 2) (query 3, block 5) ...
    keys    2 2 2 2 3 3 3 3 5 5 5 5 ...          block 3 was chosen by none: passed over

Work and memory grow with the pairs, never with queries x keys. Each tile is done by a kernel of
the house under its own mask. The tokens may stand in any order, and a shard may hold parts of a
block: what it lacks is merged by log-sum-exp, as other strategies do.

M heads choose for themselves (K <= M <= N); the G = N / M query heads of one share its C blocks.
X lanes: a row, a head that chooses, and some of the queries. P pairs of a lane, R of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention import blocks
from model.attention.blocks import FAR, Pair, Part
from model.attention.spec import Heads, Mask, Where

TILE_ROWS = 512  # queries x heads of a tile, at most: what the kernels take for a block
PAIR_FLOATS = 2**24  # of the partial results of one lane: 64 MiB


class Picked(NamedTuple):
    """The forward and backward of `pair`, each query seeing only blocks that it chose.

    `heads.chosen_BTMC` holds them: int32 numbers of blocks of `block` tokens, counted in the
    query's own document; no block twice, and -1 is none.
    """

    pair: Pair
    block: int

    @property
    def mask(self) -> Mask:
        return self.pair.mask

    def forward(self, q_BTNH, k_BSKH, v_BSKH, heads: Heads, q_at: Where, k_at: Where) -> Part:
        """(out [B, T, N, H], lse [B, T, N]) float32, as of `Pair`."""
        split = _Split(q_BTNH.shape, k_BSKH.shape[2], heads.chosen_BTMC.shape)
        order = _Order(k_at, self.block)
        keys = order.sort(k_BSKH), order.sort(v_BSKH)
        fresh = functools.partial(blocks.fresh, (q_BTNH, k_BSKH, v_BSKH, heads.chosen_BTMC, q_at))

        def lane(args):
            lane, slope_G, q_TGH, *chosen = args
            pairs = _Pairs.of(*chosen, self.block)
            k_SH, v_SH = (x_BKSH[lane.row, lane.kv_head] for x_BKSH in keys)
            tile = _Tile(self.block, pairs, order.of_row(lane.row), q_TGH.shape[1])

            def see(p, u, parts):
                kv = tile.keys(u, k_SH, v_SH)
                (q_RGH,), at = tile.queries(p, u, q_TGH)
                part = self.pair.forward(q_RGH, *kv, Heads(slope_N=slope_G), *at)
                return [tile.store(x, new[0], p) for x, new in zip(parts, part, strict=True)]

            T, G, H = q_TGH.shape
            rows = pairs.size + tile.rows, G
            parts = tile.walk(see, [fresh((*rows, H), 0.0), fresh(rows, -jnp.inf)])
            out_PGH, lse_PG = parts
            lse_TG = jax.nn.logsumexp(lse_PG[pairs.place_TC], axis=1)
            # A query that saw nothing has lse -inf: keep -inf - -inf out.
            safe_TG = jnp.where(jnp.isneginf(lse_TG), 0.0, lse_TG)

            def weighed(place_T):
                return out_PGH[place_T] * jnp.exp(lse_PG[place_T] - safe_TG)[..., None]

            return pairs.sum(weighed), lse_TG

        lanes = (
            split.lanes(),
            split.slopes(heads.slope_N),
            split.queries(q_BTNH),
            *split.chosen(heads.chosen_BTMC, q_at),
        )
        return tuple(split.join(x) for x in jax.lax.map(lane, lanes))

    def backward(
        self, q_BTNH, k_BSKH, v_BSKH, heads: Heads, q_at: Where, k_at: Where, *done: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(dq, dk, dv) float32, as of `Pair`; `done` is (dout, lse, delta) of all keys."""
        split = _Split(q_BTNH.shape, k_BSKH.shape[2], heads.chosen_BTMC.shape)
        order = _Order(k_at, self.block)
        keys = order.sort(k_BSKH), order.sort(v_BSKH)
        fresh = functools.partial(
            blocks.fresh, (q_BTNH, k_BSKH, v_BSKH, heads.chosen_BTMC, q_at, done[0])
        )

        def lane(dkv_BKSH, args):
            lane, slope_G, (q_TGH, *done_TG), *chosen = args
            pairs = _Pairs.of(*chosen, self.block)
            k_SH, v_SH = (x_BKSH[lane.row, lane.kv_head] for x_BKSH in keys)
            tile = _Tile(self.block, pairs, order.of_row(lane.row), q_TGH.shape[1])

            def see(p, u, gradients):
                dq_PGH, dk_SH, dv_SH = gradients
                kv = tile.keys(u, k_SH, v_SH)
                (q_RGH, *done_RG), at = tile.queries(p, u, q_TGH, *done_TG)
                dq_1RGH, *dkv_1S1H = self.pair.backward(
                    q_RGH, *kv, Heads(slope_N=slope_G), *at, *done_RG
                )
                dkv_SH = (
                    tile.add(x, new[0, :, 0], u)
                    for x, new in zip((dk_SH, dv_SH), dkv_1S1H, strict=True)
                )
                return [tile.store(dq_PGH, dq_1RGH[0], p), *dkv_SH]

            T, G, H = q_TGH.shape
            start = [fresh((pairs.size + tile.rows, G, H), 0.0)]
            start += [fresh(k_SH.shape, 0.0), fresh(v_SH.shape, 0.0)]
            dq_PGH, *dkv_SH = tile.walk(see, start)
            dkv_BKSH = [
                x.at[lane.row, lane.kv_head].add(new)
                for x, new in zip(dkv_BKSH, dkv_SH, strict=True)
            ]
            return dkv_BKSH, pairs.sum(lambda place_T: dq_PGH[place_T])

        lanes = (
            split.lanes(),
            split.slopes(heads.slope_N),
            [split.queries(x) for x in (q_BTNH, *done)],
            *split.chosen(heads.chosen_BTMC, q_at),
        )
        zero = [fresh(x.shape, 0.0) for x in keys]
        dkv_BKSH, dq_XTGH = jax.lax.scan(lane, zero, lanes)
        return split.join(dq_XTGH), *(order.unsort(x) for x in dkv_BKSH)


class _Lane(NamedTuple):
    """Where a lane's keys are; int32, [X] or of one lane."""

    row: jax.Array
    kv_head: jax.Array


class _Split:
    """How queries [B, T, N, ...] are cut into lanes [X, t, G, ...], and joined again."""

    def __init__(self, q_shape: tuple[int, ...], K: int, chosen_shape: tuple[int, ...]):
        self.B, self.T, N, H = q_shape
        *_, self.M, C = chosen_shape
        self.K, self.G = K, N // self.M
        parts = -(-self.T * C * self.G * H // PAIR_FLOATS)
        self.t = -(-self.T // parts)
        self.parts = -(-self.T // self.t)

    def lanes(self) -> _Lane:
        row, head, _ = jnp.indices((self.B, self.M, self.parts), jnp.int32).reshape(3, -1)
        return _Lane(row, head * self.K // self.M)

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


class _Run(NamedTuple):
    """Tokens or pairs in order of (segment, block); equal ones are a run. int32 [..., S]."""

    segments: jax.Array
    blocks: jax.Array
    end: jax.Array  # where the next run begins

    @staticmethod
    def of(segments: jax.Array, blocks: jax.Array) -> "_Run":
        begins = (jnp.diff(segments) != 0) | (jnp.diff(blocks) != 0)
        size = segments.shape[-1]
        next_one = jnp.where(begins, jnp.arange(1, size), size)
        end = jax.lax.cummin(next_one, axis=next_one.ndim - 1, reverse=True)
        last = jnp.full_like(segments[..., :1], size)
        return _Run(segments, blocks, jnp.concatenate([end.astype(jnp.int32), last], -1))


class _Order:
    """Keys in order of (segment, position), with a block of padding behind them."""

    def __init__(self, at: Where, block: int):
        self.padding = block
        segments_BS, positions_BS = at.segments_BT, at.positions_BT
        here_BS = jax.lax.broadcasted_iota(jnp.int32, segments_BS.shape, 1)
        segments_BS, positions_BS, self.order_BS = jax.lax.sort(
            (segments_BS, positions_BS, here_BS), num_keys=2
        )
        self.at = Where(*(jnp.pad(x, ((0, 0), (0, block))) for x in (positions_BS, segments_BS)))
        self.runs = _Run.of(segments_BS, positions_BS // block)

    def sort(self, x_BSKH: jax.Array) -> jax.Array:
        """[B, K, S + block, H]."""
        x_BSKH = jnp.take_along_axis(x_BSKH, self.order_BS[..., None, None], axis=1)
        return jnp.pad(jnp.moveaxis(x_BSKH, 2, 1), ((0, 0), (0, 0), (0, self.padding), (0, 0)))

    def unsort(self, x_BKSH: jax.Array) -> jax.Array:
        """[B, S, K, H] from what `sort` gives."""
        back_BS = jnp.argsort(self.order_BS, axis=1)
        x_BSKH = jnp.moveaxis(x_BKSH, 1, 2)
        return jnp.take_along_axis(x_BSKH, back_BS[..., None, None], axis=1)

    def of_row(self, row: jax.Array) -> tuple[_Run, Where]:
        return jax.tree.map(lambda x: x[row], (self.runs, self.at))


class _Pairs(NamedTuple):
    """Pairs (query, chosen block) of one lane, in order of (segment, block)."""

    runs: _Run
    index_P: jax.Array  # query x C + choice
    at: Where  # of the lane's queries, [T]

    @property
    def size(self) -> int:
        return self.index_P.size

    @property
    def choices(self) -> int:
        return self.size // self.at.positions_BT.size

    @staticmethod
    def of(chosen_TC: jax.Array, at: Where, block: int) -> "_Pairs":
        # What was not chosen comes after all keys, and so is never met.
        is_chosen_TC = (chosen_TC >= 0) & (at.segments_BT > 0)[:, None]
        segments_TC = jnp.where(is_chosen_TC, at.segments_BT[:, None], FAR)
        index_P = jnp.arange(chosen_TC.size, dtype=jnp.int32)
        segments_P, blocks_P, index_P = jax.lax.sort(
            (segments_TC.ravel(), chosen_TC.ravel(), blocks.vary(index_P, chosen_TC)), num_keys=2
        )
        return _Pairs(_Run.of(segments_P, blocks_P), index_P, at)

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


class _Tile:
    """The tiles of one lane: `rows` pairs from p on, and the keys of their block from u on."""

    def __init__(self, block: int, pairs: _Pairs, keys: tuple[_Run, Where], G: int):
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
            of_pair, of_key = (pairs.segments[p], pairs.blocks[p]), (keys.segments[u], keys.blocks[u])
            key_is_behind = (of_key[0] < of_pair[0]) | (
                (of_key[0] == of_pair[0]) & (of_key[1] < of_pair[1])
            )
            return jnp.where(key_is_behind, p, pairs.end[p]), jnp.where(key_is_behind, keys.end[u], u)

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
        """Rows beyond the tile's own block are written again by the next tile, which begins there."""
        return jax.lax.dynamic_update_slice_in_dim(x_P, new_R, p, 0)

    def add(self, x_SH: jax.Array, new_CH: jax.Array, u: jax.Array) -> jax.Array:
        old_CH = jax.lax.dynamic_slice_in_dim(x_SH, u, self.block)
        return jax.lax.dynamic_update_slice_in_dim(x_SH, old_CH + new_CH, u, 0)
