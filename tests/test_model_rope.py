"""Rotary tables against transformers' (golden/rope.npz), and what they depend on."""

import json

import family_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.config import UserError
from model import rope
from model.families import rope_json
from model.rope import Rope

with np.load(cases.FOLDER / "rope.npz") as found:
    TABLES = dict(found)
NAMES = [name.removesuffix("-about") for name in TABLES if name.endswith("-about")]
LENGTHS = TABLES["lengths"]
# Relative: a power and a few products in float32, theirs and, where it goes by length, ours.
ROUNDING = 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_frequencies_are_those_of_transformers(name):
    about = json.loads(str(TABLES[f"{name}-about"]))
    config = rope_json.parse(about["parameters"], about["context"])
    assert config.magnitude == pytest.approx(float(TABLES[f"{name}-magnitude"]), rel=1e-12)
    made = rope.frequencies(config, about["head_dim"], jnp.array(LENGTHS))
    expected = TABLES[name]
    if not config.by_length:
        assert (expected == expected[0]).all()
        expected = expected[0]
    np.testing.assert_allclose(made, expected, rtol=ROUNDING)


def test_the_goldens_tell_lengths_apart():
    """longrope switches right after the original length, dynamic grows with it."""
    longrope, dynamic = TABLES["longrope"], TABLES["dynamic"]
    assert (longrope[0] == longrope[1]).all() and (longrope[1] != longrope[2])[1:].all()
    assert (dynamic[0] == dynamic[1]).all() and (dynamic[2] != dynamic[3])[1:].all()


@pytest.mark.parametrize("name", ["plain", "yarn", "dynamic"])
@pytest.mark.parametrize("last", [0, 4_096, 131_072, 1_000_000, 2**24])
def test_angles_are_exact_however_long_the_text(name, last):
    """Against float64; those that go by length are exact for their frequencies in float32."""
    how = dict(plain={}, yarn=dict(factor=4.0, original=4096), dynamic=dict(original=4096))[name]
    config = Rope(scaling="none" if name == "plain" else name, **how)
    positions = np.array([[last, last - 1, -last]])
    tables = jax.jit(lambda at: rope.table(at, config, 128, jnp.array([10_000])))(positions)
    per_token = np.asarray(rope._frequencies(config, 128, jnp.array([10_000])), np.float64)
    angles = positions[..., None] * per_token.reshape(1, 1, -1)
    # A unit of 2^-39 turns a position, and of float32 what the frequencies are rounded to there.
    slack = 2**-39 * 2 * np.pi * last + (name == "dynamic") * 1e-7 * last
    for made, exact in zip(tables, (np.cos(angles), np.sin(angles)), strict=True):
        assert made.dtype == jnp.float32
        np.testing.assert_allclose(made[:, :, 0], config.magnitude * exact, atol=1e-6 + 2 * slack)


def test_a_distance_is_the_same_wherever_it_is():
    """Scores at position 1,000,000 are those at 0: as float32 products they are off by 0.03."""
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 128)).astype(np.float32)

    def score(at):
        turned = [
            rope.rotate(x, rope.table(jnp.array([[p]]), Rope(), 128))
            for x, p in ((q, at + 37), (k, at))
        ]
        return float((turned[0] * turned[1]).sum())

    for at in (1_000, 131_072, 999_963, 2**24 - 37):
        assert abs(score(at) - score(0)) < 2e-5 * 128**0.5


def test_each_row_goes_by_its_own_length():
    config = Rope(scaling="dynamic", factor=4.0, original=16)
    together = rope.frequencies(config, 8, jnp.array([10, 40]))
    for row, length in enumerate((10, 40)):
        alone = rope.frequencies(config, 8, jnp.array([length]))
        np.testing.assert_array_equal(together[row], alone[0])
    np.testing.assert_allclose(together[0], rope.frequencies(Rope(), 8), rtol=ROUNDING)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(scaling="yarn", factor=2.0), "scaling='yarn' with original=0"),
        (dict(factor=2.0), "factor=2.0 means nothing with scaling='none'"),
        (dict(scaling="linear", factor=2.0, original=8), "original=8 means nothing"),
        (dict(scaling="longrope", original=8), "0 short and 0 long divisors"),
        (dict(scaling="yarn", original=8, short=(1.0,)), r"short=\(1.0,\) means nothing"),
        (dict(scaling="llama3", original=8, slow=4.0, fast=2.0), "fast=2.0 must be more than"),
        (dict(base=0.5), "base=0.5 is out of range"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(UserError, match=message):
        Rope(**fields)


def test_divisors_must_fit_the_head():
    config = Rope(scaling="longrope", original=8, short=(1.0, 1.0), long=(2.0, 2.0))
    with pytest.raises(UserError, match="2 divisors, but head_dim=8 has 4 pairs"):
        rope.frequencies(config, 8, jnp.array([4]))
