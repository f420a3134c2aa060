"""The key/value cache: per slot of the pattern, stacked over its layers, with positions.

A full slot holds `length` tokens; one of short reach is a ring buffer behind the first `sinks`
tokens, which stay. Positions are stored beside keys, so that masks need no order.
"""

import dataclasses

import jax
import jax.numpy as jnp

from core.sharding import Rules
from model.attention.decode import Stored
from model.attention.spec import AttentionSpec, Where
from model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slot:
    """Keys and values of the L layers of one pattern slot; room for S tokens a row."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    positions_BS: jax.Array  # int32, -1 where nothing is stored
    sinks: int = dataclasses.field(default=0, metadata=dict(static=True))

    def write(self, k_LBTKH: jax.Array, v_LBTKH: jax.Array, at: Where, seen_B: jax.Array) -> "Slot":
        """Stores the new tokens that are still within reach after `seen_B` tokens a row."""
        B, S = self.positions_BS.shape
        first, ring = self.sinks, S - self.sinks
        new_BT = at.positions_BT
        stays_BT = (at.segments_BT > 0) & ((new_BT < first) | (new_BT >= seen_B[:, None] - ring))
        index_BT = jnp.where(new_BT < first, new_BT, first + (new_BT - first) % ring)
        index_BT = jnp.where(stays_BT, index_BT, S)  # S is out of bounds: dropped
        row_B1 = jnp.arange(B)[:, None]

        def put(x_LBKSH, new_LBTKH):
            new_BTLKH = jnp.moveaxis(new_LBTKH, 0, 2)
            return x_LBKSH.at[:, row_B1, :, index_BT].set(new_BTLKH, mode="drop")

        positions_BS = self.positions_BS.at[row_B1, index_BT].set(at.positions_BT, mode="drop")
        k_LBKSH, v_LBKSH = put(self.k_LBKSH, k_LBTKH), put(self.v_LBKSH, v_LBTKH)
        return Slot(k_LBKSH, v_LBKSH, positions_BS, self.sinks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """All slots, stage by stage, and how many tokens each row has seen."""

    slots: tuple[Slot, ...]
    seen_B: jax.Array  # int32

    def stored(self, slot: int, layer: jax.Array) -> Stored:
        """What layer `layer` of `slot` may read."""
        s = self.slots[slot]
        return Stored(s.k_LBKSH, s.v_LBKSH, s.positions_BS, layer, self.seen_B.max())

    def write(self, new: list[tuple[jax.Array, jax.Array]], at: Where, rules: Rules) -> "KVCache":
        """The cache after the tokens at `at`; `new` holds (k, v) [L, B, T, K, H] a slot."""
        kv = rules(None, "batch", "act_kv_heads", "kv_length", None)
        new_kv = rules(None, "batch", None, "act_kv_heads", None)
        row, rows = rules("batch"), rules("batch", None)
        places = rules("batch", "kv_length")
        cache_spec = KVCache(tuple(Slot(kv, kv, places, s.sinks) for s in self.slots), row)

        def write(cache, new, at):
            end_BT = jnp.where(at.segments_BT > 0, at.positions_BT + 1, 0)
            seen_B = jnp.maximum(cache.seen_B, end_BT.max(axis=1))
            slots = (s.write(k, v, at, seen_B) for s, (k, v) in zip(cache.slots, new, strict=True))
            return KVCache(tuple(slots), seen_B)

        return jax.shard_map(
            write,
            in_specs=(cache_spec, [(new_kv, new_kv)] * len(new), Where(rows, rows)),
            out_specs=cache_spec,
        )(self, new, at)


def slot_sizes(config: ModelConfig, length: int) -> list[tuple[int, int]]:
    """(layers, tokens kept) of each slot for texts of up to `length` tokens."""
    return [
        (layers, min(length, spec.mask.kept or length))
        for slots, layers in config.stages
        for spec in slots
    ]


def kv_bytes(config: ModelConfig, batch: int, length: int) -> int:
    """Bytes of keys and values that `create` allocates, over all devices."""
    token = 2 * config.num_kv_heads * config.head_dim * config.compute_dtype.itemsize
    return batch * sum(layers * size * token for layers, size in slot_sizes(config, length))


def create(config: ModelConfig, batch: int, length: int, rules: Rules) -> KVCache:
    """An empty cache for `batch` rows of up to `length` tokens, in the compute dtype."""
    heads = max(config.num_kv_heads, rules.size("act_kv_heads"))
    kv = rules(None, "batch", "act_kv_heads", "kv_length", None)

    def slot(layers: int, size: int, spec: AttentionSpec) -> Slot:
        sinks = spec.sinks if size < length else 0
        shape = (layers, batch, heads, size, config.head_dim)
        k, v = (jnp.zeros(shape, config.compute_dtype, out_sharding=kv) for _ in "kv")
        sharding = rules("batch", "kv_length")
        at = jnp.full((batch, size), -1, jnp.int32, out_sharding=sharding)
        return Slot(k, v, at, sinks)

    specs = [spec for slots, _ in config.stages for spec in slots]
    sizes = slot_sizes(config, length)
    slots = tuple(slot(*size, spec) for size, spec in zip(sizes, specs, strict=True))
    return KVCache(slots, jnp.zeros((batch,), jnp.int32, out_sharding=rules("batch")))
