"""WHERE: the length is sharded; keys and values go round a ring, queries stay (arXiv 2310.01889).

    hop h: device i holds the keys of shard i - h, merges what its queries see in them by
    log-sum-exp in float32, and has already sent them on to device i + 1; both ways round, it holds
    half of those of shard i - h and half of those of i + h

A window ends the round early; if it sees shards after the own, as in zigzag order, a second round
goes back to them.

One custom_vjp stands around the whole exchange: autodiff would keep the keys of every hop. The
backward goes round again with the lse and delta of all hops; dK and dV travel with their keys.
Memory is O(length / devices). Any number of shards and of heads will do.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.attention import blocks
from model.attention.blocks import MaskedKernel, PartialSoftmax
from model.attention.mask import Bounds, Mask, Positions, bounds_of_rows
from model.attention.spec import Heads
from model.attention.strategies import local


class Ring(NamedTuple):
    """`size` places on the mesh `axes`, each of `stride` neighbours with heads of their own."""

    axes: tuple[str, ...]
    size: int
    stride: int
    before: int  # shards that a query may see before its own
    after: int = 0
    both_ways: bool = False

    def send(self, tree, places: int = 1):
        """`tree`, [2, B, T, ...], moved so many places on; or half of its tokens, and half back."""

        def send(x):
            if not self.both_ways:
                return self._move(x, places)
            ahead, back = jnp.split(x, [x.shape[2] // 2], axis=2)
            return jnp.concatenate([self._move(ahead, places), self._move(back, -places)], 2)

        return jax.tree.map(send, tree)

    def _move(self, x: jax.Array, places: int) -> jax.Array:
        num_devices, shift = self.size * self.stride, places * self.stride
        if shift == 0:
            return x
        pairs = [(i, (i + shift) % num_devices) for i in range(num_devices)]
        return jax.lax.ppermute(x, self.axes, pairs)

    def go_round(self, hop, start, hops: int):
        """hop(carry, last=...) for so many shards; the ends stand apart.

        So the first needs nothing to add to and the last sends nothing. The kernel is compiled
        up to three times, whatever the size.
        """
        if hops == 1:
            return hop(start, last=True)
        carry = hop(start, last=False)
        if hops > 2:
            carry = jax.lax.fori_loop(1, hops - 1, lambda _, carry: hop(carry, last=False), carry)
        return hop(carry, last=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(
    ring: Ring,
    pair: MaskedKernel,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    heads: Heads,
    q_at: Positions,
    k_at: Positions,
) -> jax.Array:
    """out [B, T, N, H] in q's dtype for the T queries of this shard, over all keys of the ring."""
    return _forward(ring, pair, q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at)[0]


# K and V travel as one array. Where they stand travels with them, 8 bytes a token beside the 1000s
# of K and V: gathered once instead, it would be all that grows with the whole length.
def _pack(k_BTKH: jax.Array, v_BTKH: jax.Array, k_at: Positions) -> tuple[jax.Array, jax.Array]:
    return jnp.stack((k_BTKH, v_BTKH)), jnp.stack(k_at[:2])


def forward(
    ring: Ring,
    pair: MaskedKernel,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    heads: Heads,
    q_at: Positions,
    k_at: Positions,
) -> PartialSoftmax:
    """(out [B, T, N, H], lse [B, T, N]) float32 of the same; no sink is among the keys."""
    q_bounds = bounds_of_rows(q_at)

    def hop(way, carry, *, last):
        (kv, at), part = carry
        there = None if last else ring.send((kv, at), way)  # under way while the kernel runs

        def see():
            return pair.forward(q_BTNH, *kv, heads, q_at, Positions(*at))

        if part is None:
            return there, see()
        return there, jax.lax.cond(
            _in_reach(pair.mask, q_bounds, at), lambda p: blocks.merge(p, see()), lambda p: p, part
        )

    own = _pack(k_BTKH, v_BTKH, k_at)
    _, part = ring.go_round(functools.partial(hop, 1), (own, None), 1 + ring.before)
    if ring.after:
        start = ring.send(own, -1), part
        _, part = ring.go_round(functools.partial(hop, -1), start, ring.after)
    return part


def _forward(ring, pair, q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at):
    part = forward(ring, pair, q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at)
    out_BTNH, lse_BTN = local.saved(q_BTNH.dtype, blocks.add_sink(part, heads))
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at, out_BTNH, lse_BTN)


def _backward(ring, pair, residuals, dout_BTNH):
    q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at, out_BTNH, lse_BTN = residuals
    done = dout_BTNH, lse_BTN, blocks.delta(out_BTNH, dout_BTNH)
    q_bounds = bounds_of_rows(q_at)

    def hop(way, carry, *, last):
        (kv, at), dq_BTNH, dkv = carry
        there = None if last else ring.send((kv, at), way)

        def see():
            dq_BTNH, *dkv = pair.backward(q_BTNH, *kv, heads, q_at, Positions(*at), *done)
            return dq_BTNH, jnp.stack(dkv)

        if dq_BTNH is None:
            return there, *see()

        def add(dq_BTNH):
            more_BTNH, dkv = see()
            return dq_BTNH + more_BTNH, dkv

        def skip(dq_BTNH):
            return dq_BTNH, blocks.fresh((dq_BTNH, kv), kv.shape, 0.0)

        # dK and dV follow their keys one hop behind: they too are under way while the kernel
        # runs, so what it finds is added outside of it.
        dq_BTNH, here = jax.lax.cond(_in_reach(pair.mask, q_bounds, at), add, skip, dq_BTNH)
        return there, dq_BTNH, here if dkv is None else ring.send(dkv, way) + here

    own = _pack(k_BTKH, v_BTKH, k_at)
    _, dq_BTNH, dkv = ring.go_round(functools.partial(hop, 1), (own, None, None), 1 + ring.before)
    if ring.after:  # two rounds: they add up at home, in float32
        start = ring.send(own, -1), dq_BTNH, None
        _, dq_BTNH, more = ring.go_round(functools.partial(hop, -1), start, ring.after)
        dkv = ring.send(dkv, -ring.before) + ring.send(more, ring.after)
        dk_BTKH, dv_BTKH = dkv.astype(k_BTKH.dtype)
    else:  # complete: rounded before the way home, from wherever the round ended
        dk_BTKH, dv_BTKH = ring.send(dkv.astype(k_BTKH.dtype), -ring.before)
    dheads = blocks.sink_gradient(heads, *done[1:])
    return dq_BTNH.astype(q_BTNH.dtype), dk_BTKH, dv_BTKH, dheads, None, None


attention.defvjp(_forward, _backward)


def _in_reach(mask: Mask, q_bounds: Bounds, at: jax.Array) -> jax.Array:
    """Whether a query of this device may see any key that is here now."""
    return mask.may_see(q_bounds, bounds_of_rows(Positions(*at))).any()
