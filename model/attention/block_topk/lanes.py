"""The layout of heads that choose for themselves: the lanes of picked.py and picked_tpu.py.

    lanes = Lanes(q_BTNH, k_BSKH, pairs)
    out_BTNH, lse_BTN = lanes.map(f, slope_N, q_BTNH)

A lane is a row and a head that chooses, X of them; its G query heads share its choices.
"""

import jax
import jax.numpy as jnp

from model.attention.block_topk.pairs import RoutingPairs


class Lanes:
    """Cuts queries [B, T, N, ...] into lanes [X, T, G, ...], and joins them again."""

    def __init__(self, q_BTNH: jax.Array, k_BSKH: jax.Array, pairs: RoutingPairs):
        self.B, _, N, _ = q_BTNH.shape
        self.K, self.M = k_BSKH.shape[2], len(pairs.queries) // self.B
        self.G, self.pairs = N // self.M, pairs

    def map(self, f, slope_N: jax.Array | None, *xs_BTN: jax.Array) -> tuple[jax.Array, ...]:
        """f(row, kv head, pairs, slopes, queries ...) of each lane, one after the other, joined."""

        # Else, in a scan over layers, JAX makes what needs no layer (zeros to begin with) ahead of
        # the scan, and for all hops of a ring at once: 2 GiB for Llama 3 8B on 128 shards.
        @jax.checkpoint
        def lane(args):
            return f(*args)

        parts = jax.lax.map(lane, self.of(slope_N, *xs_BTN))
        return tuple(self.join(x_XTG) for x_XTG in parts)

    def of(self, slope_N: jax.Array | None, *xs_BTN: jax.Array):
        """(row, kv head, pairs, slopes, queries ...) of each lane."""
        row, head = jnp.indices((self.B, self.M), dtype=jnp.int32).reshape(2, -1)
        slope_XG = None
        if slope_N is not None:
            slope_XG = jnp.tile(slope_N.reshape(self.M, self.G), (self.B, 1))
        lanes = (self._split(x_BTN) for x_BTN in xs_BTN)
        return row, head * self.K // self.M, self.pairs, slope_XG, *lanes

    def _split(self, x_BTN: jax.Array) -> jax.Array:
        B, T, _, *rest = x_BTN.shape
        x_BMTG = jnp.moveaxis(x_BTN.reshape(B, T, self.M, self.G, *rest), 2, 1)
        return x_BMTG.reshape(B * self.M, T, self.G, *rest)

    def join(self, x_XTG: jax.Array) -> jax.Array:
        _, T, _, *rest = x_XTG.shape
        x_BTMG = jnp.moveaxis(x_XTG.reshape(self.B, self.M, T, self.G, *rest), 1, 2)
        return x_BTMG.reshape(self.B, T, self.M * self.G, *rest)
