"""Every kind of attention over every strategy, and what a spec refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import documents
from conftest import make_mesh, small_tiles
from tolerances import assert_close

from core import sharding
from core.config import UserError
from model.attention import attend, chunked
from model.attention.spec import (
    AttentionSpec,
    Heads,
    Where,
    bidirectional,
    block_sparse,
    full,
    prefix,
    sliding,
)
from model.attention.spec import chunked as in_chunks

LENGTH, N, K, H = 48, 4, 2, 8
KINDS = {
    "bidirectional": bidirectional(),
    "chunked": in_chunks(10, sink_logit=True),
    "sliding": sliding(5, sinks=3, sink_logit=True, alibi=True),
    "block_sparse": block_sparse(3, 2, stride=3, sinks=4),
    "prefix": prefix(9, alibi=True),
}
SPREADS = {  # (strategy, neighbours that exchange heads, mesh)
    "allgather": ("allgather", 1, (1, 4, 1)),
    "ring": ("ring", 1, (2, 3, 1)),
    "ulysses": ("ulysses", 1, (1, 2, 2)),
    "ring x ulysses": ("ring", 2, (2, 4, 1)),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(chunked, "MIN_BLOCK", 4)
    monkeypatch.setattr(chunked, "MAX_BLOCK", 4)
    small_tiles(monkeypatch, 4)


@functools.cache
def attended(kind: str, strategy: str, ulysses: int, sizes: tuple[int, int, int], kernel: str):
    """(out, dq, dk, dv, dsink) of packed rows; the last is None without sinks."""
    spec, draw = KINDS[kind], np.random.default_rng(0)
    arrays = [draw.standard_normal((2, LENGTH, n, H)).astype(np.float32) for n in (N, K, K, N)]
    sink = np.linspace(-1, 2, N, dtype=np.float32) if spec.sink_logit else None
    slope = 2.0 ** -np.arange(1, N + 1, dtype=np.float32) if spec.alibi else None
    with jax.set_mesh(make_mesh(sizes)):
        rules = sharding.training(strategy, ulysses)
        at = documents((7, 1, 28, 12), (LENGTH,), length=LENGTH)
        at = Where(*(jax.device_put(x, rules("batch", "length")) for x in at))
        place = rules("batch", "length", "act_heads", None)
        q, k, v, dout = (jax.device_put(x, place) for x in arrays)
        heads = Heads(sink, slope)
        heads = jax.tree.map(lambda x: jax.device_put(x, rules("act_heads")), heads)

        @jax.jit
        def run(q, k, v, dout, sink):
            def out(q, k, v, sink):
                each = heads._replace(sink_N=sink)
                return attend.attend(q, k, v, at, spec, kernel=kernel, rules=rules, heads=each)

            result, pull = jax.vjp(out, q, k, v, sink)
            return result, *pull(dout)

        return jax.tree.map(np.asarray, run(q, k, v, dout, heads.sink_N))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_over_every_strategy(kind, spread):
    assert_equals_one_device(kind, spread, "chunked")


@pytest.mark.parametrize(("kind", "spread"), [("sliding", "ring"), ("prefix", "ring x ulysses")])
def test_splash_over_strategies(kind, spread):
    assert_equals_one_device(kind, spread, "splash")


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("kind", KINDS)
def test_splash_with_every_kind_over_every_strategy(kind, spread):
    assert_equals_one_device(kind, spread, "splash")


def assert_equals_one_device(kind, spread, kernel):
    expected = attended(kind, "local", 1, (1, 1, 1), "reference")
    actual = attended(kind, *SPREADS[spread], kernel)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsink"), actual, expected, strict=True):
        if b is not None:
            assert np.abs(b).max() > 0
            assert_close(a, b, "attention", what=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="sliding"), "kind='sliding' with window=0"),
        (dict(window=4), "window goes with kind='sliding'"),
        (dict(kind="chunked", window=4), "window goes with kind='sliding'"),
        (dict(kind="block_sparse", block=4), "local=0"),
        (dict(kind="sliding", window=4, stride=2), "stride=2 goes with kind='block_sparse'"),
        (dict(sinks=2), "sinks=2: kind='full' sees the first tokens anyway"),
        (dict(alibi=True, softcap=3.0), "alibi=True with a softcap"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(UserError, match=message):
        AttentionSpec(**fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (bidirectional(), "kind='bidirectional' sees what comes later.*kind='full' or 'prefix'"),
        (prefix(9), "prefix=9 in prefill chunks of 4 tokens: a chunk must hold the whole prefix"),
    ],
)
def test_a_cache_refuses_what_it_cannot_hold(spec, message):
    q = jnp.zeros((1, 4, N, H))
    with pytest.raises(NotImplementedError, match=message):
        attend.attend_cached(q, q, q, None, None, spec, kernel="reference", rules=sharding.whole())


def test_everywhere_keeps_the_scores_and_drops_the_limits():
    spec = block_sparse(3, 2, stride=3, sinks=4, softcap=2.0, rope_base=7.0, sink_logit=True)
    assert spec.everywhere() == full(softcap=2.0, rope_base=7.0, sink_logit=True)
