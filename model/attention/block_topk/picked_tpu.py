"""HOW a query meets the key blocks that were chosen for it, on TPUs: Pallas kernels over a list.

The blocks are those of MoBA (arXiv 2502.13189) and NSA (arXiv 2502.11089). As in picked.py, pairs
(query, chosen block) and keys stand in order of (segment, block); here a kernel goes down both at
once. Its list of steps (picked_steps.py) comes ahead of its data, so that the keys of a step are
fetched while the one before it works.

    picked = GatheredBlocksTpu(pair, block=64, length=2**20)   as GatheredBlocks: forward, backward

Work grows with the pairs that meet keys here, memory with the queries: what a part of the pairs
gives is merged into what their queries have. Letters as in picked.py; P pairs of a part, in Y
tiles; R rows of a tile: its pairs x G heads, and padding.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention import blocks
from model.attention.block_topk import picked_call, picked_kernel, picked_steps
from model.attention.block_topk.lanes import Lanes
from model.attention.block_topk.pairs import Keys, RoutingPairs
from model.attention.block_topk.picked_call import GatheredCall
from model.attention.block_topk.picked_steps import TileSchedule
from model.attention.blocks import MaskedKernel, PartialSoftmax
from model.attention.kernels import tiles
from model.attention.mask import Full, Mask, Positions
from model.attention.spec import Heads

PART_FLOATS = 2**24  # of the results of one part: 64 MiB


class GatheredBlocksTpu(NamedTuple):
    """The same as `GatheredBlocks` on TPUs. It takes the scores of `pair`, not its kernel."""

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
        work = _Work(self, q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at)

        def lane(*args):
            *which, q_TGH = args
            lane = _Lane(work, *which)

            def part(done, queries_P, steps):
                new = lane.call(picked_kernel.forward, queries_P, steps, {"q_RH": q_TGH})
                return _merge(done, queries_P, new)

            nothing = work.fresh(q_TGH.shape, 0.0), work.fresh(q_TGH.shape[:2], -jnp.inf)
            return lane.each_part(part, nothing)

        return work.lanes.map(lane, heads.slope_N, q_BTNH)

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
        work = _Work(self, q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at, *done)
        dout_BTNH, lse_BTN, delta_BTN = done
        lse_BTN = tiles.base_2(lse_BTN)

        def lane(dkv, args):
            *which, q_TGH, dout_TGH, lse_TG, delta_TG = args
            lane = _Lane(work, *which)
            arrays = {"q_RH": q_TGH, "dout_RH": dout_TGH, "lse_1R": lse_TG, "delta_1R": delta_TG}

            def part(gradients, queries_P, steps):
                dq_TGH, *dkv = gradients
                dq_PGH, *dkv = lane.call(picked_kernel.backward, queries_P, steps, arrays, dkv)
                return dq_TGH.at[queries_P].add(dq_PGH), *dkv

            dq_TGH, *dkv = lane.each_part(part, (work.fresh(q_TGH.shape, 0.0), *dkv))
            return dkv, dq_TGH

        zero = work.fresh(work.keys["k_ZAH"].shape, 0.0)
        lanes = work.lanes.of(heads.slope_N, q_BTNH, dout_BTNH, lse_BTN, delta_BTN)
        dkv, dq_XTGH = jax.lax.scan(lane, [zero, zero], lanes)
        dk_BSKH, dv_BSKH = (
            work.sorted.unsort(x.reshape(*x.shape[:2], -1, x.shape[4])) for x in dkv
        )
        scale = self.pair.scale
        return work.lanes.join(dq_XTGH) * scale, dk_BSKH * scale, dv_BSKH


class _Work:
    """The lanes, the keys in order, and the call of one use of `GatheredBlocksTpu`."""

    def __init__(
        self, picked, q_BTNH, k_BSKH, v_BSKH, heads: Heads, q_at: Positions, k_at: Positions, *done
    ):
        pair, block, length = picked
        assert pair.mask == Full(), "chosen blocks are of causal attention to whole documents"
        self.fresh = functools.partial(
            blocks.fresh, (q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at, done)
        )
        self.lanes = Lanes(q_BTNH, k_BSKH, heads.chosen)
        G, pairs = self.lanes.G, heads.chosen
        self.tile = pairs.tile(block, length, G, least=-(-picked_call.LANES // G))
        self.call = GatheredCall.of(pair, G, self.tile, block, alibi=heads.slope_N is not None)
        # As many as the blocks that are looked up at once are chosen by, if all are alike.
        P = min(pairs.queries.shape[1], pairs.alike(block, length) * picked_steps.RUNS)
        most = max(PART_FLOATS // (G * q_BTNH.shape[3]), 1)
        self.size = -(-min(P, most) // self.tile) * self.tile
        self.positions_BT = q_at.positions_BT
        self.sorted = Keys(k_at, block, self.call.padding(k_BSKH.shape[1]))
        self.start_BS = picked_steps.starts(self.sorted.runs)
        self.keys = {
            "k_ZAH": picked_call.groups(self.sorted.sort(k_BSKH)),
            "v_ZAH": picked_call.groups(self.sorted.sort(v_BSKH)),
            "k_at_J8E": picked_call.positions(self.sorted.at.positions_BT),
        }


class _Lane:
    """The pairs of one lane, and what both kernels do with them."""

    def __init__(self, work: _Work, row, kv_head, pairs: RoutingPairs, slope_G: jax.Array | None):
        self.work, self.row, self.pairs = work, row, pairs
        self.place_2 = jnp.stack([row, kv_head])
        shape = work.positions_BT.shape[1], work.lanes.G
        self.arrays = {"q_at_1R": jnp.broadcast_to(work.positions_BT[row][:, None], shape)}
        if slope_G is not None:
            self.arrays["slope_1R"] = jnp.broadcast_to(slope_G[None], shape)

    def each_part(self, see: Callable, carry):
        """see(carry, queries_P, steps) for each part of the pairs."""
        work = self.work
        keys, _ = work.sorted.of_row(self.row)
        start_S = work.start_BS[self.row]
        return picked_steps.each_part(self.pairs, keys, start_S, work.size, work.tile, see, carry)

    def call(self, body: Callable, queries_P, steps: TileSchedule, arrays_TG, totals=()):
        """Runs `body`: results for each pair, [P, G, ...], and totals; `arrays` are of queries."""
        work, how = self.work, self.work.call.how
        rows, G = how.pairs * how.heads, how.heads

        def in_tiles(name: str, x_TG: jax.Array) -> jax.Array:
            x_YRH = x_TG[queries_P].reshape(-1, rows, *x_TG.shape[2:])
            short = work.call.R - rows
            x_YRH = jnp.pad(x_YRH, ((0, 0), (0, short)) + ((0, 0),) * (x_YRH.ndim - 2))
            return x_YRH[:, None] if name.endswith("1R") else x_YRH

        def of_pairs(x: jax.Array) -> jax.Array:
            x_YRH = x[:, 0] if x.shape[1] == 1 else x
            return x_YRH[:, :rows].reshape(-1, G, *x_YRH.shape[2:])

        arrays = {name: in_tiles(name, x_TG) for name, x_TG in (self.arrays | arrays_TG).items()}
        results = work.call(body, self.place_2, steps, work.keys | arrays, totals)
        num_tiles = len(results) - len(totals)
        return *map(of_pairs, results[:num_tiles]), *results[num_tiles:]


def _merge(part: PartialSoftmax, queries_P: jax.Array, new: PartialSoftmax) -> PartialSoftmax:
    """`part` (out [T, G, H], lse [T, G]) with what pairs saw [P, G, ...]; a query may have many."""
    (out_TGH, lse_TG), (out_PGH, lse_PG) = part, new
    high_TG = lse_TG.at[queries_P].max(lse_PG)
    # A query that saw no key yet has lse -inf: keep -inf - -inf out.
    high_TG = jnp.where(jnp.isneginf(high_TG), 0.0, high_TG)
    total_TG = jnp.exp(lse_TG - high_TG).at[queries_P].add(jnp.exp(lse_PG - high_TG[queries_P]))
    now_TG = high_TG + jnp.log(total_TG)
    safe_TG = jnp.where(total_TG > 0, now_TG, 0.0)
    weight_TG, weight_PG = jnp.exp(lse_TG - safe_TG), jnp.exp(lse_PG - safe_TG[queries_P])
    out_TGH = out_TGH * weight_TG[..., None]
    return out_TGH.at[queries_P].add(out_PGH * weight_PG[..., None]), now_TG
