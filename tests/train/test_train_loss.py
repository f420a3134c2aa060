"""The fused loss is the plain one, in value and gradient, and never holds all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MESHES, make_mesh
from tolerances import assert_close

from core import sharding
from train import loss

B, T, D, V = 8, 12, 16, 48


def inputs(dtype="float32", seed=0):
    draw = np.random.default_rng(seed)
    hidden_BTD = draw.normal(size=(B, T, D)).astype(np.float32)
    table_VD = draw.normal(size=(V, D)).astype(np.float32)
    targets_BT = draw.integers(0, V, (B, T)).astype(np.int32)
    weights_BT = draw.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32)
    return jnp.asarray(hidden_BTD, dtype), jnp.asarray(table_VD, dtype), targets_BT, weights_BT


def plain(hidden_BTD, table_VD, targets_BT, weights_BT, z_loss, softcap=0.0):
    """The definition, with all logits."""
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD, preferred_element_type=jnp.float32)
    if softcap:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    logp_BTV = jax.nn.log_softmax(logits_BTV)
    nll_BT = -jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll = (weights_BT * nll_BT).sum()
    return nll + z_loss * (weights_BT * lse_BT**2).sum(), nll


def place(arrays, rules):
    by_token = rules("batch", "length")
    specs = rules("batch", "length", "act_embed"), rules("vocab", None), by_token, by_token
    return [jax.device_put(x, spec) for x, spec in zip(arrays, specs, strict=True)]


def both(arrays, z_loss, scale=1.0, softcap=0.0):
    """((loss, nll), gradients) of the fused loss times `scale`, on the mesh in use."""
    rules = sharding.training()

    def scaled(hidden_BTD, table_VD, *rest):
        how = dict(z_loss=z_loss, softcap=softcap, rules=rules)
        value, nll = loss.next_token_loss(hidden_BTD, table_VD, *rest, **how)
        return value * scale, nll

    with_grad = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True))
    return with_grad(*place(arrays, rules))


def expected(arrays, z_loss, scale=1.0, softcap=0.0):
    def scaled(*arrays):
        value, nll = plain(*arrays, z_loss, softcap)
        return value * scale, nll

    return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(*arrays)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("chunk", [5, 1024])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, 0.0), (1e-2, 0.0), (1e-2, 3.0)])
def test_equals_the_plain_loss(monkeypatch, sizes, chunk, z_loss, softcap):
    """5 divides the rows of no shard, so the last chunk is padded."""
    monkeypatch.setattr(loss, "CHUNK", chunk)
    arrays = inputs()
    (want, want_nll), want_grads = expected(arrays, z_loss, 0.3, softcap)
    with jax.set_mesh(make_mesh(sizes)):
        (value, nll), grads = both(arrays, z_loss, 0.3, softcap)
    assert_close(value, want, "model", what="loss")
    assert_close(nll, want_nll, "model", what="nll")
    for name, actual, wanted in zip(("hidden", "table"), grads, want_grads, strict=True):
        assert_close(actual, wanted, "model", what=f"gradient of {name}")
    assert np.abs(want_grads[1]).min(axis=1).max() > 0, "the case has gradients to compare"


@pytest.mark.parametrize("sizes", MESHES)
def test_value_alone_is_the_value_beside_gradients(sizes):
    """Without differentiation another loop runs; it must add up the same."""
    arrays = inputs()
    want = plain(*arrays, 1e-2)
    with jax.set_mesh(make_mesh(sizes)):
        rules = sharding.training()
        placed = place(arrays, rules)
        values = jax.jit(
            lambda *a: loss.next_token_loss(*a, z_loss=1e-2, rules=rules),
        )(*placed)
    assert_close(values[0], want[0], "model", what="loss")
    assert_close(values[1], want[1], "model", what="nll")


def test_z_loss_counts(one_device):
    """The same nll; a loss that is larger by the weighted squares."""
    arrays = inputs()
    (without, nll), _ = both(arrays, 0.0)
    (with_z, nll_z), _ = both(arrays, 1e-2)
    assert float(nll) == float(nll_z) == float(without)
    assert float(with_z) > float(without) * 1.01


def test_rows_without_weight_have_no_gradient(one_device):
    arrays = inputs()
    weights_BT = arrays[3]
    _, (dhidden_BTD, _) = both(arrays, 1e-2)
    largest_BT = np.abs(dhidden_BTD).max(axis=-1)
    assert (largest_BT[weights_BT == 0] == 0).all()
    assert (largest_BT[weights_BT > 0] > 0).all()


def test_large_logits_stay_finite(one_device):
    hidden_BTD, table_VD, targets_BT, weights_BT = inputs()
    arrays = hidden_BTD * 1e3, table_VD, targets_BT, weights_BT
    (value, _), grads = both(arrays, 0.0)
    assert_close(value, expected(arrays, 0.0)[0][0], "model", what="loss")
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_bfloat16(monkeypatch, sizes):
    """Products in bfloat16, sums in float32: near to the float32 loss of the same numbers."""
    monkeypatch.setattr(loss, "CHUNK", 20)
    arrays = inputs("bfloat16")
    exact = [jnp.asarray(x, jnp.float32) for x in arrays[:2]]
    (want, _), want_grads = expected((*exact, *arrays[2:]), 1e-2)
    with jax.set_mesh(make_mesh(sizes)):
        (value, nll), grads = both(arrays, 1e-2)
    assert value.dtype == nll.dtype == jnp.float32
    assert_close(value, want, "model", what="loss")  # inputs are exact, sums are float32
    for name, actual, wanted in zip(("hidden", "table"), grads, want_grads, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual, wanted, "loss", "bfloat16", f"gradient of {name}")


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_logprobs_are_plain_ones_under_any_objective(monkeypatch, sizes, softcap):
    """A function that bends each log-probability another way has gradients by definition."""
    monkeypatch.setattr(loss, "CHUNK", 5)
    hidden_BTD, table_VD, targets_BT, weights_BT = inputs()

    def bent(logprobs_BT):
        return (weights_BT * jnp.sin(logprobs_BT) * logprobs_BT).sum(), logprobs_BT

    def by_definition(hidden_BTD, table_VD):
        logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD)
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap) if softcap else logits_BTV
        logp_BTV = jax.nn.log_softmax(logits_BTV)
        return bent(jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0])

    def fused(hidden_BTD, table_VD, targets_BT):
        how = dict(rules=sharding.training(), softcap=softcap)
        return bent(loss.token_logprobs(hidden_BTD, table_VD, targets_BT, **how))

    (_, want), want_grads = jax.value_and_grad(by_definition, (0, 1), True)(hidden_BTD, table_VD)
    with jax.set_mesh(make_mesh(sizes)):
        placed = place(inputs(), sharding.training())
        weights_BT = placed.pop()
        gradient = jax.jit(jax.value_and_grad(fused, (0, 1), True))
        (_, logprobs_BT), grads = gradient(*placed)
        assert logprobs_BT.dtype == jnp.float32
    assert_close(logprobs_BT, want, "model", what="log-probabilities")
    for name, actual, wanted in zip(("hidden", "table"), grads, want_grads, strict=True):
        assert_close(actual, wanted, "model", what=f"gradient of {name}")


def test_never_holds_all_logits(one_device, monkeypatch):
    """The compiled gradient's temporaries are far below [B, T, V] float32; the plain one's not."""
    monkeypatch.setattr(loss, "CHUNK", 256)
    rows, length, width, vocab = 4, 1024, 16, 2048
    all_logits = rows * length * vocab * 4
    arrays = [
        np.zeros((rows, length, width), np.float32),
        np.zeros((vocab, width), np.float32),
        np.zeros((rows, length), np.int32),
        np.ones((rows, length), np.float32),
    ]
    rules = sharding.training()

    def temporaries(function, arrays):
        gradient = jax.jit(jax.grad(lambda *a: function(*a)[0], argnums=(0, 1)))
        return gradient.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    def fused(*arrays):
        return loss.next_token_loss(*arrays, z_loss=0.0, rules=rules)

    assert temporaries(lambda *a: plain(*a, 0.0), arrays) > all_logits, "else a blind measure"
    assert temporaries(fused, place(arrays, rules)) < all_logits / 2

    def squares(hidden_BTD, table_VD, targets_BT, _):
        return (loss.token_logprobs(hidden_BTD, table_VD, targets_BT, rules=rules) ** 2).sum(), None

    assert temporaries(squares, place(arrays, rules)) < all_logits / 2
