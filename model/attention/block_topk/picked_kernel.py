"""The work of one step of picked_tpu.py, in Pallas: some pairs of one block, and its keys.

FlashAttention-2 (arXiv 2307.08691) for chosen blocks. Pairs and keys both stand in order of
(segment, block), so a step's pairs are consecutive, and its keys too. Which these are is read from
lists of scalars, `begin_W` of pairs and `low_W`, `high_W` of keys:

    step    pairs             of tile             keys
    0       0 .. 9            0                   0 .. 64      block 0 of a document
    1       9 .. 16           0                   64 .. 128
    2       16 .. 20          1                   64 .. 128    a tile ends: its results leave VMEM
    3       20 .. 32          1                   128 .. 150   a block ends: so do dK and dV

Every pair is in one step. Scores stand keys x rows, [C, R], in base 2, so that what belongs to a
row (position, maximum, sum, lse, delta) is a row of lanes. A block comes with the keys around it
that make its start and end aligned, and is done in parts of C keys: it may be too long for one
product.

R rows of a tile: pairs x the G heads that share them, the head inside. Z groups of A keys are a
block and what is around it; J groups of E keys, as many as a register has lanes, are around that.
"""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.attention.kernels import tiles
from model.attention.kernels.tiles import LOG2_E, ROWS_BY_COLUMNS, ROWS_BY_ROWS, dot
from model.attention.mask import Positions

FAR = 2**30  # later than any position; its distance from -1 is an int32

PRODUCTS = {"forward": 2, "backward": 5}  # of a step


class GatheredParams(NamedTuple):
    """The parameters that are fixed when the kernel is made."""

    scale: float
    softcap: float
    alibi: bool
    heads: int  # G
    pairs: int  # of a tile
    parts: int  # of a block


class GatheredStep:
    """The entry of the lists that the grid is at."""

    def __init__(self, how: GatheredParams, x: SimpleNamespace):
        w = pl.program_id(0)
        Z, A, _ = x.k_ZAH.shape
        E = x.k_at_J8E.shape[2]
        begin, end = x.begin_W[w], x.begin_W[w + 1]
        self.low, self.high = x.low_W[w], x.high_W[w]
        self.begins_tile, self.ends_tile = begin % how.pairs == 0, end % how.pairs == 0
        self.begins_block = (w == 0) | (x.low_W[jnp.maximum(w - 1, 0)] != self.low)
        self.ends_block = x.low_W[w + 1] != self.low
        self.first_row = begin % how.pairs * how.heads
        self.end_row = self.first_row + (end - begin) * how.heads
        self.group = jax.lax.div(self.low, A)  # the first group of keys that was fetched
        self.first = self.group * A
        self.shift = jax.lax.rem(self.first, E)  # of positions, which begin at whole lanes
        self.groups, self.size = Z // how.parts, Z // how.parts * A  # of a part

    def each_part(self, see) -> None:
        """see(j, groups of keys) for each part j of the block."""
        fetched = jnp.where(self.high > self.low, self.high - self.first, 0)

        def part(j, _):
            see(j, pl.ds(j * self.groups, self.groups))
            return 0

        jax.lax.fori_loop(0, pl.cdiv(fetched, self.size), part, 0)

    def q_positions(self, x: SimpleNamespace) -> jax.Array:
        """[1, R]; rows of other steps come before all keys."""
        row_1R = jax.lax.broadcasted_iota(jnp.int32, x.q_at_1R.shape, 1)
        is_inside_1R = (row_1R >= self.first_row) & (row_1R < self.end_row)
        return jnp.where(is_inside_1R, x.q_at_1R[...], -1)

    def k_positions(self, x: SimpleNamespace, j: jax.Array) -> jax.Array:
        """[C, 1]; keys of other blocks come after all queries."""
        C = self.size
        place = pl.multiple_of(self.shift + j * C, x.k_ZAH.shape[1])
        key_C1 = self.first + j * C + jax.lax.broadcasted_iota(jnp.int32, (C, 1), 0)
        is_inside_C1 = (key_C1 >= self.low) & (key_C1 < self.high)
        return jnp.where(is_inside_C1, x.k_at_S8[pl.ds(place, C), :][:, :1], FAR)


def forward(how: GatheredParams, x: SimpleNamespace) -> None:
    """out [R, H] and lse [1, R] of each tile; scratch are x.sum_HR, high_1R, total_1R, k_at_S8."""
    step = GatheredStep(how, x)
    pl.when(step.begins_block)(lambda: _stand_positions(x))

    @pl.when(step.begins_tile)
    def start():
        x.sum_HR[...] = jnp.zeros_like(x.sum_HR)
        x.high_1R[...] = jnp.full_like(x.high_1R, -jnp.inf)
        x.total_1R[...] = jnp.zeros_like(x.total_1R)

    def see(j, part):
        s_CR, _ = _scores(how, x, step, j, part)
        before_1R = x.high_1R[...]
        now_1R = jnp.maximum(before_1R, s_CR.max(0, keepdims=True))
        # Rows that have seen nothing yet stay at -inf: keep -inf - -inf out.
        safe_1R = jnp.where(now_1R == -jnp.inf, 0.0, now_1R)
        p_CR = jnp.exp2(s_CR - safe_1R)
        fade_1R = jnp.exp2(before_1R - safe_1R)
        x.high_1R[...] = now_1R
        x.total_1R[...] = x.total_1R[...] * fade_1R + p_CR.sum(0, keepdims=True)
        v_CH = _rows(x.v_ZAH[part])
        x.sum_HR[...] = x.sum_HR[...] * fade_1R + dot(
            v_CH.T, p_CR.astype(v_CH.dtype), ROWS_BY_COLUMNS
        )

    step.each_part(see)

    @pl.when(step.ends_tile)
    def finish():
        total_1R = x.total_1R[...]
        has_seen_1R = total_1R > 0
        safe_1R = jnp.where(has_seen_1R, total_1R, 1.0)
        x.out_RH[...] = (x.sum_HR[...] / safe_1R).T
        lse_1R = x.high_1R[...] / LOG2_E + jnp.log(safe_1R)
        x.lse_1R[...] = jnp.where(has_seen_1R, lse_1R, -jnp.inf)


def backward(how: GatheredParams, x: SimpleNamespace) -> None:
    """dq [R, H] of each tile; what a block adds to dk and dv is added to `x.dk`, `x.dv` in HBM.

    There x.place has the row and the head; `x.lse_1R` is in base 2, +inf for rows that saw nothing.
    All lack the factor `scale`. Scratch are x.sum_HR, dk_ZAH, dv_ZAH, sent and k_at_S8.
    """
    step = GatheredStep(how, x)
    around = pl.ds(step.group, x.k_ZAH.shape[0])
    totals = [
        (total.at[x.place[0], x.place[1], around], here, x.sent.at[i])
        for i, (total, here) in enumerate([(x.dk, x.dk_ZAH), (x.dv, x.dv_ZAH)])
    ]

    # The keys around a block are its neighbours': it must end its sums before they begin theirs.
    @pl.when(step.begins_block)
    def begin_block():
        _stand_positions(x)
        _copy([pltpu.make_async_copy(total, here, sent) for total, here, sent in totals])

    @pl.when(step.begins_tile)
    def start():
        x.sum_HR[...] = jnp.zeros_like(x.sum_HR)

    def see(j, part):
        q_RH, dout_RH = x.q_RH[...], x.dout_RH[...]
        s_CR, tanh_CR = _scores(how, x, step, j, part)
        p_CR = jnp.exp2(s_CR - x.lse_1R[...])
        x.dv_ZAH[part] += dot(p_CR.astype(dout_RH.dtype), dout_RH, ROWS_BY_COLUMNS).reshape(
            x.v_ZAH[part].shape
        )
        dp_CR = dot(_rows(x.v_ZAH[part]), dout_RH, ROWS_BY_ROWS)
        ds_CR = p_CR * (dp_CR - x.delta_1R[...])
        if how.softcap:
            ds_CR *= 1 - tanh_CR * tanh_CR
        ds_CR = ds_CR.astype(q_RH.dtype)
        x.dk_ZAH[part] += dot(ds_CR, q_RH, ROWS_BY_COLUMNS).reshape(x.k_ZAH[part].shape)
        x.sum_HR[...] += dot(_rows(x.k_ZAH[part]).T, ds_CR, ROWS_BY_COLUMNS)

    step.each_part(see)

    @pl.when(step.ends_tile)
    def finish():
        x.dq_RH[...] = x.sum_HR[...].T

    @pl.when(step.ends_block)
    def end_block():
        _copy([pltpu.make_async_copy(here, total, sent) for total, here, sent in totals])


def _stand_positions(x: SimpleNamespace) -> None:
    """Positions of keys, from lanes to sublanes: there a part may begin at any group."""
    x.k_at_S8[...] = _rows(x.k_at_J8E[...].swapaxes(1, 2))


def _scores(how: GatheredParams, x: SimpleNamespace, step: GatheredStep, j: jax.Array, part):
    """Scores in base 2, -inf of keys that a row may not see; with a soft-cap the tanh in them."""
    s_CR = dot(_rows(x.k_ZAH[part]), x.q_RH[...], ROWS_BY_ROWS)
    q_at_1R, k_at_C1 = step.q_positions(x), step.k_positions(x, j)
    slope_1R = x.slope_1R[...] if how.alibi else None
    at = Positions(q_at_1R, None), Positions(k_at_C1, None)
    s_CR, tanh_CR = tiles.scores(how, s_CR, slope_1R, *at, masked=False)
    return jnp.where(k_at_C1 <= q_at_1R, s_CR, -jnp.inf), tanh_CR


def _rows(x_ZAH: jax.Array) -> jax.Array:
    return x_ZAH.reshape(-1, x_ZAH.shape[2])


def _copy(copies) -> None:
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()
