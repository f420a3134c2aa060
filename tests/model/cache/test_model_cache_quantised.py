"""Caches in 8 and 4 bits: what is read from them is off by no more than is stated.

Old tokens are read from the cache, as `test_model_cache` has them; new ones are not quantised.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_model_cache as cases
from conftest import make_mesh, quick
from test_model_cache import How

from core import tree
from model.cache import kv_cache, kv_quant
from model.cache.form import BITS, CacheConfig

FORMS = [CacheConfig(k_cache=k, v_cache=v) for k, v in (("int8", "int8"), ("int4", "int4"))]
MIXED = [
    CacheConfig(k_cache=k, v_cache=v)
    for k, v in (("int8", "int4"), ("int4", "int8"), ("int8", "compute"))
]
INT8, INT4 = FORMS
HOWS = (
    How("full", (1, 1, 1), form=INT8),
    How("full", (1, 1, 1), form=INT4),
    How("full", (2, 2, 2), "auto", form=INT8),
    How("full", (1, 3, 1), "allgather", heads=(6, 3), form=INT8),
    How("sinks", (1, 8, 1), form=INT4),
    How("sliding", (1, 2, 1), "ring", heads=(8, 1), form=INT8),
    *(How("full", (1, 2, 1), form=form) for form in MIXED),
)
# Of the root mean square of what attention gives, over some 30 old keys and as many new ones.
STATED = {"compute": 1e-5, "int8": 0.012, "int4": 0.2}

small_blocks = cases.small_blocks


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_vector_is_off_by_half_a_step(bits, dtype):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((500, 16)) * 10.0 ** draw.integers(-8, 8, (500, 1))
    x[0] = 0
    x = jnp.asarray(x, dtype)
    held = kv_quant.quantise(x, bits)
    assert held.x.dtype == jnp.int8 and held.scale.dtype == jnp.bfloat16
    assert held.x.nbytes == x.size * bits // 8 and held.shape == x.shape
    exact, back = (np.asarray(a, np.float64) for a in (x, kv_quant.dequantise(held, "float32")))
    largest = np.abs(exact).max(-1, keepdims=True)
    error = np.abs(back - exact)
    assert (error <= kv_quant.ERROR[bits] * largest * (1 + 1e-6)).all()
    assert error.max() > 0.9 * kv_quant.ERROR[bits] * largest[error.max(-1).argmax()]
    assert (back[0] == 0).all()


def bound(how: How) -> np.ndarray:
    """Of |error| of attention's output [2, NEW, N, 1], whatever the keys and values are.

    Scores are off by d at most: weights by a factor exp(2 d), values by their own error.
    """
    q, k, v = (np.abs(x.astype(np.float64)) for x in cases.inputs(how.heads))
    rows = np.arange(2)[:, None]
    at = np.minimum(cases.SEEN[:, None] + np.arange(cases.NEW), q.shape[1] - 1)
    k_error, v_error = (
        0 if kind == "compute" else kv_quant.ERROR[BITS[kind]]
        for kind in (how.form.k_cache, how.form.v_cache)
    )
    d = q[rows, at].sum(-1, keepdims=True) * k.max() * k_error * q.shape[-1] ** -0.5
    return v.max() * (np.expm1(2 * d) + v_error) + 1e-5


@pytest.mark.parametrize("how", quick(HOWS, 2))
def test_attention_is_off_by_no_more_than_stated(how):
    real = (cases.SEEN[:, None] + np.arange(cases.NEW) < cases.END[:, None])[:, :, None, None]
    expected = cases.exact(how.kind, how.heads) * real
    error = np.abs(cases.run(how)[0] * real - expected)
    assert (error <= bound(how)).all()
    relative = np.sqrt((error**2).mean() / (expected**2).mean())
    worst = max(STATED[how.form.k_cache], STATED[how.form.v_cache])
    assert worst / 10 < relative < worst, relative  # 0 if the cache were not read


def test_one_shard_or_many_keep_the_same():
    """A vector is quantised where it is kept: P shards give what one gives, to rounding."""
    one = cases.run(How("full", (1, 1, 1), form=INT4))[0]
    for P in (2, 3, 8):
        how = How("full", (1, P, 1), form=INT4)
        np.testing.assert_allclose(cases.run(how)[0], one, atol=2e-6)


@pytest.mark.parametrize("form", [*FORMS, *MIXED], ids=lambda form: form.name)
def test_bytes(form):
    how = How("sinks", (1, 2, 2), form=form)
    with jax.set_mesh(make_mesh(how.sizes)):
        held = kv_cache.create(cases.config(how), 4, cases.ROOM, how.rules, form)
        (slot,) = held.slots
        total = tree.num_bytes((slot.k_LBKSH, slot.v_LBKSH))
        assert total == kv_cache.kv_bytes(cases.config(how), 4, cases.ROOM, how.rules, form)
        S = slot.positions_BS.shape[1]
        assert slot.token_bytes * 4 * S == total
        sizes = {"compute": 4 * cases.H, "int8": cases.H + 2, "int4": cases.H // 2 + 2}
        vectors = 2 * 2 * 4 * S  # layers, kv heads, rows
        assert total == vectors * (sizes[form.k_cache] + sizes[form.v_cache])


def test_names():
    assert [form.name for form in (CacheConfig(), *FORMS, *MIXED)] == [
        "plain", "int8", "int4", "k8v4", "k4v8", "int8 keys"
    ]  # fmt: skip
    assert dataclasses.replace(INT8, k_cache="compute").name == "int8 values"
