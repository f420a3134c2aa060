"""Rotary tables against transformers' (golden/rope.npz), and what they depend on."""

import itertools
import json

import family_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import documents
from conftest import make_mesh
from tolerances import assert_close

from core import layout, sharding, tree
from core.config import UserError
from model import transformer
from model.attention.spec import full
from model.config import ModelConfig
from model.families import llama, rope_json
from model.families.attributes import Attributes
from model.ops import rope
from model.ops.rope import Rope

with np.load(cases.FOLDER / "rope.npz") as found:
    TABLES = dict(found)
NAMES = [name.removesuffix("-about") for name in TABLES if name.endswith("-about")]
LENGTHS = TABLES["lengths"]
# Relative: a power and a few products in float32, theirs and, where it goes by length, ours.
ROUNDING = 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_frequencies_are_those_of_transformers(name):
    about = json.loads(str(TABLES[f"{name}-about"]))
    file = {"model_type": "llama", "max_position_embeddings": about["context"]}
    file = Attributes(file, llama.DEFAULTS["llama"])
    config = rope_json.parse(file, about["parameters"], about["head_dim"])
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
@pytest.mark.parametrize("last", [0, 4_096, 131_072, 1_000_000, 2**24, 2**30])
def test_angles_are_exact_however_long_the_text(name, last):
    """Against float64; those that go by length are exact for their frequencies in float32."""
    how = dict(plain={}, yarn=dict(factor=4.0, original=4096), dynamic=dict(original=4096))[name]
    config = Rope(scaling="none" if name == "plain" else name, **how)
    positions = np.array([[last, last - 1, -last]])
    tables = jax.jit(lambda at: rope.table(at, config, 128, jnp.array([[10_000]])))(positions)
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


BY_LENGTH = ModelConfig(
    vocab_size=64,
    context=64,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    pattern=(
        full(rope=Rope(100.0, "dynamic", 4.0, 6)),
        full(rope=Rope(100.0, "longrope", 4.0, 6, short=(1.0,) * 4, long=(4.0,) * 4)),
    ),
    attention_kernel="reference",
    dtype="float32",
)
PACKED = [(3, 13), (13, 3), (5, 6, 4), (16,), (7, 2, 7), (6, 10), (1, 15), (8, 8)]
T = 16


def hidden(sizes, rules, tokens, where):
    """The last hidden states of `BY_LENGTH`, [B, T, D], on a mesh of these sizes."""
    with jax.set_mesh(make_mesh(sizes)):
        planned = transformer.abstract(BY_LENGTH, rules)
        draw, leaves = np.random.default_rng(0), {}
        for name, leaf in tree.named_leaves(planned).items():
            value = draw.standard_normal(leaf.shape) * 0.2 + name.endswith("scale_D")
            leaves[name] = jax.device_put(value.astype(leaf.dtype), leaf.sharding.spec)
        model = tree.with_leaves(planned, leaves)
        arrays = [jax.device_put(x, rules("batch", "length")) for x in (tokens, *where)]
        return np.asarray(jax.jit(lambda model, *args: model(*args)[0])(model, *arrays))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 64, (len(PACKED), T), np.int32)


@pytest.fixture(scope="module")
def alone(tokens):
    """(row, first, end, hidden states) of each document of PACKED in a row of its own."""
    ends = [np.cumsum((0, *row)) for row in PACKED]
    spans = [(b, i, j) for b, end in enumerate(ends) for i, j in itertools.pairwise(end)]
    own = np.zeros((len(spans), T), np.int32)
    for row, (b, i, j) in zip(own, spans, strict=True):
        row[: j - i] = tokens[b, i:j]
    where = documents(*[(j - i,) for _, i, j in spans], length=T)
    found = hidden((1, 1, 1), sharding.whole(), own, where)
    return [(*span, row[: span[2] - span[1]]) for span, row in zip(spans, found, strict=True)]


@pytest.mark.parametrize(("sizes", "order"), [((1, 1, 1), "contiguous"), ((2, 4, 1), "zigzag")])
def test_frequencies_go_by_the_length_of_each_document(tokens, alone, sizes, order):
    """Packed behind, before and beside longer ones, over shards too, a document is as alone."""
    rules = sharding.training(layout=order)
    to = layout.order(order, T, sizes[1])
    arrays = [x[:, to] for x in (tokens, *documents(*PACKED, length=T))]
    packed = hidden(sizes, rules, arrays[0], arrays[1:])[:, np.argsort(to)]
    for row, first, end, expected in alone:
        assert_close(packed[row, first:end], expected, "model", what=f"row {row} from {first}")


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
