"""Shapes, kinds, documents, meshes and orders that nobody thought of, drawn by Hypothesis.

Draws are derandomised: the same on every machine, until a field or a strategy is added.
"""

import pytest
from attention_runs import Run, assert_equal_to_one_device
from hypothesis import given, settings
from hypothesis import strategies as st

from core import layout
from model.attention import spec
from model.attention.block_topk import pairs
from model.attention.kernels import chunked
from model.attention.strategies import ulysses

ALIBI = st.sampled_from([0.0, 1.0])
KINDS = st.one_of(
    st.builds(spec.full, sink_logit=st.booleans(), softcap=st.sampled_from([0.0, 2.0])),
    st.builds(spec.sliding, st.integers(1, 30), sinks=st.integers(0, 5), alibi=ALIBI),
    st.builds(spec.chunked, st.integers(1, 20), sinks=st.integers(0, 5)),
    st.builds(
        spec.block_sparse,
        block=st.integers(1, 7),
        local=st.integers(1, 3),
        stride=st.integers(0, 4),
        sinks=st.integers(0, 8),
    ),
    st.builds(spec.dilated, st.integers(1, 9), st.integers(1, 5)),
    st.builds(spec.prefix, st.integers(1, 12), alibi=ALIBI),
    st.builds(spec.bidirectional, sink_logit=st.booleans()),
    st.builds(spec.moba, st.integers(1, 9), st.integers(1, 4)),
)


@st.composite
def runs(draw) -> Run:
    """Attention over up to 8 devices, of a few short documents."""
    sizes = draw(st.sampled_from([(1, 2, 1), (1, 3, 1), (1, 5, 1), (2, 2, 2), (1, 8, 1)]))
    data, seq, model = sizes
    K = model * draw(st.integers(1, 2))
    N = K * draw(st.integers(1, 3))
    strategy = draw(st.sampled_from(["ring", "allgather", "ulysses"]))
    if strategy == "ulysses" and not ulysses.deals(N // model, K // model, seq):
        strategy = "ring"
    order = draw(st.sampled_from(["contiguous", "zigzag", "striped", "multizigzag"]))
    length = 2 * seq * draw(st.integers(1, 5))  # two tiles a device, at least: what zigzag needs
    rows = []
    for _ in range(data):
        cuts = sorted(draw(st.sets(st.integers(1, length), max_size=4)))
        rows.append(tuple(b - a for a, b in zip([0, *cuts], cuts, strict=False)))
    return Run(draw(KINDS), tuple(rows), length, (N, K), strategy, sizes, order=order)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "MIN_BLOCK", 4)
        patch.setattr(chunked, "MAX_BLOCK", 4)
        patch.setattr(pairs, "TILE_ROWS", 8)
        patch.setattr(layout, "TILE", 1)
        yield


HOW = dict(deadline=None, derandomize=True, database=None)


@pytest.mark.slow
@settings(max_examples=40, **HOW)
@given(run=runs())
def test_many_shapes_equal_one_device(run):
    assert_equal_to_one_device(run)
