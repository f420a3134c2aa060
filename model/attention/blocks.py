"""A kernel with its mask, and the sum of partial softmaxes: shared by kernels and strategies.

out, lse = merge((out_a, lse_a), (out_b, lse_b))      attention over the keys of both parts
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention.mask import Mask, Positions
from model.attention.spec import Heads

PartialSoftmax = tuple[jax.Array, jax.Array]


class MaskedKernel(NamedTuple):
    """HOW: the forward and the backward of a kernel, for one kind of attention."""

    kernel: ModuleType
    mask: Mask
    scale: float
    softcap: float

    def forward(
        self, q_BTNH, k_BSKH, v_BSKH, heads: Heads, q_at: Positions, k_at: Positions
    ) -> PartialSoftmax:
        """(out [B, T, N, H], lse [B, T, N]) float32 over these keys; no sink is among them."""
        how = dict(scale=self.scale, softcap=self.softcap, slope_N=heads.slope_N)
        return self.kernel.forward(q_BTNH, k_BSKH, v_BSKH, q_at, k_at, self.mask, **how)

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
        """(dq, dk, dv) float32 of these keys' part; `done` is (dout, lse, delta) of all keys."""
        how = dict(scale=self.scale, softcap=self.softcap, slope_N=heads.slope_N)
        return self.kernel.backward(q_BTNH, k_BSKH, v_BSKH, q_at, k_at, self.mask, *done, **how)


def merge(a: PartialSoftmax, b: PartialSoftmax) -> PartialSoftmax:
    """(out, lse), float32, over the keys of both parts; each is (out [..., H], lse [...])."""
    lse = jnp.logaddexp(a[1], b[1])
    # A query that saw no key in either part has lse -inf: keep -inf - -inf out.
    safe = jnp.where(jnp.isneginf(lse), 0.0, lse)
    out = sum(o.astype(jnp.float32) * jnp.exp(l - safe)[..., None] for o, l in (a, b))
    return out, lse


def delta(out_BTNH: jax.Array, dout_BTNH: jax.Array) -> jax.Array:
    """<out, dout> of each query and head, float32 [B, T, N]: what the softmax takes from dp."""
    return (out_BTNH.astype(jnp.float32) * dout_BTNH.astype(jnp.float32)).sum(-1)


def add_sink(part: PartialSoftmax, heads: Heads) -> PartialSoftmax:
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
