"""One row times a weight: against float64, on meshes, and without a float weight in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import PartitionSpec
from quantised_oracle import stands_for
from tolerances import assert_close

from model.ops import one_row, quantised
from model.ops.linear import product, project
from model.ops.quantised import QuantConfig

FORMS = [QuantConfig(8), QuantConfig(8, 16), QuantConfig(4, 16), QuantConfig(4)]
PRODUCTS = {  # subscripts: shape and sharding of the weight
    "BTD,DNH->BTNH": ((64, 4, 16), (None, "model", None)),
    "BTNH,NHD->BTD": ((4, 16, 64), ("model", None, None)),
    "BTF,FD->BTD": ((68, 64), ("model", None)),  # not whole sums: a second row
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 4)])
@pytest.mark.parametrize("subscripts", PRODUCTS)
def test_bfloat16(subscripts, sizes):
    shape, place = PRODUCTS[subscripts]
    inputs = shape[:-2] if subscripts.startswith("BTD") else shape[:-1]
    with jax.set_mesh(make_mesh(sizes)):
        x = jnp.asarray(numbers(1, 1, *inputs, seed=1), jnp.bfloat16)
        w = jnp.asarray(numbers(*shape), jnp.bfloat16)
        expected = np.asarray(x, np.float64).ravel() @ np.asarray(w, np.float64).reshape(x.size, -1)
        lead = (None, None, *place[: len(inputs)])
        x, w = jax.device_put((x, w), (PartitionSpec(*lead), PartitionSpec(*place)))
        out = None if lead[2:] == (None,) else PartitionSpec(None, None, None)
        y = jax.jit(lambda x, w: project(subscripts, x, w, out))(x, w)
        exact = jax.jit(lambda x, w: product(subscripts, x, w, jnp.float32, out))(x, w)
    assert y.dtype == jnp.bfloat16 and y.shape == (1, 1, *shape[len(inputs) :])
    assert_close(np.asarray(exact).ravel(), expected, "model")
    assert_close(np.asarray(y).ravel(), expected, "attention", "bfloat16")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_integers(one_device, form):
    w = quantised.quantise(numbers(64, 40), 1, form)
    x_BTD = numbers(1, 1, 64, seed=1)
    y_BTO = jax.jit(lambda x, w: project("BTD,DO->BTO", x, w))(x_BTD, w)
    assert_close(y_BTO[0, 0], x_BTD[0, 0].astype(np.float64) @ stands_for(w), "model")


@pytest.mark.parametrize("width", [192, 200])  # the second is not whole lanes
def test_tables(one_device, width):
    x_D, table = numbers(width, seed=1), quantised.quantise_table(jnp.asarray(numbers(96, width)))
    y_V = jax.jit(quantised.logits)(jnp.asarray(x_D), table)
    values_VD, scales_V = (np.asarray(a, np.float64) for a in (table.values_VD, table.scales_V))
    assert_close(y_V, values_VD @ x_D * scales_V, "model")


def of_bfloat16(x_1I):
    w_IO = jnp.ones((len(x_1I[0]), 4096), jnp.bfloat16)
    return w_IO, lambda x_1I, w_IO: project("BD,DF->BF", x_1I, w_IO)


def of_integers(x_1I):
    w = quantised.quantise(jnp.ones((len(x_1I[0]), 4096)), 1, QuantConfig(8, 64))
    return w, lambda x_1I, w: project("BD,DF->BF", x_1I, w)


def of_table(x_1I):
    table = quantised.quantise_table(jnp.ones((4096, len(x_1I[0]))))
    return table, quantised.logits


@pytest.mark.parametrize("case", [of_bfloat16, of_integers, of_table])
def test_no_float_weight_is_made_before_a_loop(one_device, case):
    """XLA moves out of a loop what does not change in it, however large it becomes."""
    x_1I = jnp.ones((1, 512), jnp.bfloat16)
    w, multiply = case(x_1I)

    def loop(x_1I, w):
        def again(_, x_1I):
            return x_1I + multiply(x_1I, w)[:, :512].astype(x_1I.dtype)

        return jax.lax.fori_loop(0, 4, again, x_1I)

    memory = jax.jit(loop).lower(x_1I, w).compile().memory_analysis()
    # The sums of eight or more numbers each in float32, and nothing else that is large.
    assert memory.temp_size_in_bytes <= 1.1 * 4 * 512 * 4096 / one_row.TERMS
