"""Every stage of sampling against NumPy, which sorts where the code under test bisects, and every
row against itself alone. All rows of a test go through one program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from core.config import UserError
from infer.sampling import draw, params
from infer.sampling.draw import Counts
from infer.sampling.params import Sampling, pack

V, EOS, MADE = 300, (2, 9), 3
CASES = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.9),
    dict(top_k=1),
    dict(top_k=17),
    dict(top_k=V),
    dict(top_k=10_000),
    dict(top_p=0.9),
    dict(top_p=0.01),
    dict(min_p=0.1),
    dict(min_p=1.0),
    dict(typical_p=0.3),
    dict(typical_p=0.95),
    dict(temperature=1.5, min_p=0.02, top_k=20, top_p=0.8),
    dict(temperature=0.5, top_k=40, top_p=0.99, typical_p=0.6),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.8, temperature=0.9),
    dict(frequency_penalty=0.4),
    dict(presence_penalty=-0.7, top_p=0.7),
    dict(repetition_penalty=1.3, frequency_penalty=-0.4, presence_penalty=0.7),
    dict(logit_bias=((3, 4.5), (7, -0.25), (11, -500.0))),
    dict(allowed_tokens=(1, 2, 50, 299), temperature=1.2),
    dict(banned_tokens=(0, 5, 299), logit_bias=((5, 100.0),), top_k=9),
    dict(min_tokens=MADE + 1),
    dict(min_tokens=MADE),
    dict(allowed_tokens=(2, 9, 10, 11), banned_tokens=(11,), min_tokens=9, typical_p=0.9),
    dict(temperature=0),
    dict(temperature=0, logit_bias=((8, 100.0),), banned_tokens=(8,), presence_penalty=1.0),
]
HOWS = [Sampling(**fields) for fields in CASES]
B = len(HOWS)
RNG = np.random.default_rng(0)
# Quarters: every row has ties; and a tenth of the tokens is impossible from the start.
LOGITS_BV = (np.round(RNG.normal(0, 2, (B, V)) * 4) / 4).astype(np.float32)
LOGITS_BV[RNG.random((B, V)) < 0.1] = -np.inf
LOGITS_BV[:, [2, 9, 11]] = 5.0  # what restrictions speak of would matter
PROMPT_BV = RNG.random((B, V)) < 0.3
OUTPUT_BV = RNG.integers(0, 4, (B, V)) * (RNG.random((B, V)) < 0.3)
KEYS_B = jax.random.split(jax.random.key(5), B)


def heaviest(by_V, weight_V, target):
    """Those of the highest `by` that weigh `target` together, and what ties with the last."""
    order_V = np.argsort(-by_V, kind="stable")
    enough = np.flatnonzero(np.cumsum(weight_V[order_V]) >= target * (1 - 1e-12))
    return by_V >= by_V[order_V[enough[0] if enough.size else -1]]


def restated(x_V, how, prompt_V, output_V):
    """Probabilities [V] in float64, in the order that the docstring of `draw` states."""
    x_V = x_V.astype(np.float64)
    if how.allowed_tokens:
        x_V[[v for v in range(V) if v not in how.allowed_tokens]] = -np.inf
    x_V[list(how.banned_tokens)] = -np.inf
    if how.min_tokens > MADE:
        x_V[list(EOS)] = -np.inf
    for v, value in how.logit_bias:
        x_V[v] += min(max(value, -100), 100)
    for v in range(V):
        if prompt_V[v] or output_V[v]:
            r = how.repetition_penalty
            x_V[v] = x_V[v] / r if x_V[v] > 0 else x_V[v] * r
        x_V[v] -= how.frequency_penalty * output_V[v] + how.presence_penalty * (output_V[v] > 0)
    if how.temperature == 0:
        return np.eye(V)[x_V.argmax()]
    x_V = (x_V - x_V.max()) / how.temperature

    def softmax():
        return np.exp(x_V) / np.exp(x_V).sum()

    x_V[np.exp(x_V) < how.min_p] = -np.inf
    if how.top_k:
        x_V[x_V < np.sort(x_V)[::-1][min(how.top_k, V) - 1]] = -np.inf
    if how.top_p < 1:
        x_V[~heaviest(x_V, softmax(), how.top_p)] = -np.inf
    if how.typical_p < 1:
        p_V = softmax()
        surprise_V = -np.log(np.maximum(p_V, 1e-300))
        distance_V = abs(surprise_V - (p_V * surprise_V).sum())
        distance_V[p_V == 0] = np.inf
        x_V[~heaviest(-distance_V, p_V, how.typical_p)] = -np.inf
    return softmax()


@functools.partial(jax.jit, static_argnames="eos")
def run(logits_BV, keys_B, counts, packed, eos=EOS):
    """(logits that the draw is by, tokens)."""
    made_B = jnp.full(len(logits_BV), MADE)
    kept_BV = draw.restrict(logits_BV, made_B, packed, eos)
    if packed.penalties is not None:
        kept_BV = draw.penalise(kept_BV, counts, packed.penalties)
    if packed.temperature_B is not None:
        kept_BV = draw.keep(kept_BV, packed)
    return kept_BV, draw.sample(logits_BV, keys_B, made_B, counts, packed, eos)


def rows(which, packed=None):
    """`run` of these rows, as a batch of their own; with their own program if `packed` is None."""
    which = np.array(which)
    packed = pack([HOWS[b] for b in which]) if packed is None else packed.rows(which)
    counts = Counts(jnp.asarray(PROMPT_BV[which]), jnp.asarray(OUTPUT_BV[which]))
    return jax.device_get(run(LOGITS_BV[which], KEYS_B[which], counts, packed))


@functools.cache
def together():
    return rows(range(B))


@pytest.mark.parametrize("b", range(B), ids=[str(fields) for fields in CASES])
def test_a_row_is_as_numpy_says(b):
    kept_BV, token_B = together()
    expected_V = restated(LOGITS_BV[b], HOWS[b], PROMPT_BV[b], OUTPUT_BV[b])
    assert expected_V[token_B[b]] > 0
    if HOWS[b].temperature:
        actual_V = np.asarray(jax.nn.softmax(kept_BV[b]))
        np.testing.assert_array_equal(np.isfinite(kept_BV[b]), expected_V > 0)
        np.testing.assert_allclose(actual_V, expected_V, atol=2e-6)
        # Each stage did something: the case is not that of a plain row.
        plain = HOWS[b] in (Sampling(top_k=V), Sampling(top_k=10_000), Sampling(min_tokens=MADE))
        start_V = restated(LOGITS_BV[b], Sampling(), PROMPT_BV[b], OUTPUT_BV[b])
        assert (abs(start_V - expected_V).max() > 1e-3) != (plain or b == 0)


@pytest.mark.parametrize("alone", [True, False], ids=["own program", "program of all"])
def test_a_row_is_the_same_bit_for_bit_whatever_else_is_in_its_batch(alone):
    """Alone, with one neighbour, and in another slot: the kept logits, hence every draw."""
    kept_BV, token_B = together()
    packed = None if alone else pack(HOWS)
    batches = [[b] for b in range(B)] if not alone else [[b] for b in range(0, B, 3)]
    for which in [*batches, [17, 3], [25, 26, 8], list(range(B))[::-1], [*range(7, B), *range(7)]]:
        some_BV, some_B = rows(which, packed)
        np.testing.assert_array_equal(some_B, token_B[which])
        for b, row_V in zip(which, some_BV, strict=True):
            if HOWS[b].temperature:  # of greedy rows the argmax alone is used
                np.testing.assert_array_equal(row_V, kept_BV[b])


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(temperature=0.5),
        dict(top_k=5),
        dict(top_p=0.7),
        dict(min_p=0.2),
        dict(typical_p=0.6),
        dict(logit_bias=((4, 1.5),), banned_tokens=(7,)),
    ],
    ids=str,
)
def test_draws_follow_the_kept_probabilities(fields):
    draws, how = 20_000, Sampling(**fields)
    zeros_V = np.zeros(V, int)
    expected_V = restated(LOGITS_BV[0], how, zeros_V, zeros_V)
    keys_B = jax.random.split(jax.random.key(3), draws)
    logits_BV = jnp.tile(jnp.asarray(LOGITS_BV[:1]), (draws, 1))
    sample = jax.jit(draw.sample, static_argnames="eos")
    packed = pack([how] * draws)
    token_B = np.asarray(sample(logits_BV, keys_B, jnp.zeros(draws, int), None, packed))
    count_V = np.bincount(token_B, minlength=V)
    assert (count_V[expected_V == 0] == 0).all()
    often_V = expected_V * draws >= 5  # where chi-square holds; the others go together
    observed, wanted = (
        np.append(x_V[often_V], x_V[~often_V].sum()) for x_V in (count_V, expected_V * draws)
    )
    some = wanted > 1e-9
    assert stats.chisquare(observed[some], wanted[some]).pvalue > 1e-3


def test_a_draw_is_that_of_jax():
    expected_B = jax.vmap(jax.random.categorical)(KEYS_B, jnp.asarray(LOGITS_BV))
    made_B, packed = jnp.zeros(B, int), pack([Sampling()] * B)
    token_B = draw.sample(jnp.asarray(LOGITS_BV), KEYS_B, made_B, None, packed)
    assert token_B.tolist() == expected_B.tolist()


def keep(logits_1V, **fields):
    """Which tokens are kept."""
    return np.isfinite(draw.keep(jnp.asarray(logits_1V), pack([Sampling(**fields)])))[0].tolist()


def test_min_p_comes_before_top_k_and_top_p_and_typical_p_last():
    logits_1V = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    # min_p leaves 0.5, 0.25: of these, renormalised, the first holds 2/3 of the mass.
    assert keep(logits_1V, min_p=0.4, top_p=0.6) == [True, False, False, False]
    assert keep(logits_1V, top_p=0.6) == [True, True, False, False]
    # Surprises 0.69, 1.39, 1.90, 2.30 nats around 1.21: the second is the most typical.
    assert keep(logits_1V, typical_p=0.2) == [False, True, False, False]
    # Of 0.5 alone, or of what top_k leaves (0.41, 1.10 around 0.64), the first is.
    assert keep(logits_1V, typical_p=0.2, top_k=2) == [True, False, False, False]


def test_ties_with_the_last_one_kept_are_kept():
    logits_1V = jnp.array([[2.0, 1.0, 1.0, -1.0]])
    for fields in (dict(top_k=2), dict(top_p=0.6)):
        assert keep(logits_1V, **fields) == [True, True, True, False], fields
    assert keep(jnp.zeros((1, 4)), typical_p=0.1) == [True] * 4


def test_extreme_logits_and_temperatures_give_no_nan():
    logits_1V = jnp.array([[3e38, -3e38, -jnp.inf, 0.0]])
    how = Sampling(temperature=1e-30, top_k=2, top_p=0.5, min_p=0.1, typical_p=0.5)
    kept_1V = np.asarray(draw.keep(logits_1V, pack([how])))
    assert kept_1V[0, 0] == 0 and not np.isnan(kept_1V).any()


def test_stages_that_no_row_uses_are_not_in_the_program():
    """Settings at their edges are off: nothing of [B, V] is made for them, and none is bisected."""
    plain = pack([Sampling(top_k=0, top_p=1, min_p=0, typical_p=1, max_tokens=3)])
    used = {name for name, x in plain._asdict().items() if x is not None}
    assert used == {"max_tokens_B", "seed_B", "temperature_B"}
    assert pack([Sampling(temperature=0)]).temperature_B is None
    everything = pack(HOWS)
    assert all(x is not None for x in everything)
    args = LOGITS_BV[:1], KEYS_B[:1], np.zeros(1, int), None

    def program(packed):
        return str(jax.make_jaxpr(draw.sample)(*args, packed))

    assert "scan" not in program(plain) and "scatter" not in program(plain)
    assert "scan" in program(pack([Sampling(top_k=5)]))
    assert "scatter" in program(pack([Sampling(banned_tokens=(5,))]))


def test_lists_are_filled_up_with_what_is_no_token():
    packed = pack([Sampling(logit_bias=((4, -300),), banned_tokens=(7,)), Sampling()])
    assert packed.bias.tokens_BJ.tolist() == [[4, 7], [params.NO_ID] * 2]
    assert packed.bias.values_BJ.tolist() == [[-100, -np.inf], [0, 0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(temperature=-0.1), "temperature=-0.1"),
        (dict(temperature=2.5), "temperature=2.5"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.1), "top_p=1.1"),
        (dict(min_p=-0.1), "min_p=-0.1"),
        (dict(typical_p=0.0), "typical_p=0.0"),
        (dict(frequency_penalty=2.5), "frequency_penalty=2.5"),
        (dict(presence_penalty=-2.5), "presence_penalty=-2.5"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0"),
        (dict(repetition_penalty=float("inf")), "repetition_penalty=inf is not finite"),
        (dict(repetition_penalty=float("nan")), "repetition_penalty=nan"),
        (dict(min_tokens=9, max_tokens=8), "min_tokens=9 is more than max_tokens=8"),
        (dict(banned_tokens=(3, -1)), r"banned_tokens=\(3, -1\) is out of range"),
        (dict(logit_bias=((3, 1), (3, 2))), "logit_bias names token 3 twice"),
        (dict(logit_bias=((3, float("nan")),)), r"logit_bias\[0\]\[1\]=nan is not finite"),
        (dict(logit_bias=((3, 1, 2),)), r"logit_bias\[0\]=\(3, 1, 2\) must have 2 items"),
        (dict(logit_bias=((3, "x"),)), r"logit_bias\[0\]\[1\]='x' is str"),
    ],
    ids=str,
)
def test_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Sampling(**fields)
