"""Every family is itself: logits against transformers' (golden/make.py), to 1e-4 in float32."""

import dataclasses
import functools

import family_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh, quick
from family_cases import PROMPT

from core import sharding
from model import families
from model.ops.rope import Rope

ONE, MESH = (1, 1, 1), (2, 2, 2)
LIMIT = 1e-4
SCALED = [f"llama-{x}" for x in ("3", "3.1", "linear", "dynamic", "yarn", "longrope")]
SCALED += ["llama-yarn-mscale", "llama-longrope-short"]
# Of what differs from another in one thing alone, the rest is slow.
VARIATIONS = {
    *("llama-3", "llama-3.2", "llama-biases", "llama-linear", "llama-yarn-mscale"),
    *("llama-longrope-short", "mistral-full", "qwen-2", "falcon-11b", "falcon-biases"),
}
# On the mesh: kinds of blocks, of positions, of fused tensors; as many kv heads as shards and
# fewer; windows; RoPE by the length of the text.
SHARDED = ("gpt2", "llama-dynamic", "falcon-7b", "falcon-rw", "gemma-2")
# What a golden must notice when it is not so: fields of the config, or of each slot.
NOTICED = [
    ("gpt2", dict(activation="gelu")),
    ("gpt2", dict(norm_eps=1e-2)),
    ("falcon-7b", dict(activation="gelu_tanh")),
    ("gemma-1", dict(norm="rms")),
    ("gemma-1", dict(embed_scale=1.0)),
    ("gemma-2", dict(query_scale=0.0)),
    ("gemma-2", dict(logit_softcap=0.0)),
    ("gemma-4", dict(value_norm=False)),
    ("gemma-4", dict(query_scale=0.0)),
    ("falcon-rw", dict(slots=dict(alibi=1.0))),
    ("gemma-2", dict(slots=dict(softcap=0.0))),
    ("gemma-3", dict(slots=dict(rope=Rope(1000.0)))),
    ("gemma-4", dict(slots=dict(rope=Rope(1e6)))),
    *((name, dict(slots=dict(kind="full", window=0))) for name in ("mistral", "qwen-2-window")),
    *(
        (name, dict(slots=dict(kind="full", window=0)))
        for name in ("gemma-2", "gemma-3", "gemma-4")
    ),
    *((name, dict(slots=dict(rope=Rope()))) for name in cases.NAMES if name in SCALED),
]


@functools.cache
def opened(name, sizes, rules, checkpoints, **fields):
    return cases.opened(name, checkpoints, rules, **fields)


def full_forward(name, sizes, checkpoints, **fields):
    """Logits [B, T, V] in one pass, sharded as in training."""
    tokens = cases.golden(name).tokens
    rules = sharding.training()
    with jax.set_mesh(make_mesh(sizes)):
        model = opened(name, sizes, rules, checkpoints, **fields)
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        place = rules("batch", "length")
        args = (jax.device_put(x, place) for x in (tokens, positions, np.ones_like(tokens)))
        return np.asarray(jax.jit(lambda model, *args: model.logits(model(*args)[0]))(model, *args))


def through_the_cache(name, sizes, checkpoints):
    """Logits [B, new + 1, V] of the last token of the prompt, read in chunks, and of the new."""
    with jax.set_mesh(make_mesh(sizes)):
        model = opened(name, sizes, sharding.prefilling(), checkpoints)
        return cases.through_the_cache(model, cases.golden(name).tokens)


def assert_is_itself(name, sizes, checkpoints):
    golden = cases.golden(name)
    full = full_forward(name, sizes, checkpoints)
    assert np.abs(full - golden.logits).max() < LIMIT
    cached = through_the_cache(name, sizes, checkpoints)
    assert np.abs(cached - golden.logits[:, PROMPT - 1 :]).max() < LIMIT
    np.testing.assert_array_equal(cached[:, :-1].argmax(-1), golden.tokens[:, PROMPT:])


@pytest.mark.parametrize("name", sorted({*cases.NAMES} - VARIATIONS))
def test_logits_and_greedy_tokens_are_those_of_transformers(name, checkpoints):
    assert_is_itself(name, ONE, checkpoints)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VARIATIONS))
def test_those_of_variations_are_too(name, checkpoints):
    assert_is_itself(name, ONE, checkpoints)


@pytest.mark.parametrize("name", quick(SHARDED, 3))
def test_they_are_on_a_mesh(name, checkpoints):
    assert_is_itself(name, MESH, checkpoints)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*cases.NAMES} - {*SHARDED}))
def test_every_other_is_on_a_mesh(name, checkpoints):
    assert_is_itself(name, MESH, checkpoints)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields"), NOTICED, ids=str)
def test_a_golden_notices_what_is_otherwise(name, fields, checkpoints):
    slots = fields.get("slots")
    if slots:
        pattern = families.read(cases.golden(name).config).pattern
        fields = dict(pattern=tuple(dataclasses.replace(spec, **slots) for spec in pattern))
    logits = full_forward(name, ONE, checkpoints, **fields)
    assert np.abs(logits - cases.golden(name).logits).max() > 3 * LIMIT
