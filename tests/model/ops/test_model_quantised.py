"""Rounded weights against float64; products against those of the numbers they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import PartitionSpec
from quantised_oracle import stands_for
from tolerances import assert_close

from core import sharding
from core.config import UserError
from model.attention.spec import full
from model.config import ModelConfig
from model.ops import quantised
from model.ops.linear import project
from model.ops.quantised import QuantConfig
from model.sizes import weights

CONFIG = ModelConfig(
    vocab_size=96,
    context=64,
    num_layers=1,
    embed_dim=64,
    num_heads=4,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=96,
    pattern=(full(),),
)
FORMS = [QuantConfig(8), QuantConfig(8, 16), QuantConfig(4, 16), QuantConfig(4, 32)]
ROWS, PLACES = (2, 4), PartitionSpec("data", "seq")  # of what is multiplied
PRODUCTS = {  # subscripts: shape and sharding of the weight, sharding of the result
    "BTD,DNH->BTNH": ((64, 4, 16), (None, "model", None), None),
    "BTD,DKH->BTKH": ((64, 1, 16), (None, None, None), None),
    "BTNH,NHD->BTD": ((4, 16, 64), ("model", None, None), ("data", "seq", None)),
    "BTF,FD->BTD": ((128, 64), ("model", None), ("data", "seq", None)),
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_weight_is_off_by_more_than_half_a_step(one_device, form):
    w_DO = numbers(64, 8) * np.logspace(-30, 4, 8, dtype=np.float32)
    w_DO[:, 3] = 0
    w = quantised.quantise(jnp.asarray(w_DO), 1, form)
    group = form.group or 64
    scales_DO = np.repeat(np.asarray(w.scales_ZO, np.float64), group, axis=0)
    assert (abs(stands_for(w) - w_DO) <= scales_DO * (0.5 + 1e-5)).all()
    largest_ZO = abs(w_DO.reshape(-1, group, 8)).max(axis=1).astype(np.float64)
    step_ZO = largest_ZO / (form.largest + 0.5)
    assert (w.scales_ZO >= step_ZO).all() and (w.scales_ZO <= step_ZO * (1 + 2**-7)).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("subscripts", PRODUCTS)
def test_a_product_is_that_of_the_numbers(sizes, form, subscripts):
    shape, place, out = PRODUCTS[subscripts]
    inputs = 1 if subscripts.startswith("BTD") or "F" in subscripts else 2
    x = numbers(*ROWS, *shape[:inputs], seed=1)
    with jax.set_mesh(make_mesh(sizes)):
        w = quantised.quantise(jax.device_put(numbers(*shape), PartitionSpec(*place)), inputs, form)
        spec = PartitionSpec("data", "seq", *place[:inputs])
        out = out and PartitionSpec(*out)
        y = jax.jit(lambda x, w: project(subscripts, x, w, out))(jax.device_put(x, spec), w)
    size = int(np.prod(shape[:inputs]))
    expected = x.reshape(8, size).astype(np.float64) @ stands_for(w)
    assert_close(y, expected.reshape(*ROWS, *shape[inputs:]), "model")
    # Of the product of the float weights each input is off by half a step of its group.
    floats = x.reshape(8, size).astype(np.float64) @ numbers(*shape).reshape(size, -1)
    half_DO = np.repeat(np.asarray(w.scales_ZO, np.float64) / 2, form.group or size, axis=0)
    bound = abs(x.reshape(8, size)) @ half_DO + 1e-4
    assert (abs(np.asarray(y).reshape(8, -1) - floats) <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_accelerators_take_the_same_product(one_device, form, dtype):
    """Their lowering, which a CPU can run too."""
    w = quantised.quantise(numbers(64, 40), 1, form)
    x_RZC = jnp.asarray(numbers(3, 64), dtype).reshape(3, len(w.values_ZCO), -1)
    expected = np.asarray(x_RZC, np.float64).reshape(3, 64) @ stands_for(w)
    for way in (quantised._at_once, quantised._on_cpu):
        y_RO = way(x_RZC, w.values_ZCO, w.scales_ZO, bits=form.bits)
        purpose = "attention" if dtype == "bfloat16" else "model"
        assert_close(y_RO, expected, purpose, dtype)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)])
def test_tables_give_rows_and_logits(monkeypatch, sizes):
    monkeypatch.setattr(quantised, "ROWS", 10)  # which does not divide the vocabulary
    x_BTD, w_VD = numbers(2, 3, 64, seed=1), numbers(96, 64)
    index_BT = np.array([[0, 95, 7], [50, 50, 1]])
    with jax.set_mesh(make_mesh(sizes)):
        table = quantised.quantise_table(jax.device_put(w_VD, PartitionSpec("model", None)))
        place = PartitionSpec("data", None)
        x_BTD, index_BT = jax.device_put((x_BTD, index_BT), place)
        logits_BTV = jax.jit(quantised.logits)(x_BTD, table)
        rows_BTD = quantised.look_up(table, index_BT, PartitionSpec("data", None, None))
        local = quantised._rows_at_once(np.asarray(x_BTD)[0], np.asarray(table.values_VD))
    scales_V1 = np.asarray(table.scales_V, np.float64)[:, None]
    numbers_VD = np.asarray(table.values_VD) * scales_V1
    assert (abs(numbers_VD - w_VD) <= scales_V1 * (0.5 + 1e-5)).all()
    expected_BTV = np.asarray(x_BTD, np.float64) @ numbers_VD.T
    assert_close(logits_BTV, expected_BTV, "model")
    assert_close(local * scales_V1.T, expected_BTV[0], "model")
    np.testing.assert_array_equal(rows_BTD, numbers_VD[np.asarray(index_BT)].astype(np.float32))


@pytest.mark.parametrize("sizes, kind, group, expected", [
    ((1, 1, 1), "compute", None, None),
    ((1, 1, 1), "int8", None, QuantConfig(8, 0)),
    ((1, 1, 1), "int4", None, QuantConfig(4, 32)),
    ((2, 1, 2), "int4", None, QuantConfig(4, 16)),  # 48 of the MLP on a device
    ((2, 1, 2), "int8", 0, QuantConfig(8, 0)),
])  # fmt: skip
def test_groups_are_as_large_as_divide_all_inputs(sizes, kind, group, expected):
    with jax.set_mesh(make_mesh(sizes)):
        assert weights.rounding(CONFIG, sharding.prefilling(), kind, group) == expected


@pytest.mark.parametrize("sizes, kind, group, message", [
    ((1, 1, 1), "compute", 8, "weights_group=8 with weights='compute'"),
    ((1, 1, 1), "int8", 64, r"weights_group=64 does not divide the 96 inputs of .*mlp.down_FD: "
     "use 32 or another divisor of 32"),
    ((2, 1, 2), "int4", 32, r"does not divide the 96 inputs of .*mlp.down_FD, 48 on a device: "
     "use 16"),
    ((2, 1, 2), "int4", 0, "weights_group=0 with weights='int4': .* are on 2 devices.*use 16"),
    ((1, 1, 1), "int4", 1, "weights_group=1: .* go in pairs"),
])  # fmt: skip
def test_refused(sizes, kind, group, message):
    with jax.set_mesh(make_mesh(sizes)), pytest.raises(UserError, match=message):
        weights.rounding(CONFIG, sharding.prefilling(), kind, group)
