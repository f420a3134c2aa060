"""Scores against log_softmax of one whole forward pass."""

import json
import math

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from core.config import Unsupported, UserError
from core.sharding import MeshConfig
from infer import load, score
from infer.config import ScoreConfig
from infer.engine import Engine, Plan


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A workdir with a bundle and its tokenizer."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        workdir = tmp_path_factory.mktemp("bundle")
        cases.save(workdir)
    return workdir


def run(bundle, monkeypatch, sizes=(1, 1, 1), strategy="auto", **fields):
    """The rows of `python -m infer.score` with these fields, on a mesh of these sizes."""
    monkeypatch.setattr(score, "make_mesh", lambda _: make_mesh(sizes))
    mesh = MeshConfig(strategy=strategy)
    return score.main(cases.experiment(bundle, score=ScoreConfig(**fields), mesh=mesh))


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1),
        *(pytest.param(x, marks=pytest.mark.slow) for x in [(2, 1, 2), (1, 4, 1)]),
        (2, 2, 2),
    ],
)
def test_scores_are_those_of_the_full_forward(bundle, tmp_path, monkeypatch, capsys, sizes):
    rng = np.random.default_rng(0)
    rows = [{"tokens": rng.integers(0, 290, n).tolist()} for n in (30, 1, 17)]
    path = cases.write_jsonl(tmp_path / "in.jsonl", [*rows, {"text": "the cat"}])
    output = tmp_path / "out.jsonl"
    # Chunks of 7: none of the lengths divides, and the window of 6 wraps around.
    fields = dict(input=path, output=str(output), batch_size=2, prefill_chunk=7)
    results = run(bundle, monkeypatch, sizes, **fields)
    assert [json.loads(line) for line in output.read_text().splitlines()] == results
    with jax.set_mesh(make_mesh((1, 1, 1))):
        model, tokenizer, _, _ = load.load(bundle)
        for given, row in zip(rows, results, strict=False):
            assert row["tokens"] == given["tokens"]
            logprobs_TV = jax.nn.log_softmax(cases.full_logits(model, row["tokens"]), axis=-1)
            expected = [float(logprobs_TV[t, v]) for t, v in enumerate(row["tokens"][1:])]
            assert row["logprobs"][0] is None
            np.testing.assert_allclose(row["logprobs"][1:], expected, atol=1e-4)
            if expected:
                assert row["mean_logprob"] == pytest.approx(np.mean(expected), abs=1e-4)
                assert row["perplexity"] == pytest.approx(math.exp(-row["mean_logprob"]))
    assert results[1]["mean_logprob"] is None and results[1]["perplexity"] is None
    assert results[3]["tokens"] == [1, *tokenizer.encode("the cat").tolist()]
    total = sum(sum(row["logprobs"][1:]) for row in results)
    count = sum(len(row["tokens"]) - 1 for row in results)
    out = capsys.readouterr().out
    assert f"4 texts, {count} tokens scored" in out and f"{total / count:.4f} nats" in out


def test_rows_of_a_batch_are_in_the_file_when_the_next_is_cut_off(bundle, tmp_path, monkeypatch):
    class Fake:
        calls = 0

        def __init__(self, *args, **kwargs):
            pass

        def score(self, batch):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return None, [np.full(len(row) - 1, -800.0) for row in batch]

    monkeypatch.setattr(score, "Engine", Fake)
    monkeypatch.setattr(load, "restore", lambda *_: None)
    path = cases.write_jsonl(tmp_path / "in.jsonl", [{"tokens": [1, 2, n]} for n in range(3)])
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(bundle, monkeypatch, input=path, output=str(output), batch_size=2)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [[1, 2, 0], [1, 2, 1]]
    assert rows[0]["mean_logprob"] == -800 and rows[0]["perplexity"] is None  # beyond float64
    with pytest.raises(UserError, match="score.output=.* is the file of score.input="):
        run(bundle, monkeypatch, input=path, output=path)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 2)])
def test_long_chunks_are_scored_in_parts(sizes):
    """300 tokens in chunks of 256, whose logits exist for 64 tokens a shard at a time."""
    config = cases.model_config(context=320)
    row = np.random.default_rng(0).integers(0, 290, 300).astype(np.int32)
    with jax.set_mesh(make_mesh(sizes)):
        model = cases.random_model(config)
        (scores,) = Engine(model, Plan.of(1, 300, 0, 256)).score([row])[1]
    with jax.set_mesh(make_mesh((1, 1, 1))):
        logits_TV = cases.full_logits(cases.random_model(config), row)
    expected = jax.nn.log_softmax(logits_TV, axis=-1)[np.arange(299), row[1:]]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_mesh_strategy_is_followed(bundle, tmp_path, monkeypatch):
    path = cases.write_jsonl(tmp_path / "in.jsonl", [{"tokens": [3, 4]}])
    with pytest.raises(Unsupported, match="mesh.strategy='local' needs whole rows"):
        run(bundle, monkeypatch, (1, 2, 1), "local", input=path)


def test_refused(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "restore", None)  # refused before any work is done
    with pytest.raises(UserError, match=r"score\.input is empty"):
        run(bundle, monkeypatch)
    path = cases.write_jsonl(tmp_path / "in.jsonl", [{"tokens": [3]}, {"tokens": [3] * 65}])
    with pytest.raises(UserError, match=r"text 2 has 65 tokens, more than model\.context=64"):
        run(bundle, monkeypatch, input=path)
    path = cases.write_jsonl(tmp_path / "in.jsonl", [{"tokens": [300]}])
    with pytest.raises(UserError, match=r"token 300 is not in the vocabulary of 290"):
        run(bundle, monkeypatch, input=path)
