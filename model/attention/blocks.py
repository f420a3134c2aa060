"""What kernels and strategies share about blocks of tokens: which may meet, and how parts add up.

meets(mask, ends(q_at_YPR), ends(k_at_YPR))           may a query of block y see a key of block y?
out, lse = merge((out_a, lse_a), (out_b, lse_b))      attention over the keys of both parts
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention.spec import Heads, Mask, Where

FAR = jnp.iinfo(jnp.int32).max

Ends = tuple[Where, Where]


def ends(at_YPR: Where) -> Ends:
    """First and last (segment, position) of each block, [Y]; those of an empty block meet none."""
    positions, segments = at_YPR
    axes = (1, 2)
    first = jnp.where(segments > 0, segments, FAR).min(axes, keepdims=True)
    last = segments.max(axes, keepdims=True)
    first_position = jnp.where(segments == first, positions, FAR).min(axes)
    last_position = jnp.where((segments == last) & (last > 0), positions, -1).max(axes)
    return Where(first_position, first[:, 0, 0]), Where(last_position, last[:, 0, 0])


def ends_of_rows(at_BT: Where) -> Ends:
    """The same of each row, [B]: all its tokens are one block."""
    return ends(jax.tree.map(lambda x_BT: x_BT[:, None], at_BT))


def meets(mask: Mask, q_ends: Ends, k_ends: Ends) -> jax.Array:
    """Whether a query of one block may see a key of the other; tight for runs of whole documents.

    Blocks are ordered by (segment, position), so this holds for any order of tokens in them.
    """
    (q_low, q_high), (k_low, k_high) = q_ends, k_ends
    meets = (k_low.segments_BT <= q_high.segments_BT) & (q_low.segments_BT <= k_high.segments_BT)
    # Where two blocks touch in one document alone, its positions decide.
    if mask.causal or mask.window:
        ends_here = k_low.segments_BT == q_high.segments_BT
        ahead = k_low.positions_BT - q_high.positions_BT
        hidden = ahead > 0 if mask.causal else ahead >= mask.window
        meets &= ~(ends_here & hidden & (k_low.positions_BT >= mask.prefix))
    if mask.limited:
        begins_here = k_high.segments_BT == q_low.segments_BT
        behind = _is_behind(mask, q_low.positions_BT, k_high.positions_BT)
        one_document = k_low.segments_BT == k_high.segments_BT
        reaches_far = ~one_document if mask.sinks else False
        reaches_far |= k_low.positions_BT < mask.sinks
        if mask.stride:
            apart_low = q_low.positions_BT // mask.block - k_high.positions_BT // mask.block
            apart_high = q_high.positions_BT // mask.block - k_low.positions_BT // mask.block
            on_stride = apart_high // mask.stride * mask.stride >= apart_low
            reaches_far |= on_stride | ~one_document | (q_low.segments_BT < q_high.segments_BT)
        meets &= ~(begins_here & behind) | reaches_far
    return meets


def covers(mask: Mask, q_ends: Ends, k_ends: Ends) -> jax.Array:
    """Whether each query of one block sees each key of the other, for certain.

    For blocks of one document each, without padding.
    """
    (q_low, q_high), (k_low, k_high) = q_ends, k_ends
    covers = q_low.segments_BT == k_low.segments_BT
    if mask.causal:
        covers &= (k_high.positions_BT <= q_low.positions_BT) | (k_high.positions_BT < mask.prefix)
    if mask.limited:
        near = ~_is_behind(mask, q_high.positions_BT, k_low.positions_BT)
        if mask.window and not mask.causal:
            near &= k_high.positions_BT - q_low.positions_BT < mask.window
        if mask.chunk:
            near &= ~_is_behind(mask, k_high.positions_BT, q_low.positions_BT)
        covers &= near | (k_high.positions_BT < mask.sinks)
    return covers


def _is_behind(mask: Mask, q_low: jax.Array, k_high: jax.Array) -> jax.Array:
    """Whether the last key is no longer near the first query of its document."""
    if mask.window:
        return q_low - k_high >= mask.window
    if mask.chunk:
        return q_low // mask.chunk > k_high // mask.chunk
    return q_low // mask.block - k_high // mask.block >= mask.local


Part = tuple[jax.Array, jax.Array]


class Pair(NamedTuple):
    """HOW: the forward and the backward of a kernel, for one kind of attention."""

    kernel: ModuleType
    mask: Mask
    scale: float
    softcap: float

    def forward(self, q_BTNH, k_BSKH, v_BSKH, heads: Heads, q_at: Where, k_at: Where) -> Part:
        """(out [B, T, N, H], lse [B, T, N]) float32 over these keys; no sink is among them."""
        how = dict(scale=self.scale, softcap=self.softcap, slope_N=heads.slope_N)
        return self.kernel.forward(q_BTNH, k_BSKH, v_BSKH, q_at, k_at, self.mask, **how)

    def backward(
        self, q_BTNH, k_BSKH, v_BSKH, heads: Heads, q_at: Where, k_at: Where, *done: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(dq, dk, dv) float32 of these keys' part; `done` is (dout, lse, delta) of all keys."""
        how = dict(scale=self.scale, softcap=self.softcap, slope_N=heads.slope_N)
        return self.kernel.backward(q_BTNH, k_BSKH, v_BSKH, q_at, k_at, self.mask, *done, **how)


def merge(a: Part, b: Part) -> Part:
    """(out, lse), float32, over the keys of both parts; each is (out [..., H], lse [...])."""
    lse = jnp.logaddexp(a[1], b[1])
    # A query that saw no key in either part has lse -inf: keep -inf - -inf out.
    safe = jnp.where(jnp.isneginf(lse), 0.0, lse)
    out = sum(o.astype(jnp.float32) * jnp.exp(l - safe)[..., None] for o, l in (a, b))
    return out, lse


def delta(out_BTNH: jax.Array, dout_BTNH: jax.Array) -> jax.Array:
    """<out, dout> of each query and head, float32 [B, T, N]: what the softmax takes from dp."""
    return (out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32)).sum(-1)


def add_sink(part: Part, heads: Heads) -> Part:
    """`part` with the learned sink among the keys: once, after all of them (its value is zero)."""
    out_BTNH, lse_BTN = part
    if heads.sink_N is None:
        return part
    with_sink_BTN = jnp.logaddexp(lse_BTN, heads.sink_N[None, None])
    return out_BTNH * jnp.exp(lse_BTN - with_sink_BTN)[..., None], with_sink_BTN


def sink_gradient(heads: Heads, lse_BTN: jax.Array, delta_BTN: jax.Array) -> Heads:
    """Gradient of the sinks; `lse` counts them in. The softmax of a zero value: -p delta."""
    if heads.sink_N is None:
        return Heads()
    p_BTN = jnp.exp(heads.sink_N[None, None] - lse_BTN)
    return Heads(-(p_BTN * delta_BTN).sum((0, 1)))


def vary(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, varying over the mesh axes that `like` varies over (for shard_map)."""
    have, want = (jax.typeof(a).manual_axis_type.varying for a in (x, like))
    return jax.lax.pcast(x, tuple(want - have), to="varying")


def fresh(like, shape: tuple[int, ...], value: float) -> jax.Array:
    """A float32 carry that varies over the mesh axes that `like` varies over (for shard_map)."""
    axes = frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(like))
    )
    return jax.lax.pcast(jnp.full(shape, value, jnp.float32), tuple(axes), to="varying")
