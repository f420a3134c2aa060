"""HOW a query meets the key blocks that were chosen for it (select.py), and no others.

Pairs (query, chosen block) and the keys are both put in order of (document, block), so that one
walk down the two lists finds every tile: some queries that chose a block, and that block.

    pairs   (query 7, block 2) (query 9, block 2) (query 3, block 5) ...
    keys    2 2 2 2 3 3 3 3 5 5 5 5 ...          block 3 was chosen by none: passed over

Work and memory grow with the pairs, never with queries x keys. Each tile is done by a kernel of
the house under its own mask. The tokens may stand in any order, and a shard may hold parts of a
block: what it lacks is merged by log-sum-exp, as other strategies do.

M heads choose for themselves (K <= M <= N); the G = N / M query heads of one share its C blocks.
A lane (lanes.py) is a row and a head that chooses: X of them. A tile has R pairs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention import blocks
from model.attention.block_topk.lanes import Lanes
from model.attention.block_topk.pairs import Keys, walk
from model.attention.blocks import MaskedKernel, PartialSoftmax
from model.attention.mask import Mask, Positions
from model.attention.spec import Heads


class GatheredBlocks(NamedTuple):
    """The forward and backward of `pair`, each query seeing only blocks that it chose.

    `heads.chosen` are their `RoutingPairs`: sorted before the strategy, once for all its hops. A
    query chooses a block of `block` tokens of its own document at most once.
    """

    pair: MaskedKernel
    block: int
    length: int  # of whole rows

    @property
    def mask(self) -> Mask:
        return self.pair.mask

    def forward(
        self, q_BTNH, k_BSKH, v_BSKH, heads: Heads, q_at: Positions, k_at: Positions
    ) -> PartialSoftmax:
        """(out [B, T, N, H], lse [B, T, N]) float32, as of `MaskedKernel`."""
        lanes = Lanes(q_BTNH, k_BSKH, heads.chosen)
        keys = Keys(k_at, self.block, padding=self.block)
        kv_BKSH = keys.sort(k_BSKH), keys.sort(v_BSKH)
        fresh = functools.partial(blocks.fresh, (q_BTNH, k_BSKH, v_BSKH, heads.chosen, q_at))

        def lane(row, kv_head, pairs, slope_G, q_TGH):
            kv_SH = [x[row, kv_head] for x in kv_BKSH]

            def see(tile, part):
                kv = (tile.block(x_SH) for x_SH in kv_SH)
                new = self.pair.forward(
                    tile.rows(q_TGH), *kv, Heads(slope_N=slope_G), tile.q_at, tile.k_at
                )
                old = tuple(tile.rows(x) for x in part)
                return [
                    tile.put(x, x_1RG)
                    for x, x_1RG in zip(part, blocks.merge(old, new), strict=True)
                ]

            nothing = [fresh(q_TGH.shape, 0.0), fresh(q_TGH.shape[:2], -jnp.inf)]
            return self._walk(pairs, q_at, keys, row, lanes.G, see, nothing)

        return lanes.map(lane, heads.slope_N, q_BTNH)

    def backward(
        self,
        q_BTNH,
        k_BSKH,
        v_BSKH,
        heads: Heads,
        q_at: Positions,
        k_at: Positions,
        *done: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(dq, dk, dv) float32, as of `MaskedKernel`; `done` is (dout, lse, delta) of all keys."""
        lanes = Lanes(q_BTNH, k_BSKH, heads.chosen)
        keys = Keys(k_at, self.block, padding=self.block)
        kv_BKSH = keys.sort(k_BSKH), keys.sort(v_BSKH)
        fresh = functools.partial(
            blocks.fresh, (q_BTNH, k_BSKH, v_BSKH, heads.chosen, q_at, done[0])
        )

        def lane(dkv_BKSH, args):
            row, kv_head, pairs, slope_G, q_TGH, *done_TG = args
            kv_SH = [x[row, kv_head] for x in kv_BKSH]

            def see(tile, gradients):
                dq_TGH, *dkv_SH = gradients
                kv = (tile.block(x_SH) for x_SH in kv_SH)
                at = tile.q_at, tile.k_at
                done_1RG = (tile.rows(x) for x in done_TG)
                dq_1RGH, *dkv_1C1H = self.pair.backward(
                    tile.rows(q_TGH), *kv, Heads(slope_N=slope_G), *at, *done_1RG
                )
                dkv_SH = (tile.add_block(x, new) for x, new in zip(dkv_SH, dkv_1C1H, strict=True))
                return [tile.add(dq_TGH, dq_1RGH), *dkv_SH]

            start = [fresh(q_TGH.shape, 0.0), *(x[row, kv_head] for x in dkv_BKSH)]
            dq_TGH, *dkv_SH = self._walk(pairs, q_at, keys, row, lanes.G, see, start)
            return [
                x.at[row, kv_head].set(new) for x, new in zip(dkv_BKSH, dkv_SH, strict=True)
            ], dq_TGH

        zero = [fresh(x.shape, 0.0) for x in kv_BKSH]
        dkv_BKSH, dq_XTGH = jax.lax.scan(lane, zero, lanes.of(heads.slope_N, q_BTNH, *done))
        return lanes.join(dq_XTGH), *(keys.unsort(x) for x in dkv_BKSH)

    def _walk(self, pairs, q_at, keys, row, G, see, carry):
        q_at = jax.tree.map(lambda x_BT: x_BT[row], q_at)
        size = min(pairs.tile(self.block, self.length, G, least=16), pairs.queries.size)
        return walk(pairs, q_at, keys.of_row(row), self.block, size, see, carry)
