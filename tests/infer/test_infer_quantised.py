"""Models with rounded weights, through the cache: they are those of the numbers these stand for."""

import family_cases
import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh
from quantised_oracle import as_floats
from tolerances import assert_close

from core import lazy, sharding, tree
from core.config import UserError
from core.sharding import MeshConfig
from infer import decode, load, score
from infer.config import DecodeConfig, ScoreConfig
from model.sizes import memory, parts, weights

ONE, MESH = (1, 1, 1), (2, 2, 2)
# Learned positions and biases; parallel blocks, one kv head; sandwiches, softcaps, windows, tied.
FAMILIES = [("gpt2", "int4"), ("gemma-2", "int8")]
EVERY = [(name, kind) for name in family_cases.NAMES for kind in ("int8", "int4")]


def rounded(name, kind, checkpoints):
    """The golden `name` with rounded weights, on the mesh in use."""
    model = family_cases.opened(name, checkpoints, sharding.prefilling())
    form = weights.rounding(model.config, model.rules, kind, None)
    return load.held(model, form), model.config


def assert_stands_for_its_numbers(name, kind, sizes, checkpoints):
    """And says how many bytes it has."""
    tokens = family_cases.golden(name).tokens
    with jax.set_mesh(make_mesh(sizes)):
        model, config = rounded(name, kind, checkpoints)
        if sizes == ONE:
            held = weights.leaves(model)
            if config.tied_head:  # the same arrays, twice: infer.layout
                del held["head_VD"]
            assert memory.weight_bytes(config, kind, None) == tree.num_bytes(held)
        found = family_cases.through_the_cache(model, tokens)
        expected = family_cases.through_the_cache(as_floats(model), tokens)
    assert_close(found, expected, "model")
    if kind == "int8":  # and not far from the model that was rounded
        exact = family_cases.golden(name).logits[:, family_cases.PROMPT - 1 :]
        assert np.abs(found - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", FAMILIES)
def test_families_decode_as_the_numbers_do(name, kind, checkpoints):
    assert_stands_for_its_numbers(name, kind, ONE, checkpoints)


def others():
    """The other cases: each family with one of the two kinds is slow, the rest exhaustive."""
    for place, (name, kind) in enumerate(EVERY):
        is_slow = place % 4 in (0, 3)  # int8 and int4 by turns
        mark = pytest.mark.slow if is_slow else pytest.mark.exhaustive
        if (name, kind) not in FAMILIES:
            yield pytest.param(name, kind, marks=mark)


@pytest.mark.parametrize(("name", "kind"), others())
def test_every_other_family_does(name, kind, checkpoints):
    assert_stands_for_its_numbers(name, kind, ONE, checkpoints)


@pytest.mark.slow
def test_they_do_on_a_mesh(checkpoints):
    assert_stands_for_its_numbers("gpt2", "int4", MESH, checkpoints)


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("falcon-7b", "int8"), ("gemma-2", "int4")])
def test_others_do_on_a_mesh(name, kind, checkpoints):
    assert_stands_for_its_numbers(name, kind, MESH, checkpoints)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A workdir with a bundle and its tokenizer."""
    with jax.set_mesh(make_mesh(ONE)):
        workdir = tmp_path_factory.mktemp("bundle")
        cases.save(workdir)
    return workdir


@pytest.mark.parametrize("sizes", [ONE, MESH])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_few_weights_are_ever_floats(bundle, monkeypatch, sizes, kind):
    """When a parameter is read, all before it are rounded: what lives is little more than that."""
    alive, read = [], lazy.StoredArray.read

    def counted(stored, *rows):
        alive.append(tree.num_bytes(jax.live_arrays()))
        return read(stored, *rows)

    monkeypatch.setattr(lazy.StoredArray, "read", counted)
    with jax.set_mesh(make_mesh(sizes)):
        found, rules = load.find(bundle), sharding.prefilling()
        form = weights.rounding(found.config, rules, kind, None)
        before = tree.num_bytes(jax.live_arrays())
        model = load.restore(found, rules, form)
        whole = load.held(cases.random_model(found.config), form)
    assert len(alive) == len(parts.shapes(found.config))
    assert max(alive) - before <= memory.weight_bytes(found.config, kind, None)
    for name, x in tree.named_leaves(model).items():
        np.testing.assert_array_equal(x, tree.named_leaves(whole)[name], err_msg=name)


def test_greedy_text_is_the_same_in_int8(bundle, tmp_path, monkeypatch, capsys):
    output = {}
    for kind in ("compute", "int8"):
        monkeypatch.setattr(decode, "make_mesh", lambda _: make_mesh(ONE))
        config = DecodeConfig(prompt="the cat", temperature=0, max_tokens=12, weights=kind)
        (output[kind],) = decode.main(cases.experiment(bundle, decode=config, mesh=MeshConfig()))
        assert (", int8 weights" in capsys.readouterr().err) == (kind == "int8")
    assert output["int8"]["tokens"] == output["compute"]["tokens"]


def test_refused_before_weights_are_read(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "StoredArray", None)
    monkeypatch.setattr(score, "make_mesh", lambda _: make_mesh(ONE))
    path = cases.write_jsonl(tmp_path / "in.jsonl", [{"tokens": [3, 4]}])
    config = ScoreConfig(input=path, weights="int8", weights_group=3)
    with pytest.raises(UserError, match="weights_group=3 does not divide the 16 inputs of"):
        score.main(cases.experiment(bundle, score=config))
