"""Every field of a model's config changes its program or its parameters."""

import dataclasses
import functools

import jax
import pytest
from conftest import make_mesh
from test_model_transformer import ONE, SMALL, batch, place

from core import sharding, tree
from model import transformer
from model.attention.spec import (
    AttentionSpec,
    block_sparse,
    chunked,
    dilated,
    full,
    moba,
    nsa,
    prefix,
    sliding,
)
from model.config import ModelConfig
from model.ops.rope import Rope

# Each field at another value that is valid, given the rest of SMALL.
FLIPS = {
    "vocab_size": 128,
    "context": 128,
    "num_layers": 3,
    "embed_dim": 32,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 4,
    "mlp_dim": 64,
    "pattern": (full(),),
    "block": "parallel",
    "mlp": "plain",
    "activation": "gelu",
    "bias": ("out",),
    "norm": "layer",
    "norm_eps": 1e-3,
    "qk_norm": True,
    "value_norm": True,
    "query_scale": 0.5,
    "layer_scale": True,
    "learned_positions": True,
    "embed_scale": 4.0,
    "tied_head": False,
    "logit_softcap": 30.0,
    "init_scale": 0.1,
    "attention_kernel": "chunked",
    "dtype": "bfloat16",
    "param_dtype": "bfloat16",
}
# Fields that matter where another has this value alone.
WITH = {"context": dict(learned_positions=True)}
SPEC_FLIPS = {  # field: two specs that differ in it
    "kind": (sliding(6), chunked(6)),
    "window": (sliding(6), sliding(5)),
    "chunk": (chunked(6), chunked(5)),
    "block": (block_sparse(3, 2), block_sparse(4, 2)),
    "local": (block_sparse(3, 2), block_sparse(3, 3)),
    "dilation": (dilated(4, 2), dilated(4, 3)),
    "stride": (block_sparse(3, 2), block_sparse(3, 2, stride=4)),
    "prefix": (prefix(3), prefix(4)),
    "top": (moba(4, 2), moba(4, 3)),
    "compress": (nsa(4, 3, 8, 4, 2), nsa(4, 3, 8, 2, 2)),
    "step": (nsa(4, 3, 8, 4, 2), nsa(4, 3, 8, 4, 4)),
    "sinks": (sliding(6), sliding(6, sinks=2)),
    "sink_logit": (full(), full(sink_logit=True)),
    "alibi": (full(alibi=0.5), full(alibi=1.0)),
    "rope": (full(), full(rope=None)),
    "kv_heads": (full(), full(kv_heads=1)),
    "head_dim": (full(), full(head_dim=16)),
    "shared_kv": (full(), full(shared_kv=True)),
    "softcap": (full(), full(softcap=5.0)),
}
YARN = dict(scaling="yarn", factor=4.0, original=1024)
LONG = dict(scaling="longrope", original=16)
ROPE_FLIPS = {
    "base": (Rope(), Rope(500.0)),
    "scaling": (Rope(**YARN), Rope(**{**YARN, "scaling": "llama3"})),
    "factor": (Rope(**YARN), Rope(**{**YARN, "factor": 2.0})),
    "original": (Rope(**YARN), Rope(**{**YARN, "original": 512})),
    "slow": (Rope(**YARN), Rope(**YARN, slow=4.0)),
    "fast": (Rope(**YARN), Rope(**YARN, fast=8.0)),
    "truncate": (Rope(**YARN), Rope(**YARN, truncate=False)),
    "fraction": (Rope(), Rope(fraction=0.5)),
    "attention_factor": (Rope(), Rope(attention_factor=1.5)),
    "short": (
        Rope(**LONG, short=(1.0,) * 4, long=(2.0,) * 4),
        Rope(**LONG, short=(1.5,) * 4, long=(2.0,) * 4),
    ),
    "long": (
        Rope(**LONG, short=(1.0,) * 4, long=(2.0,) * 4),
        Rope(**LONG, short=(1.0,) * 4, long=(2.5,) * 4),
    ),
}


@functools.cache
def program(config: ModelConfig):
    """The parameter tree, and the lowered text of initialisation and of a forward pass."""
    with jax.set_mesh(make_mesh(ONE)):
        model = transformer.abstract(config, sharding.training())
        leaves = {n: (x.shape, x.dtype) for n, x in tree.named_leaves(model).items()}
        make = functools.partial(transformer.Transformer, config, sharding.training())
        args = place(sharding.training(), batch())
        texts = (
            jax.jit(make).lower(jax.random.key(0)).as_text(),
            jax.jit(lambda m, *a: m.logits(m(*a)[0])).lower(model, *args).as_text(),
        )
        return leaves, texts


def test_every_field_is_flipped():
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(FLIPS) == names
    assert set(SPEC_FLIPS) == {field.name for field in dataclasses.fields(AttentionSpec)}
    assert set(ROPE_FLIPS) == {field.name for field in dataclasses.fields(Rope)}
    assert len(names) < 30


def test_an_equal_config_gives_an_equal_program():
    first = program(SMALL)
    program.cache_clear()
    assert program(dataclasses.replace(SMALL)) == first


@pytest.mark.parametrize("name", FLIPS)
def test_every_model_field_changes_the_program(name):
    base = dataclasses.replace(SMALL, **WITH.get(name, {}))
    flipped = dataclasses.replace(base, **{name: FLIPS[name]})
    assert getattr(flipped, name) != getattr(base, name)
    assert program(flipped) != program(base)


def test_each_kind_of_block_is_another_program():
    kinds = ("sequential", "sandwich", "parallel", "parallel_norms")
    programs = [program(dataclasses.replace(SMALL, block=kind)) for kind in kinds]
    assert all(a != b for i, a in enumerate(programs) for b in programs[:i])


@pytest.mark.parametrize("name", ROPE_FLIPS)
def test_every_rope_field_changes_the_program(name):
    one, other = ROPE_FLIPS[name]
    assert getattr(one, name) != getattr(other, name)
    one, other = (dataclasses.replace(SMALL, pattern=(full(rope=x),)) for x in (one, other))
    assert program(one) != program(other)


@pytest.mark.parametrize("name", SPEC_FLIPS)
def test_every_attention_field_changes_the_program(name):
    one, other = SPEC_FLIPS[name]
    assert getattr(one, name) != getattr(other, name)
    one, other = (dataclasses.replace(SMALL, pattern=(spec,)) for spec in (one, other))
    assert program(one) != program(other)
