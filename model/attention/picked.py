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
from model.attention.blocks import Pair, Part
from model.attention.pairs import Order, Pairs, Split, Tile
from model.attention.spec import Heads, Mask, Where


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
        split = Split(q_BTNH.shape, k_BSKH.shape[2], heads.chosen_BTMC.shape)
        order = Order(k_at, self.block)
        keys = order.sort(k_BSKH), order.sort(v_BSKH)
        fresh = functools.partial(blocks.fresh, (q_BTNH, k_BSKH, v_BSKH, heads.chosen_BTMC, q_at))

        def lane(args):
            lane, slope_G, q_TGH, *chosen = args
            pairs = Pairs.of(*chosen, self.block)
            k_SH, v_SH = (x_BKSH[lane.row, lane.kv_head] for x_BKSH in keys)
            tile = Tile(self.block, pairs, order.of_row(lane.row), q_TGH.shape[1])

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
        split = Split(q_BTNH.shape, k_BSKH.shape[2], heads.chosen_BTMC.shape)
        order = Order(k_at, self.block)
        keys = order.sort(k_BSKH), order.sort(v_BSKH)
        fresh = functools.partial(
            blocks.fresh, (q_BTNH, k_BSKH, v_BSKH, heads.chosen_BTMC, q_at, done[0])
        )

        def lane(dkv_BKSH, args):
            lane, slope_G, (q_TGH, *done_TG), *chosen = args
            pairs = Pairs.of(*chosen, self.block)
            k_SH, v_SH = (x_BKSH[lane.row, lane.kv_head] for x_BKSH in keys)
            tile = Tile(self.block, pairs, order.of_row(lane.row), q_TGH.shape[1])

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
