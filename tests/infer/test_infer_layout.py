"""The weights as a CPU decodes from them."""

import dataclasses

import infer_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import sharding, tree
from infer import layout, load
from model import transformer
from model.attention.spec import full, sliding


def placed(config):
    rules = sharding.prefilling()
    model = transformer.create(config, rules, jax.random.key(0))
    cast = load.in_compute_dtype(model, config)
    return cast, layout.place(config, rules, tree.named_leaves(cast))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("tied_head", [True, False])
def test_the_model_is_the_same(one_device, dtype, tied_head):
    # Three slots of the pattern over eight layers: two are left over.
    pattern = sliding(6), full(), sliding(4)
    config = cases.model_config(
        num_layers=8, pattern=pattern, dtype=dtype, tied_head=tied_head, learned_positions=True
    )
    stacked, apart = placed(config)
    at_BT = np.arange(12, dtype=np.int32)[None]
    place = sharding.prefilling()("batch", "length")
    tokens_BT, at_BT, segments_BT = (
        jax.device_put(x_BT, place) for x_BT in (at_BT * 7 % 300, at_BT, at_BT * 0 + 1)
    )

    @jax.jit
    def logits(model):
        return model.logits(model(tokens_BT, at_BT, segments_BT)[0])

    expected, actual = (np.asarray(logits(model)) for model in (stacked, apart))
    assert np.abs(expected).max() > 0.5
    if dtype == "float32":
        np.testing.assert_allclose(actual, expected, atol=1e-5)
        return
    # XLA rounds to bfloat16 at other places: as near to the same weights in float32.
    exact = transformer.abstract(dataclasses.replace(config, dtype="float32"), stacked.rules)
    wide = {name: x.astype(jnp.float32) for name, x in tree.named_leaves(stacked).items()}
    truth = np.asarray(logits(tree.with_leaves(exact, wide)))
    assert np.abs(actual - truth).mean() < 1.2 * np.abs(expected - truth).mean()


def test_each_layer_has_arrays_of_its_own(one_device):
    _, apart = placed(cases.model_config(dtype="bfloat16"))
    leaves = tree.named_leaves(apart)
    assert {x.shape[0] for name, x in leaves.items() if name.startswith("stages.")} == {1}
    assert apart.embedding_VD.dtype == jnp.uint16
    assert apart.head_VD.dtype == jnp.bfloat16


def test_weights_are_used_up(one_device):
    config, rules = cases.model_config(), sharding.prefilling()
    weights = tree.named_leaves(transformer.create(config, rules, jax.random.key(0)))
    layout.place(config, rules, weights)
    assert not weights
