"""The compute dtype: chosen by the section that runs, else the bundle's, and told in the header."""

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from core.config import UserError
from evals import recall
from evals.config import BenchConfig, RecallConfig
from evals.report import source
from evals.report.show import tables
from infer import decode, load, score
from infer.config import DecodeConfig, ScoreConfig
from infer.speculative import speculate
from model.attention.spec import full

DTYPES = {  # of a section: what computes, and what the header says of it
    "": ("bfloat16", "computing in bfloat16 (as the bundle says)"),
    "float32": ("float32", "computing in float32 ({}.dtype)"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A workdir with a bundle that computes in bfloat16, of float32 parameters."""
    workdir = tmp_path_factory.mktemp("bundle")
    with jax.set_mesh(make_mesh((1, 1, 1))):
        model = cases.model_config(dtype="bfloat16", num_layers=1, pattern=(full(),))
        cases.save(workdir, model, with_tokenizer=False)
    return workdir


def test_scores_are_of_the_dtype_that_is_asked_for(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(score, "make_mesh", lambda _: make_mesh((1, 1, 1)))
    tokens = np.random.default_rng(0).integers(0, 290, 40)
    path = cases.write_jsonl(tmp_path / "in.jsonl", [{"tokens": tokens.tolist()}])
    with jax.set_mesh(make_mesh((1, 1, 1))):
        exact = cases.random_model(load.find(bundle, dtype="float32").config)
        logprobs_TV = np.asarray(jax.nn.log_softmax(cases.full_logits(exact, tokens), axis=-1))
    expected = logprobs_TV[np.arange(39), tokens[1:]]
    asked = ScoreConfig(input=path, dtype="float32", prefill_chunk=40)
    (row,) = score.main(cases.experiment(bundle, score=asked))
    np.testing.assert_allclose(row["logprobs"][1:], expected, atol=1e-4)  # bfloat16: 0.05 off
    told = DTYPES["float32"][1].format("score")
    assert f"{bundle} step 7, {told}" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", DTYPES)
def test_headers_of_decode_and_bench(bundle, dtype):
    computes, told = DTYPES[dtype]
    found = load.find(bundle, dtype=dtype)
    assert found.config.dtype == computes
    header = decode.header(found, DecodeConfig(dtype=dtype), [], None)
    assert f"M parameters, {told.format('decode')}, " in header
    experiment = cases.experiment(bundle, bench=BenchConfig(dtype=dtype))
    with jax.set_mesh(make_mesh((1, 1, 1))):
        of = source.find(experiment)
    assert of.model.config.dtype == of.depends["dtype"] == computes
    assert told.format("bench") in tables.title(source.head(experiment, of, "a device"))


@pytest.mark.parametrize(
    ("section", "config", "run"),
    [
        ("decode", DecodeConfig, decode.main),
        ("score", ScoreConfig, score.main),
        ("recall", RecallConfig, recall.main),
        ("bench", BenchConfig, source.find),
        ("decode", DecodeConfig, lambda run: speculate.find_draft(run.decode, None, [])),
    ],
)
def test_every_bundle_is_opened_in_the_dtype_of_its_section(monkeypatch, section, config, run):
    """The draft of a speculation too."""

    def find(path, step=None, dtype=""):
        raise UserError(f"{path} in {dtype}")

    monkeypatch.setattr(load, "find", find)
    how = dict(draft="small", speculate=2) if section == "decode" else {}
    how |= {"input": "texts.txt"} if section == "score" else {}
    asked = {section: config(checkpoint="bundle", dtype="float32", **how)}
    with pytest.raises(UserError, match="in float32"):
        run(cases.experiment("nowhere", **asked))
