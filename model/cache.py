"""The key/value cache: per slot of the pattern, stacked over its layers, with positions.

A full slot holds `length` tokens; one of short reach is a ring buffer behind the first `sinks`
tokens, which stay. Positions are stored beside keys, so that masks need no order.

Over P shards of `kv_length` a text's token at position p belongs to shard p % P, which is a cache
of its own for every P-th token. Chunks of a sharded `length` are dealt out alike (`deal`): a token
is computed where it is kept, and no key or value ever moves.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from core.sharding import Rules
from model.attention.decode import Shard, Stored
from model.attention.spec import Where
from model.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slot:
    """Keys and values of the L layers of one pattern slot; room for S tokens a row, over shards."""

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    positions_BS: jax.Array  # int32, -1 where nothing is stored
    sinks: int = dataclasses.field(default=0, metadata=dict(static=True))  # kept on each shard

    def write(
        self, k_LBTKH: jax.Array, v_LBTKH: jax.Array, at: Where, seen_B: jax.Array, shard: Shard
    ) -> "Slot":
        """Stores, in the part `shard`, its own of the new tokens that are still within reach
        after `seen_B` tokens a row. Runs on one device, which sees that part alone.
        """
        B, S = self.positions_BS.shape
        first, ring = self.sinks, S - self.sinks
        new_BT, owner_BT = jnp.divmod(at.positions_BT, shard.size)
        end_B1 = shard.count(seen_B)[:, None]
        stays_BT = (at.segments_BT > 0) & (owner_BT == shard.index)
        stays_BT &= (new_BT < first) | (new_BT >= end_B1 - ring)
        index_BT = jnp.where(new_BT < first, new_BT, first + (new_BT - first) % ring)
        index_BT = jnp.where(stays_BT, index_BT, S)  # S is out of bounds: dropped

        def put(x_LBKSH, new_LBTKH):
            # Every dim but H is indexed. With a window over L and K a TPU would lay out the whole
            # cache anew for this write, and back for the next read.
            L, _, K, _, _ = x_LBKSH.shape
            layer, row, _, head = jnp.ogrid[:L, :B, :1, :K]
            place = layer, row, head, index_BT[None, :, :, None]
            return x_LBKSH.at[place].set(new_LBTKH, mode="drop")

        place = jnp.arange(B)[:, None], index_BT
        positions_BS = self.positions_BS.at[place].set(at.positions_BT, mode="drop")
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
        return Stored(s.k_LBKSH, s.v_LBKSH, s.positions_BS, layer, self.seen_B)

    def write(self, new: list[tuple[jax.Array, jax.Array]], at: Where, rules: Rules) -> "KVCache":
        """The cache after the tokens at `at`; `new` holds (k, v) [L, B, T, K, H] a slot.

        Every shard takes its own of the tokens that it is shown: all where `length` is whole, and
        where it is sharded those that were dealt to it.
        """
        assert rules.size("length") == 1 or rules.layout == "dealt", rules.layout
        kv = rules(None, "batch", "act_kv_heads", "kv_length", None)
        new_kv = rules(None, "batch", "length", "act_kv_heads", None)
        row, tokens = rules("batch"), rules("batch", "length")
        places = rules("batch", "kv_length")
        cache_spec = KVCache(tuple(Slot(kv, kv, places, s.sinks) for s in self.slots), row)

        def write(cache, new, at):
            shard = Shard.here(rules)
            slots = (
                s.write(k, v, at, cache.seen_B, shard)
                for s, (k, v) in zip(cache.slots, new, strict=True)
            )
            return KVCache(tuple(slots), cache.seen_B)

        end_BT = jnp.where(at.segments_BT > 0, at.positions_BT + 1, 0)
        seen_B = jnp.maximum(self.seen_B, end_BT.max(axis=1))
        return jax.shard_map(
            write,
            in_specs=(cache_spec, [(new_kv, new_kv)] * len(new), Where(tokens, tokens)),
            out_specs=cache_spec,
        )(KVCache(self.slots, seen_B), new, at)


def deal(x_BT: jax.Array, start: jax.Array, rules: Rules) -> jax.Array:
    """The tokens `start`, `start` + 1, ... of each row, in the order of the shards that keep them.

    T is a multiple of the shards; the result is sharded over `length`, the argument is not.
    """
    B, T = x_BT.shape
    P = rules.size("length")
    x_BPT = jnp.moveaxis(x_BT.reshape(B, T // P, P), 2, 1)
    x_BPT = jnp.roll(x_BPT, start, axis=1)  # the first token is that of shard start % P
    return jax.sharding.reshard(x_BPT.reshape(B, T), rules("batch", "length"))


def collect(x_BT: jax.Array, start: jax.Array, rules: Rules) -> jax.Array:
    """What `deal` gave, on every device and in the order of the rows."""
    B, T = x_BT.shape
    P = rules.size("length")
    x_BT = jax.sharding.reshard(x_BT, rules("batch", None))
    x_BPT = jnp.roll(x_BT.reshape(B, P, T // P), -start, axis=1)
    return jnp.moveaxis(x_BPT, 1, 2).reshape(B, T)


def slot_sizes(config: ModelConfig, length: int, shards: int) -> list[tuple[int, int, int]]:
    """(layers, sinks, tokens kept with them), on each shard, of each slot for texts of `length`."""
    whole = math.ceil(length / shards)
    sizes = []
    for slots, layers in config.stages:
        for spec in slots:
            kept = spec.mask.kept
            # A shard has up to 1 / P, rounded up, of any tokens in sequence.
            sinks = math.ceil(spec.sinks / shards)
            size = sinks + math.ceil((kept - spec.sinks) / shards) if kept else whole
            sizes.append((layers, sinks, size) if size < whole else (layers, 0, whole))
    return sizes


def kv_bytes(config: ModelConfig, batch: int, length: int, rules: Rules) -> int:
    """Bytes of keys and values that `create` allocates, over all devices."""
    heads = max(config.num_kv_heads, rules.size("act_kv_heads"))
    token = 2 * heads * config.head_dim * config.compute_dtype.itemsize
    shards = rules.size("kv_length")
    tokens = sum(layers * size for layers, _, size in slot_sizes(config, length, shards))
    return batch * shards * tokens * token


def create(config: ModelConfig, batch: int, length: int, rules: Rules) -> KVCache:
    """An empty cache for `batch` rows of up to `length` tokens, in the compute dtype."""
    heads = max(config.num_kv_heads, rules.size("act_kv_heads"))
    kv = rules(None, "batch", "act_kv_heads", "kv_length", None)
    shards = rules.size("kv_length")

    def slot(layers: int, sinks: int, size: int) -> Slot:
        size *= shards
        shape = (layers, batch, heads, size, config.head_dim)
        k, v = (jnp.zeros(shape, config.compute_dtype, out_sharding=kv) for _ in "kv")
        sharding = rules("batch", "kv_length")
        at = jnp.full((batch, size), -1, jnp.int32, out_sharding=sharding)
        return Slot(k, v, at, sinks)

    slots = tuple(slot(*sizes) for sizes in slot_sizes(config, length, shards))
    return KVCache(slots, jnp.zeros((batch,), jnp.int32, out_sharding=rules("batch")))
