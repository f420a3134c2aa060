"""Every kind of attention over every strategy, and what a spec refuses."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from attention_runs import Run, assert_equal_to_one_device, results
from conftest import sampled, small_tiles

from core import sharding
from core.config import UserError
from model.attention.kernels import chunked
from model.attention.mask import Positions
from model.attention.spec import (
    AttentionSpec,
    bidirectional,
    block_sparse,
    dilated,
    full,
    moba,
    prefix,
    sliding,
    stream,
)
from model.attention.spec import chunked as in_chunks
from model.attention.strategies.table import AttentionCall
from model.cache import cached
from model.ops.rope import Rope

LENGTH, N, K, H = 48, 4, 2, 8
KINDS = {
    "bidirectional": bidirectional(),
    "chunked": in_chunks(10, sink_logit=True),
    "sliding": sliding(5, sinks=3, sink_logit=True, alibi=1.0),
    "block_sparse": block_sparse(3, 2, stride=3, sinks=4),
    "dilated": dilated(4, 3),
    "prefix": prefix(9, alibi=1.0),
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


@pytest.mark.parametrize(
    ("kind", "spread"),
    [  # each kind over two strategies; the other two are slow
        pytest.param(*pair, marks=[pytest.mark.slow] * ((i + i // len(SPREADS)) % 2))
        for i, pair in enumerate(itertools.product(KINDS, SPREADS))
    ],
)
def test_every_kind_over_every_strategy(kind, spread):
    check(kind, spread, "chunked")


@pytest.mark.parametrize(
    ("kernel", "kind", "spread"),
    [
        ("splash", "sliding", "ring"),
        ("splash", "prefix", "ring x ulysses"),
        ("gpu", "sliding", "ring"),
        ("gpu", "prefix", "ring x ulysses"),
    ],
)
def test_pallas_over_strategies(kernel, kind, spread):
    check(kind, spread, kernel)


@pytest.mark.parametrize(
    ("kind", "spread", "kernel"), sampled(itertools.product(KINDS, SPREADS, ["splash", "gpu"]), 3)
)
def test_pallas_with_every_kind_over_every_strategy(kind, spread, kernel):
    check(kind, spread, kernel)


@pytest.mark.parametrize(
    ("spec", "spread", "order", "until"),
    [
        (sliding(5), "ring", "zigzag", "groups"),
        (full(), "ring x ulysses", "contiguous", "groups"),
        (full(softcap=2.0), "allgather", "striped", "prefixes"),
        (sliding(7), "ulysses", "contiguous", "prefixes"),
    ],
)
def test_tokens_that_see_later_ones_over_every_strategy(spec, spread, order, until):
    """Also where those stand on another shard than a window would reach."""
    check(spec, spread, "chunked", order=order, until=until)


def check(kind, spread, kernel, **how):
    strategy, ulysses, sizes = SPREADS[spread]
    how |= dict(strategy=strategy, ulysses=ulysses, sizes=sizes, kernel=kernel)
    run = Run(KINDS.get(kind, kind), ((7, 1, 28, 12), (LENGTH,)), LENGTH, (N, K), **how)
    assert all(np.abs(x).max() > 0 for x in results(run) if x is not None)
    assert_equal_to_one_device(run)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="sliding"), "kind='sliding' with window=0"),
        (dict(window=4), "window belongs to kind='sliding'"),
        (dict(window=4, kind="bidirectional", top=2), "top belongs to kind='moba'"),
        (dict(kind="block_sparse", block=4), "local=0"),
        (
            dict(kind="sliding", window=4, stride=2),
            "stride=2: stride belongs to kind='block_sparse'",
        ),
        (dict(sinks=2), "sinks=2: sinks belongs to kind='sliding' or"),
        (dict(alibi=1.0, softcap=3.0), "alibi with a softcap"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(UserError, match=message):
        AttentionSpec(**fields)


@pytest.mark.parametrize("spec", [moba(4, 2), stream(4, 2)])
def test_until_is_refused_where_the_past_is_chosen_from(spec):
    q = jnp.zeros((1, 8, N, H))
    at = Positions(*jnp.zeros((3, 1, 8), jnp.int32))
    with pytest.raises(NotImplementedError, match=f"kind='{spec.kind}' with tokens that see later"):
        AttentionCall.of(q, q, at, spec, "reference", sharding.whole())


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
        cached.attend_cached(q, q, q, None, None, spec, kernel="reference", rules=sharding.whole())


def test_everywhere_keeps_the_scores_and_drops_the_limits():
    spec = block_sparse(3, 2, stride=3, sinks=4, softcap=2.0, rope=Rope(7.0), sink_logit=True)
    assert spec.everywhere() == full(softcap=2.0, rope=Rope(7.0), sink_logit=True)
