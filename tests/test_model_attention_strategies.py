"""Every strategy over a sharded length equals one device."""

import functools

import jax
import numpy as np
import pytest
from attention_cases import documents
from conftest import make_mesh
from tolerances import assert_close

from core import sharding
from core.config import UserError
from model.attention.attend import attend
from model.attention.spec import Where, full, sliding

STRATEGY_SPECS = (full(), sliding(7, softcap=2.0))


@functools.cache
def attended(strategy: str, sizes: tuple[int, int, int], kernel: str):
    """(out, gradients) of packed rows on a mesh, over both specs."""
    length, N, K = 48, 4, 2
    q, dout = np.random.default_rng(1).standard_normal((2, 2, length, N, 8)).astype(np.float32)
    k, v = np.random.default_rng(2).standard_normal((2, 2, length, K, 8)).astype(np.float32)
    at = documents((7, 1, 20, 12), (48,), length=length)
    with jax.set_mesh(make_mesh(sizes)):
        rules = sharding.training(strategy)
        place = rules("batch", "length", "act_heads", None)
        q, k, v, dout = (jax.device_put(x, place) for x in (q, k, v, dout))
        at = Where(*(jax.device_put(x, rules("batch", "length")) for x in at))

        @jax.jit
        def run(q, k, v, dout):
            def out(q, k, v):
                return [attend(q, k, v, at, s, kernel=kernel, rules=rules) for s in STRATEGY_SPECS]

            outs, pull = jax.vjp(out, q, k, v)
            return outs, pull([dout, dout])

        results = run(q, k, v, dout)
        assert results[0][0].sharding.spec == place
        return jax.tree.leaves(jax.tree.map(np.asarray, results))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 1), (1, 4, 1), (1, 3, 1)], ids=str)
def test_allgather_equals_local(sizes):
    expected = attended("local", (1, 1, 1), "reference")
    for actual, exact in zip(attended("allgather", sizes, "reference"), expected, strict=True):
        assert_close(actual, exact, "attention")


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_auto_takes_what_is_right(sizes):
    expected = attended("local", (1, 1, 1), "reference")
    for actual, exact in zip(attended("auto", sizes, "auto"), expected, strict=True):
        assert_close(actual, exact, "attention")


def test_local_refuses_a_sharded_length():
    with pytest.raises(
        NotImplementedError, match=r"(?s)'local'.*2 shards.*'allgather'.*mesh.seq=1"
    ):
        attended("local", (1, 2, 1), "reference")


def test_unknown_kernel_is_refused():
    with pytest.raises(UserError, match="attention_kernel='dense' is not one of auto, reference"):
        attended("local", (1, 1, 1), "dense")
