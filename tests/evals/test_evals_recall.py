"""Recall through the cache: greedy answers of one whole forward pass, and RoPE extended by hand."""

import dataclasses
import json

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from core.config import UserError
from core.sharding import MeshConfig
from data.texts import recall as texts
from data.tokenizer import trained
from evals import recall
from evals.config import RecallConfig
from model.attention.spec import full, sliding
from model.ops import rope
from model.ops.rope import Rope

CONFIG = RecallConfig(
    lengths=(160, 230), records=20, asked=4, samples=3, batch_size=2, prefill_chunk=64, factor=4.0
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A tokenizer with a token a word."""
    many = [texts.document(0, i, 400) for i in range(1500)]
    return trained.train(many, 576, tmp_path_factory.mktemp("vocabulary"))


def model_config(**fields):
    return cases.model_config(vocab_size=576, context=256, pattern=(sliding(6), full()), **fields)


def greedy_answers(model, vocabulary, length, config=CONFIG):
    """[X, Q]: argmax after each text and key, one whole forward pass each; and what is right."""
    rows, asked = recall._quizzes(length, vocabulary, config)
    tokens = [
        [cases.full_logits(model, [*row, key])[-1].argmax() for key, _ in pairs]
        for row, pairs in zip(rows, asked, strict=True)
    ]
    return np.array(tokens), asked[..., 1]


@pytest.mark.parametrize("sizes", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 1)])
def test_answers_are_those_of_the_full_forward(vocabulary, sizes, monkeypatch):
    """Samples do not fill the last batch, chunks do not divide the texts, the window wraps."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        model = cases.random_model(model_config())
        expected = {n: greedy_answers(model, vocabulary, n) for n in CONFIG.lengths}
    with jax.set_mesh(make_mesh(sizes)):
        model = cases.random_model(model_config())
        engines = recall._engines(model, vocabulary, CONFIG)
        for length, (tokens, _) in expected.items():
            rows, asked = recall._quizzes(length, vocabulary, CONFIG)
            told = asked.copy()
            told[..., 1] = tokens  # so each answer is right
            told[1, 2, 1] += 1  # but this one
            right = recall.answers(*engines, rows, told)
            assert right.shape == (3, 4)
            assert not right[1, 2] and right.sum() == 11


def test_rows_count_what_is_right_by_depth(vocabulary, monkeypatch):
    right = np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 1]], bool)
    monkeypatch.setattr(recall, "answers", lambda *_: right)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        model = cases.random_model(model_config())
        rows = list(recall.rows(model, vocabulary, CONFIG))
    assert [row["length"] for row in rows] == [160, 230]
    for row in rows:
        assert row["accuracy"] == pytest.approx(100 * 7 / 12) and row["asked"] == 12
        assert row["by_depth"] == pytest.approx([100, 100 / 3, 0, 100])


def test_texts_fill_the_length(vocabulary):
    for length in CONFIG.lengths:
        rows, asked = recall._quizzes(length, vocabulary, CONFIG)
        assert {len(row) + 2 for row in rows} == {length}  # a key, and its value
        assert all(row[0] == vocabulary.bos for row in rows)
        for row, pairs in zip(rows, asked, strict=True):
            row = row.tolist()
            for key, value in pairs:
                assert row[row.index(key) - 1] == value


def test_extended_ropes():
    """What the papers say, pair by pair, of a head of 64 and four times 1024 tokens."""
    plain = rope.frequencies(Rope(), 64)

    def found(name, length=None):
        extended = recall.extended(Rope(), name, 4.0, 1024, 64)
        lengths = None if length is None else np.array([length])
        return np.asarray(rope.frequencies(extended, 64, lengths)).reshape(-1)

    np.testing.assert_allclose(found("none"), plain)
    np.testing.assert_allclose(found("pi"), plain / 4)
    for ntk in (found("ntk"), found("dynamic", 4096)):
        np.testing.assert_allclose(ntk[0], plain[0])
        np.testing.assert_allclose(ntk[-1], plain[-1] / 4, rtol=1e-5)
        assert (np.diff(ntk / plain) < 0).all()
    np.testing.assert_allclose(found("dynamic", 900), plain, rtol=1e-6)
    turns = 1024 * np.asarray(plain) / (2 * np.pi)
    yarn = found("yarn")
    np.testing.assert_allclose(yarn[turns > 32], plain[turns > 32])
    np.testing.assert_allclose(yarn[turns < 0.5], plain[turns < 0.5] / 4)
    with pytest.raises(UserError, match="scaled already, linear"):
        recall.extended(Rope(scaling="linear", factor=2.0), "yarn", 4.0, 1024, 64)


def test_the_command(vocabulary, tmp_path, monkeypatch, capsys):
    """A bundle in, recall.json and a table out. Refused: a vocabulary of other words, and texts
    longer than the table of a model that learned its positions.
    """
    monkeypatch.setattr(recall, "make_mesh", lambda _: make_mesh((1, 1, 1)))
    with jax.set_mesh(make_mesh((1, 1, 1))):
        cases.save(tmp_path, model_config())
    config = RecallConfig(
        lengths=(160,), ropes=("none", "yarn"), records=20, asked=4, samples=2, prefill_chunk=64
    )
    experiment = cases.experiment(tmp_path, recall=config, mesh=MeshConfig())
    with pytest.raises(UserError, match="not a token a word"):
        recall.main(experiment)
    monkeypatch.setattr(recall.load.tokenizers, "load", lambda _: vocabulary)
    (tmp_path / "recall.json").write_text("notes")
    with pytest.raises(UserError, match="recall.json is there already, and this command did not"):
        recall.main(experiment)
    (tmp_path / "recall.json").unlink()
    kept = []

    def line(row):
        kept.append(json.loads((tmp_path / "recall.json").read_text()))
        return ""

    monkeypatch.setattr(recall, "line", line)
    rows = recall.main(experiment)
    assert [(len(one["rows"]), one["complete"]) for one in kept] == [(1, False), (2, True)]
    assert [(row["rope"], row["length"]) for row in rows] == [("none", 160), ("yarn", 160)]
    learned = dataclasses.replace(model_config(), context=128, learned_positions=True)
    told = recall.load.find(tmp_path)._replace(config=learned)
    with monkeypatch.context() as patched:
        patched.setattr(recall.load, "find", lambda *_: told)
        with pytest.raises(UserError, match="recall.lengths=160 is more than model.context=128"):
            recall.main(experiment)
    written = json.loads((tmp_path / "recall.json").read_text())
    assert written["rows"] == rows and written["bundle"] == f"{tmp_path} step {cases.STEP}"
    assert "| yarn |" in capsys.readouterr().out


def test_a_length_that_is_too_short_is_refused_before_any_is_read(vocabulary):
    config = RecallConfig(lengths=(16384, 64))
    with pytest.raises(UserError, match="recall.lengths=64: a quiz of 61 tokens"):
        next(recall.rows(None, vocabulary, config))
