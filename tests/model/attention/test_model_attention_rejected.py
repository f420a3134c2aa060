"""Pairs of features that MaxText's config refuses to run (src/maxtext/configs, e591f30): all pass.

Left out is what is not there at all: dropout, multi-token prediction, MLA, QK-clip, images.
Prefill and decode over a sharded length are in test_model_cache.py.
"""

import pytest
from attention_runs import Run, assert_equal_to_one_device

from core import layout
from model.attention import spec
from model.attention.kernels import chunked

ONE, PACKED = ((48,),), ((7, 1, 28, 12),)
FOUR = (1, 4, 1)


def ring(what, rows=ONE, length=48, heads=(4, 2), sizes=FOUR, order="zigzag", **where) -> Run:
    return Run(what, rows, length, heads, "ring", sizes, order=order, **where)


def ulysses(what, rows=ONE, heads=(4, 4), sizes=FOUR, order="contiguous") -> Run:
    return Run(what, rows, 48, heads, "ulysses", sizes, order=order)


PAIRS = {
    "ring on a CPU": ring(spec.full()),
    "ring, S is no multiple of P squared": ring(spec.full(), ((40,),), 40),
    "ring, odd P, balanced": ring(spec.full(), sizes=(1, 3, 1)),
    "ring, sliding window": ring(spec.sliding(9)),
    "ring, sliding window, packed documents": ring(spec.sliding(9), PACKED),
    "ring, chunks": ring(spec.chunked(10)),
    "ring, attention sinks": ring(spec.sliding(9, sinks=3)),
    "ring, learned sinks": ring(spec.full(sink_logit=True)),
    "ring, soft-cap and packing": ring(spec.full(softcap=3.0), PACKED),
    "ring, MoBA": ring(spec.moba(4, 3)),
    "ring, MoBA, packed documents": ring(spec.moba(4, 3), PACKED),
    "ring, bidirectional": ring(spec.bidirectional(), PACKED),
    "ring, any balanced order": ring(spec.full(), PACKED, order="striped"),
    "ulysses, MQA": ulysses(spec.full(), heads=(4, 1)),
    "ulysses, fewer kv heads than devices": ulysses(spec.full(), heads=(8, 2)),
    "ulysses, balanced order": ulysses(spec.full(), order="zigzag"),
    "ulysses, sliding window": ulysses(spec.sliding(9)),
    "ulysses, chunks, packed documents": ulysses(spec.chunked(10), PACKED),
    "ulysses, learned sinks": ulysses(spec.full(sink_logit=True)),
    "ulysses, MoBA": ulysses(spec.moba(4, 3)),
    "ulysses and model-parallel heads": ulysses(spec.full(), heads=(8, 4), sizes=(1, 2, 2)),
    "ring x ulysses, a factor of 1": ring(spec.full(), sizes=(1, 2, 1), ulysses=2),
    "ring x ulysses, MQA": ring(spec.full(), heads=(4, 1), ulysses=2),
    "ring x ulysses, sliding window, balanced": ring(spec.sliding(9), ulysses=2),
    "ring x ulysses, sinks, packed documents": ring(
        spec.sliding(9, sinks=3, sink_logit=True), PACKED, ulysses=2
    ),
    "ring x ulysses, MoBA": ring(spec.moba(4, 3), ulysses=2),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(chunked, "MIN_BLOCK", 4)
    monkeypatch.setattr(chunked, "MAX_BLOCK", 4)
    monkeypatch.setattr(layout, "TILE", 2)


QUICK = [  # each strategy with some kinds; the other pairs are slow
    "ring, sliding window, packed documents",
    "ring, MoBA, packed documents",
    "ring, any balanced order",
    "ulysses, fewer kv heads than devices",
    "ulysses, balanced order",
    "ulysses, chunks, packed documents",
    "ring x ulysses, MQA",
    "ring x ulysses, sinks, packed documents",
]


@pytest.mark.parametrize(
    "pair", [pytest.param(x, marks=[pytest.mark.slow] * (x not in QUICK)) for x in PAIRS]
)
def test_a_pair_that_maxtext_rejects(pair):
    assert_equal_to_one_device(PAIRS[pair])
