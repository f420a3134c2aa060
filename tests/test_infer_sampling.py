"""Every stage of sampling against NumPy, which sorts where the code under test bisects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.config import UserError
from infer import sampling
from infer.sampling import Counts, Sampling

LOGITS_BV = np.random.default_rng(0).normal(0, 2, (5, 300)).astype(np.float32)


def numpy_keep(logits_V, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0):
    """Probabilities [V] in float64, by sorting."""
    x_V = logits_V.astype(np.float64) / temperature
    p_V = np.exp(x_V - x_V.max())
    p_V[p_V < min_p] = 0
    if top_k:
        p_V[p_V < np.sort(p_V)[::-1][min(top_k, len(p_V)) - 1]] = 0
    p_V /= p_V.sum()
    order_V = np.argsort(-p_V, kind="stable")
    before_V = np.cumsum(p_V[order_V]) - p_V[order_V]
    p_V[order_V[before_V >= top_p]] = 0
    return p_V / p_V.sum()


@pytest.mark.parametrize(
    "fields",
    [
        dict(temperature=0.7),
        dict(temperature=1.9),
        dict(top_k=1),
        dict(top_k=17),
        dict(top_k=300),
        dict(top_k=10_000),
        dict(top_p=0.9),
        dict(top_p=0.01),
        dict(min_p=0.1),
        dict(min_p=1.0),
        dict(temperature=1.5, min_p=0.02, top_k=20, top_p=0.8),
        dict(temperature=0.5, top_k=40, top_p=0.99),
    ],
    ids=str,
)
def test_kept_probabilities_are_those_of_numpy(fields):
    kept_BV = sampling.keep(jnp.asarray(LOGITS_BV), Sampling(**fields))
    actual_BV = np.asarray(jax.nn.softmax(kept_BV, axis=-1))
    expected_BV = np.stack([numpy_keep(x_V, **fields) for x_V in LOGITS_BV])
    np.testing.assert_array_equal(actual_BV > 0, expected_BV > 0)
    np.testing.assert_allclose(actual_BV, expected_BV, atol=2e-6)


def test_min_p_comes_before_top_k_and_top_p():
    logits_1V = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    # min_p leaves 0.5, 0.25: of these, renormalised, the first holds 2/3 of the mass.
    kept_1V = sampling.keep(logits_1V, Sampling(min_p=0.4, top_p=0.6))
    assert np.isfinite(kept_1V).tolist() == [[True, False, False, False]]
    kept_1V = sampling.keep(logits_1V, Sampling(top_p=0.6))
    assert np.isfinite(kept_1V).tolist() == [[True, True, False, False]]


def test_ties_with_the_last_one_kept_are_kept():
    logits_1V = jnp.array([[2.0, 1.0, 1.0, -1.0]])
    for fields in (dict(top_k=2), dict(top_p=0.6)):
        kept_1V = sampling.keep(logits_1V, Sampling(**fields))
        assert np.isfinite(kept_1V).tolist() == [[True, True, True, False]], fields


def test_extreme_logits_and_temperatures_give_no_nan():
    logits_1V = jnp.array([[3e38, -3e38, -jnp.inf, 0.0]])
    kept_1V = sampling.keep(logits_1V, Sampling(temperature=1e-30, top_k=2, top_p=0.5, min_p=0.1))
    assert np.asarray(kept_1V)[0, 0] == 0 and not np.isnan(kept_1V).any()


def test_penalties_are_those_of_numpy():
    rng = np.random.default_rng(1)
    prompt_BV = rng.random(LOGITS_BV.shape) < 0.3
    output_BV = rng.integers(0, 4, LOGITS_BV.shape) * (rng.random(LOGITS_BV.shape) < 0.3)
    how = Sampling(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=-0.7)
    counts = Counts(jnp.asarray(prompt_BV), jnp.asarray(output_BV, jnp.int32))
    expected_BV = LOGITS_BV.astype(np.float64)
    for b, v in np.ndindex(*LOGITS_BV.shape):
        x = expected_BV[b, v]
        if prompt_BV[b, v] or output_BV[b, v]:
            x = x / 1.3 if x > 0 else x * 1.3
        expected_BV[b, v] = x - 0.4 * output_BV[b, v] - (-0.7 if output_BV[b, v] else 0)
    actual_BV = sampling.penalise(jnp.asarray(LOGITS_BV), counts, how)
    np.testing.assert_allclose(actual_BV, expected_BV, rtol=1e-5, atol=1e-6)


def test_greedy_is_argmax_after_penalties():
    logits_1V = jnp.array([[1.0, 3.0, 2.5]])
    counts = Counts(jnp.zeros((1, 3), bool), jnp.array([[0, 1, 0]]))
    keys_1 = jax.random.split(jax.random.key(0), 1)
    assert sampling.sample(logits_1V, keys_1, None, Sampling(temperature=0)).tolist() == [1]
    how = Sampling(temperature=0, presence_penalty=1.0)
    assert sampling.sample(logits_1V, keys_1, counts, how).tolist() == [2]


@pytest.mark.parametrize(
    "fields",
    [dict(), dict(temperature=0.5), dict(top_k=5), dict(top_p=0.7), dict(min_p=0.2)],
    ids=str,
)
def test_drawn_frequencies_are_the_probabilities(fields):
    draws, V = 20_000, 12
    logits_V = LOGITS_BV[0, :V]
    keys_B = jax.random.split(jax.random.key(3), draws)
    draw = jax.jit(sampling.sample, static_argnums=(2, 3))
    token_B = draw(jnp.tile(logits_V[None], (draws, 1)), keys_B, None, Sampling(**fields))
    frequency_V = np.bincount(np.asarray(token_B), minlength=V) / draws
    expected_V = numpy_keep(logits_V, **fields)
    assert (frequency_V[expected_V == 0] == 0).all()
    # Five standard deviations of a binomial frequency.
    assert (abs(frequency_V - expected_V) <= 5 * np.sqrt(expected_V / draws)).all()


def test_a_row_draws_by_its_own_key_alone():
    keys_B = jax.random.split(jax.random.key(5), 5)
    how = Sampling(top_p=0.95)
    together = sampling.sample(jnp.asarray(LOGITS_BV), keys_B, None, how).tolist()
    alone = [
        int(sampling.sample(jnp.asarray(LOGITS_BV[b : b + 1]), keys_B[b : b + 1], None, how)[0])
        for b in range(5)
    ]
    assert together == alone


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_ranges(name, value):
    with pytest.raises(UserError, match=f"{name}={value}"):
        Sampling(**{name: value})
