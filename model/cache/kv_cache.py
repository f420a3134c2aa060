"""The key/value cache: per slot of the pattern, stacked over its layers, with positions.

A full slot holds `length` tokens; one of short reach is a ring buffer behind the first `sinks`
tokens, which stay. Positions are stored beside keys, so that masks need no order.

Over P shards of `kv_length` a text's token at position p belongs to shard p % P, which is a cache
of its own for every P-th token. Chunks of a sharded `length` are dealt out alike (`deal`): a token
is computed where it is kept, and no key or value ever moves.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from core import offload, tree
from core.sharding import Rules, device_kind
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec
from model.cache import kv_quant
from model.cache.flash_decode import LayerCache, NewKV, Pages, Shard
from model.cache.form import BITS, CacheConfig, Numbers
from model.cache.kv_quant import KVArray
from model.config import ModelConfig

PLAIN = CacheConfig()

Space = jax.memory.Space
Fetched = tuple[KVArray, KVArray] | None  # one layer's keys and values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerStack:
    """Keys and values of the L layers of one pattern slot; room for S tokens a row, over shards."""

    k_LBKSH: KVArray
    v_LBKSH: KVArray
    positions_BS: jax.Array  # int32, -1 where nothing is stored
    sinks: int = dataclasses.field(default=0, metadata=dict(static=True))  # kept on each shard
    blocks: "LayerStack | None" = (
        None  # of kinds that choose: the text's whole blocks, as its tokens
    )
    pages: Pages | None = None  # of a cache of which new tokens read a part
    host: bool = dataclasses.field(default=False, metadata=dict(static=True))  # where K and V are

    def write(
        self, k_LBTKH: jax.Array, v_LBTKH: jax.Array, at: Positions, seen_B: jax.Array, shard: Shard
    ) -> "LayerStack":
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
            L, _, K = x_LBKSH.shape[:3]
            new_LBTKH = new_LBTKH.astype(x_LBKSH.dtype)
            if self.host:
                # In the order of the cache: XLA cannot send what has the heads inside.
                new_LBKTH = jnp.moveaxis(new_LBTKH, 2, 3)
                layer, row, head, _ = jnp.ogrid[:L, :B, :K, :1]
                new = new_LBKTH, (layer, row, head, index_BT[None, :, None])
                return offload.run_on_host(_set)(x_LBKSH, *jax.device_put(new, Space.Host))
            layer, row, _, head = jnp.ogrid[:L, :B, :1, :K]
            return _set(x_LBKSH, new_LBTKH, (layer, row, head, index_BT[None, :, :, None]))

        def add(held: KVArray, new_LBTKH: jax.Array) -> KVArray:
            return jax.tree.map(put, held, kv_quant.like(new_LBTKH, held))

        place = jnp.arange(B)[:, None], index_BT
        positions_BS = self.positions_BS.at[place].set(at.positions_BT, mode="drop")
        k_LBKSH, v_LBKSH = add(self.k_LBKSH, k_LBTKH), add(self.v_LBKSH, v_LBTKH)
        pages = None if self.pages is None else self.pages.add(k_LBTKH, index_BT)
        kept = dict(k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH, positions_BS=positions_BS, pages=pages)
        return dataclasses.replace(self, **kept)

    def sharding(self, rules: Rules) -> "LayerStack":
        """The PartitionSpec of each array."""
        kv = rules(None, "batch", "act_kv_heads", "kv_length", None)
        of_blocks = None if self.blocks is None else self.blocks.sharding(rules)
        k, v = (kv_quant.sharding(x, kv) for x in (self.k_LBKSH, self.v_LBKSH))
        pages = jax.tree.map(lambda _: kv, self.pages)
        at = rules("batch", "kv_length")
        return LayerStack(k, v, at, self.sinks, of_blocks, pages, self.host)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, over layers and heads."""
        kept = self.k_LBKSH, self.v_LBKSH
        return sum(tree.num_bytes(x) // (x.shape[1] * x.shape[3]) for x in kept)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """All slots, stage by stage, and how many tokens each row has seen."""

    slots: tuple[LayerStack, ...]
    seen_B: jax.Array  # int32

    def stored(self, slot: int, layer: jax.Array, fetched: Fetched = None) -> LayerCache:
        """Returns the view of a layer of `slot`; `fetched` is the result of `fetch` for it."""

        def stored(slot: LayerStack) -> LayerCache:
            of_blocks = None if slot.blocks is None else stored(slot.blocks)
            arrays = slot.k_LBKSH, slot.v_LBKSH, slot.positions_BS
            return LayerCache(*arrays, layer, self.seen_B, of_blocks, slot.pages)

        view = stored(self.slots[slot])
        if fetched is None:
            return view
        k_LBKSH, v_LBKSH = fetched
        return view._replace(k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH, layer=jnp.int32(0))

    def fetch(self, slot: int, layer: jax.Array, after: jax.Array) -> Fetched:
        """Begins to copy a layer's keys and values, [1, ...] of each, from the host to the device.

        None for a slot that is on the device. It begins when `after` is there, so that no more
        layers wait on the device than one is computed before.
        """
        held = self.slots[slot]
        if not held.host:
            return None
        layer, _ = jax.lax.optimization_barrier((layer, after))
        one = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=layer, slice_size=1)
        parts = jax.tree.map(one, (held.k_LBKSH, held.v_LBKSH))
        return jax.device_put(parts, Space.Device)

    def write(self, new: list[NewKV], at: Positions, rules: Rules) -> "KVCache":
        """The cache after the tokens at `at`; `new` is stacked over the layers of each slot.

        Every shard takes its own of the tokens that it is shown: all where `length` is whole, and
        where it is sharded those that were dealt to it.
        """
        assert rules.size("length") == 1 or rules.layout == "dealt", rules.layout
        row, tokens = rules("batch"), rules("batch", "length")
        cache_spec = KVCache(tuple(s.sharding(rules) for s in self.slots), row)
        new_specs = [_new_sharding(x, rules) for x in new]

        def write(cache, new, at):
            shard = Shard.here(rules)

            def add(slot: LayerStack, x: NewKV) -> LayerStack:
                slot = slot.write(x.k_BTKH, x.v_BTKH, at, cache.seen_B, shard)
                if slot.blocks is None:
                    return slot
                # Blocks have a slot for each that the text can have: none is out of reach.
                number = jax.tree.map(lambda x_LBE: x_LBE[0], x.blocks.at)
                arrays = x.blocks.k_BTKH, x.blocks.v_BTKH
                more = slot.blocks.write(*arrays, number, cache.seen_B * 0, shard)
                return dataclasses.replace(slot, blocks=more)

            slots = (add(s, x) for s, x in zip(cache.slots, new, strict=True))
            return KVCache(tuple(slots), cache.seen_B)

        end_BT = jnp.where(at.segments_BT > 0, at.positions_BT + 1, 0)
        seen_B = jnp.maximum(self.seen_B, end_BT.max(axis=1))
        return jax.shard_map(
            write,
            in_specs=(cache_spec, new_specs, Positions(tokens, tokens)),
            out_specs=cache_spec,
        )(KVCache(self.slots, seen_B), new, at._replace(until_BT=None))


def _new_sharding(new: NewKV, rules: Rules) -> NewKV:
    tokens = rules(None, "batch", "length", "act_kv_heads", None)
    if new.blocks is None:
        return NewKV(tokens, tokens)
    of_block, place = rules(None, "batch", None, "act_kv_heads", None), rules(None, "batch", None)
    return NewKV(tokens, tokens, NewKV(of_block, of_block, at=Positions(place, place)))


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
    """Undoes `deal`: returns the tokens on every device, in the order of the rows."""
    B, T = x_BT.shape
    P = rules.size("length")
    x_BT = jax.sharding.reshard(x_BT, rules("batch", None))
    x_BPT = jnp.roll(x_BT.reshape(B, P, T // P), -start, axis=1)
    return jnp.moveaxis(x_BPT, 1, 2).reshape(B, T)


def _set(x: jax.Array, new: jax.Array, place: tuple[jax.Array, ...]) -> jax.Array:
    return x.at[place].set(new, mode="drop")


def slot_sizes(
    config: ModelConfig, length: int, shards: int, form: CacheConfig = PLAIN
) -> list[tuple[int, int, int]]:
    """(layers, sinks, tokens kept with them), on each shard, of each slot for texts of `length`."""
    whole = math.ceil(length / shards)
    sizes = []
    for slots, layers in config.stages:
        for spec in slots:
            kept = spec.mask.kept
            # A shard has up to 1 / P, rounded up, of any tokens in sequence.
            sinks = math.ceil(spec.sinks / shards)
            size = sinks + math.ceil((kept - spec.sinks) / shards) if kept else whole
            if form.reads_pages(spec, whole, shards):
                sizes.append((layers, 0, math.ceil(whole / form.cache_page) * form.cache_page))
            else:
                sizes.append((layers, sinks, size) if size < whole else (layers, 0, whole))
    return sizes


def _blocks(spec: AttentionSpec, length: int) -> int:
    """Whole blocks that a text of `length` tokens has, for a kind that chooses among them."""
    size, step = (spec.compress, spec.step) if spec.kind == "nsa" else (spec.block, spec.block)
    return max(0, (length - size) // step + 1) if spec.top else 0


def kv_bytes(
    config: ModelConfig, batch: int, length: int, rules: Rules, form: CacheConfig = PLAIN
) -> int:
    """Bytes of keys and values, and of what chooses among them, that `create` allocates, over all
    devices.
    """
    planned = jax.eval_shape(lambda: create(config, batch, length, rules, form))
    slots = [x for slot in planned.slots for x in (slot, slot.blocks) if x is not None]
    return sum(tree.num_bytes((x.k_LBKSH, x.v_LBKSH, x.pages)) for x in slots)


def create(
    config: ModelConfig, batch: int, length: int, rules: Rules, form: CacheConfig = PLAIN
) -> KVCache:
    """An empty cache of this form for `batch` rows of up to `length` tokens.

    What is not quantised has the compute dtype, but on CPUs float32: XLA multiplies that where it
    lies, and widens the whole of what is narrower for each token (docs/performance.md).
    """
    kv = rules(None, "batch", "act_kv_heads", "kv_length", None)
    shards = rules.size("kv_length")
    dtype = jnp.float32 if device_kind() == "cpu" else config.compute_dtype

    def kept(shape: tuple[int, ...], kind: Numbers) -> KVArray:
        if kind == "compute":
            return jnp.zeros(shape, dtype, out_sharding=kv)
        return kv_quant.zeros(shape, BITS[kind], kv)

    def slot(layers: int, sinks: int, size: int, spec: AttentionSpec, make) -> LayerStack:
        size *= shards
        K, H = config.kv_shape(spec)
        k, v = make((layers, batch, max(K, rules.size("act_kv_heads")), size, H))
        sharding = rules("batch", "kv_length")
        at = jnp.full((batch, size), -1, jnp.int32, out_sharding=sharding)
        return LayerStack(k, v, at, sinks)

    def on_host(made: LayerStack) -> LayerStack:
        k, v = jax.device_put((made.k_LBKSH, made.v_LBKSH), Space.Host)
        return dataclasses.replace(made, k_LBKSH=k, v_LBKSH=v, host=True)

    def pages(shape: tuple[int, ...]) -> Pages:
        *rows, S, H = shape
        highest = float(jnp.finfo(dtype).max)
        low, high = (
            jnp.full((*rows, S // form.cache_page, H), x, dtype, out_sharding=kv)
            for x in (highest, -highest)
        )
        return Pages(low, high, form.cache_page, form.pages(shards))

    def tokens(shape):
        return kept(shape, form.k_cache), kept(shape, form.v_cache)

    def compressed(shape):
        return kept(shape, "compute"), kept(shape, "compute")

    def means(shape):  # of keys alone, by which MoBA chooses in float32
        shapes = shape, (*shape[:-1], 0)
        return tuple(jnp.zeros(shape, jnp.float32, out_sharding=kv) for shape in shapes)

    def with_blocks(sizes: tuple[int, int, int], spec: AttentionSpec) -> LayerStack:
        made = slot(*sizes, spec, tokens)
        if form.hosts(spec):
            made = on_host(made)
        if form.reads_pages(spec, math.ceil(length / shards), shards):
            made = dataclasses.replace(made, pages=pages(made.k_LBKSH.shape))
        if not spec.top:
            return made
        each = max(1, math.ceil(_blocks(spec, length) / shards))
        of_block = compressed if spec.kind == "nsa" else means
        return dataclasses.replace(made, blocks=slot(sizes[0], 0, each, spec, of_block))

    specs = [spec for slots, _ in config.stages for spec in slots]
    sizes = slot_sizes(config, length, shards, form)
    slots = tuple(with_blocks(*both) for both in zip(sizes, specs, strict=True))
    return KVCache(slots, jnp.zeros((batch,), jnp.int32, out_sharding=rules("batch")))
