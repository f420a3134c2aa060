"""The decoder: embedding, a scan over each stage of the pattern, final norm, logits apart.

model = create(config, training(), jax.random.key(0))
hidden_BTD, _ = model(tokens_BT, positions_BT, segments_BT)
logits_BTV = model.logits(hidden_BTD)
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from core.config import UserError
from core.sharding import Rules
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec
from model.attention.strategies import local
from model.block import Block
from model.cache.flash_decode import NewKV
from model.cache.kv_cache import KVCache
from model.config import ModelConfig
from model.initializers import ParamInit
from model.layers.norm import Norm
from model.ops import quantised, rope
from model.ops.linear import product
from model.ops.quantised import Table

Remat = Literal["none", "dots", "attention", "offload", "full"]

LAYER = "layer"  # name of what goes into a group of layers
REMAT_POLICIES = {
    # What attention costs grows with the length: its output is always worth its memory.
    "attention": jax.checkpoint_policies.save_only_these_names(local.SAVED),
    # Products with weights are kept too; norms and activations are cheap to redo.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(local.SAVED),
    ),
    # The same, and the layers' inputs, in the host's memory till the backward asks for them.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[local.SAVED, LAYER],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nnx.Module):
    """A causal decoder of `config`, its arrays placed by `rules`."""

    def __init__(self, config: ModelConfig, rules: Rules, key: jax.Array):
        self.config, self.rules = config, rules
        make = ParamInit(config, rules, key)
        table = (config.vocab_size, config.embed_dim), ("vocab", "embed")
        self.embedding_VD = make.normal(0, *table)
        self.head_VD = None if config.tied_head else make.normal(1, *table)
        places = (config.context, config.embed_dim), (None, "embed")
        self.positions_PD = make.normal(2, *places) if config.learned_positions else None
        keys = (jax.random.fold_in(key, i) for i in itertools.count(1))
        self.stages = nnx.List(
            nnx.List(Block(ParamInit(config, rules, next(keys), layers), spec) for spec in slots)
            for slots, layers in config.stages
        )
        self.final_norm = Norm(make, config.embed_dim, config.norm)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        cache: KVCache | None = None,
        length_B: jax.Array | None = None,
        remat: Remat = "none",
        until_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """(hidden [B, T, D] after the final norm, the cache with these tokens added).

        Positions count inside each document; segment 0 is padding. With a cache the tokens also
        see what it holds, and must all belong to the one document that it holds. `length_B` is
        what each row's text will have come to, for RoPE that goes by the length; without it each
        document of a row counts as far as the row holds it. `until_BT` is the last position that
        each token sees: that of its image's last token, or of its prefix's; without it, its own.
        """
        at = Positions(positions_BT, segments_BT, until_BT)
        hidden_BTD, new = self.read(tokens_BT, at, cache, length_B, remat)
        if cache is None:
            return hidden_BTD, None
        return hidden_BTD, self.write(cache, new, at, hidden_BTD)

    def read(
        self,
        tokens_BT: jax.Array,
        at: Positions,
        cache: KVCache | None = None,
        length_B: jax.Array | None = None,
        remat: Remat = "none",
    ) -> tuple[jax.Array, list[NewKV]]:
        """`__call__` that leaves the cache alone: (hidden [B, T, D], what `write` adds to it)."""
        config, positions_BT = self.config, at.positions_BT
        x_BTD = self._embed(tokens_BT, positions_BT)
        # A dict, not a set: its order is the same in every process, so their programs are too.
        ropes = dict.fromkeys(
            (spec.rope, config.kv_shape(spec)[1]) for spec in config.pattern if spec.rope
        )
        lengths = None if length_B is None else length_B[:, None]
        if lengths is None and any(each.by_length for each, _ in ropes):
            lengths = document_lengths(at, self.rules)
        tables = {each: rope.table(positions_BT, *each, lengths) for each in ropes}
        new, slot = [], 0
        for blocks, (_, layers) in zip(self.stages, config.stages, strict=True):

            def group(carry, scanned, first_slot=slot, layers=layers):
                (x_BTD, fetched), (blocks, layer) = carry, scanned
                x_BTD, kvs = checkpoint_name(x_BTD, LAYER), []
                for i, block in enumerate(blocks):
                    stored = None
                    if cache is not None:
                        stored = cache.stored(first_slot + i, layer, fetched)
                        ahead = i + 1, layer
                        if i + 1 == len(blocks):
                            ahead = 0, jnp.minimum(layer + 1, layers - 1)
                        fetched = cache.fetch(first_slot + ahead[0], ahead[1], x_BTD)
                    spec = block.attention.spec
                    cos_sin = tables.get((spec.rope, config.kv_shape(spec)[1]))
                    x_BTD, kv = block(x_BTD, at, cos_sin, stored)
                    kvs.append(kv)
                return (x_BTD, fetched), (kvs if cache is not None else None)

            if remat != "none":
                group = jax.checkpoint(group, policy=REMAT_POLICIES[remat], prevent_cse=False)
            fetched = cache.fetch(slot, jnp.int32(0), x_BTD) if cache is not None else None
            (x_BTD, _), kvs = _scan(group, (x_BTD, fetched), blocks, layers)
            new, slot = new + (kvs or []), slot + len(blocks)
        return self.final_norm(x_BTD), new

    def write(
        self, cache: KVCache, new: list[NewKV], at: Positions, hidden_BTD: jax.Array
    ) -> KVCache:
        """The cache with tokens added that were read: those of segment 0 in `at` are not.

        `at` may leave out any of the last tokens of a row.
        """
        # A write that does not depend on the last read is done before it, on a copy of the whole
        # cache; a barrier is gone when XLA decides that. (And no NaN is kept for later tokens.)
        valid_BT = ~jnp.isnan(hidden_BTD[..., 0])
        at = at._replace(segments_BT=at.segments_BT * valid_BT)
        return cache.write(self._whole(cache, new, at), at, self.rules)

    def _whole(self, cache: KVCache, new: list[NewKV], at: Positions) -> list[NewKV]:
        """`new` without the blocks that only tokens which are left out had made whole."""
        end_BT = jnp.where(at.segments_BT > 0, at.positions_BT + 1, 0)
        end_B1 = jnp.maximum(cache.seen_B, end_BT.max(axis=1))[:, None]
        specs = [block.attention.spec for blocks in self.stages for block in blocks]

        def whole(x: NewKV, spec: AttentionSpec) -> NewKV:
            if x.blocks is None:
                return x
            size, step = (spec.compress, spec.step) if spec.kind == "nsa" else (spec.block,) * 2
            at = x.blocks.at
            is_whole_LBE = at.positions_BT * step + size <= end_B1[None]
            at = at._replace(segments_BT=at.segments_BT * is_whole_LBE)
            return x._replace(blocks=x.blocks._replace(at=at))

        return [whole(x, spec) for x, spec in zip(new, specs, strict=True)]

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """[B, T, D] in the compute dtype."""
        dtype, place = self.config.compute_dtype, self.rules("batch", "length", "act_embed")

        def look_up(table: nnx.Param, rows: str | None, index_BT: jax.Array) -> jax.Array:
            # FSDP: the table is gathered before use; looking up in a table that is sharded on
            # both dims makes XLA replicate the result first.
            if isinstance(table[...], Table):
                return quantised.look_up(table[...], index_BT, place).astype(dtype)
            table = jax.sharding.reshard(table[...], self.rules(rows, None))
            rows_BTD = table.at[index_BT].get(out_sharding=place)
            if table.dtype == jnp.uint16:  # bits of bfloat16: see infer.layout
                return jax.lax.bitcast_convert_type(rows_BTD, jnp.bfloat16)
            return rows_BTD.astype(dtype)

        x_BTD = look_up(self.embedding_VD, "vocab", tokens_BT)
        if self.config.embed_scale != 1:  # rounded as the table is: Gemma was trained so
            x_BTD = x_BTD * jnp.asarray(self.config.embed_scale, dtype)
        if self.positions_PD is not None:
            x_BTD = x_BTD + look_up(self.positions_PD, None, positions_BT)
        return x_BTD

    def head(self) -> jax.Array:
        """The output table [V, D] in the compute dtype, whole but for the vocabulary's shards."""
        table = self.embedding_VD if self.head_VD is None else self.head_VD
        table_VD = table[...].astype(self.config.compute_dtype)
        return jax.sharding.reshard(table_VD, self.rules("vocab", None))

    def logits(self, hidden_D: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden [..., D]."""
        table = (self.embedding_VD if self.head_VD is None else self.head_VD)[...]
        if isinstance(table, Table):
            logits_V = quantised.logits(hidden_D, table)
        else:
            dims = "BTD"[-hidden_D.ndim :]
            logits_V = product(f"{dims},VD->{dims[:-1]}V", hidden_D, self.head(), jnp.float32)
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits_V / cap) if cap else logits_V


def document_lengths(at: Positions, rules: Rules) -> jax.Array:
    """Returns for each token, [B, T], the length of its document up to the end of the row.

    The tokens of a document may lie on several shards of `length`, in any order.
    """
    over = rules.axes("length")

    def local(positions_BT, segments_BT):
        # A row of T tokens has at most T documents, numbered from 1; 0 is padding.
        B, T = segments_BT.shape
        row_B1 = jnp.arange(B)[:, None]
        zeros = jnp.zeros((B, T * rules.size("length") + 1), jnp.int32)
        lengths = zeros.at[row_B1, segments_BT].max(positions_BT + 1)
        if over:  # empty where every device has whole rows
            lengths = jax.lax.pmax(lengths, over)
        return lengths[row_B1, segments_BT]

    tokens = rules("batch", "length")
    return jax.shard_map(local, in_specs=(tokens, tokens), out_specs=tokens)(*at[:2])


def _scan(group: Callable, carry: Any, blocks: Any, layers: int) -> tuple[Any, Any]:
    """lax.scan over the layers; what is a single one is no loop, in which XLA would copy it."""
    if layers > 1:
        return jax.lax.scan(group, carry, (blocks, jnp.arange(layers)))
    only = jax.tree.map(lambda x_1: x_1[0], blocks), jnp.int32(0)
    carry, kvs = group(carry, only)
    return carry, jax.tree.map(lambda x: x[None], kvs)


def check_mesh(config: ModelConfig, rules: Rules) -> None:
    """UserError unless heads, MLP and vocabulary divide over the mesh in use."""
    shards = rules.size("act_heads")
    for name, size in (
        ("num_heads", config.num_heads),
        ("mlp_dim", config.mlp_dim),
        ("vocab_size", config.vocab_size),
    ):
        if size % shards:
            raise UserError(f"model.{name}={size} does not divide over mesh.model={shards}")
    for K, _ in map(config.kv_shape, config.pattern):
        if K % shards and shards % K:
            raise UserError(
                f"model.num_kv_heads={K} and mesh.model={shards}: "
                "one must be a multiple of the other"
            )
    if config.embed_dim % rules.size("embed"):
        raise UserError(
            f"model.embed_dim={config.embed_dim} does not divide over the {rules.size('embed')} "
            "devices of mesh.data x mesh.seq that shard the weights"
        )


def create(config: ModelConfig, rules: Rules, key: jax.Array) -> Transformer:
    """A new model; each parameter is born where `rules` put it, and is never whole elsewhere."""
    check_mesh(config, rules)
    return Transformer(config, rules, key)


def abstract(config: ModelConfig, rules: Rules) -> Transformer:
    """The same model with shapes, dtypes and shardings in place of arrays."""
    check_mesh(config, rules)
    return jax.eval_shape(lambda: Transformer(config, rules, jax.random.key(0)))
