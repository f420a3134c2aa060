"""Texts without end: sinks and a window, in memory and time that do not grow."""

import resource
import statistics
import sys
import time

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from core import tree
from core.config import UserError
from infer import decode, score
from infer.config import DecodeConfig, ScoreConfig
from infer.engine import Engine, Plan
from infer.sampling.params import Sampling, pack
from model.attention.spec import full, sliding
from model.cache.form import CacheConfig
from model.ops.rope import Rope

WINDOW, SINKS = 28, 4
FORM = CacheConfig(cache_window=WINDOW, cache_sinks=SINKS)
ONE_LAYER = dict(num_layers=1, pattern=(full(rope=Rope(500_000.0)),))
MILLION = 1_000_000
CHUNK = 128  # some windows: in longer ones most pairs of tokens are computed in vain


def text(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 320, length).astype(np.int32)


def peak_bytes() -> int:
    """Most memory that this process has had so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def assert_reads_what_is_kept(length: int, new: int, chunk: int) -> None:
    """A layer's keys are of single tokens: sinks and window make the text that it should see."""
    model = cases.random_model(cases.model_config(**ONE_LAYER))
    engine = Engine(model, Plan(1, length + new, chunk), form=FORM)
    tokens_T = text(length)
    state = engine.start(
        engine.prefill([tokens_T]), [tokens_T], [0], pack([Sampling(temperature=0, max_tokens=new)])
    )
    made, logprobs = [], []
    for each in engine.decode(state, np.zeros(1, bool)):
        made += each.tokens_BC[0].tolist()
        logprobs += each.logprobs_BC[0].tolist()
    whole = np.append(tokens_T, made[:new]).astype(np.int32)
    for i in (0, 1, new - 1):
        end = length + i
        kept = np.append(whole[:SINKS], whole[end - WINDOW : end])
        expected_V = jax.nn.log_softmax(cases.full_logits(model, kept)[-1])
        assert int(expected_V.argmax()) == made[i]
        np.testing.assert_allclose(logprobs[i], expected_V[made[i]], atol=5e-5)


@pytest.mark.parametrize("chunk", [7, 64])
def test_each_token_sees_what_is_kept(one_device, chunk):
    """Also those that come in one chunk with the sinks, and stand beyond the window."""
    model = cases.random_model(cases.model_config(**ONE_LAYER))
    form, tokens_T = CacheConfig(cache_window=5, cache_sinks=3), text(60)
    engine = Engine(model, Plan(1, 64, chunk), form=form)
    (found,) = engine.score([tokens_T])[1]
    for end in range(1, 60):
        kept = tokens_T[:end] if end < 8 else np.append(tokens_T[:3], tokens_T[end - 5 : end])
        expected_V = jax.nn.log_softmax(cases.full_logits(model, kept)[-1])
        np.testing.assert_allclose(found[end - 1], expected_V[tokens_T[end]], atol=5e-5)


def test_twenty_thousand_tokens_read_and_made_as_what_is_kept(one_device):
    assert_reads_what_is_kept(20_000 - 16, 16, 512)


@pytest.mark.slow
def test_a_million_tokens_read_and_made_as_what_is_kept(one_device):
    assert_reads_what_is_kept(MILLION - 1_000, 1_000, CHUNK)


@pytest.mark.slow
def test_a_million_tokens_in_the_memory_and_the_time_of_a_few(one_device):
    """A streamed layer and one with sinks of its own; the deep text and the short one in turn."""
    pattern = full(), sliding(60, sinks=SINKS)
    model = cases.random_model(cases.model_config(num_layers=4, pattern=pattern))
    engine = Engine(model, Plan(1, MILLION, CHUNK), form=FORM)
    tokens_T, begun, calls = text(MILLION - 2_000), 20_000, 200
    now = engine.prefill([tokens_T[:begun]])
    size, peak = tree.num_bytes(now), peak_bytes()
    deep = jax.block_until_ready(engine.prefill([tokens_T], now, begun))
    assert tree.num_bytes(deep) == size < 50_000
    short = engine.prefill([tokens_T[:begun]])
    hows = pack([Sampling(temperature=0, max_tokens=2_000)])
    states = {
        end: engine.start(now, [tokens_T[:end]], [0], hows)
        for now, end in ((short, begun), (deep, len(tokens_T)))
    }
    seconds = {end: [] for end in states}
    for _ in range(calls):
        for end in states:
            began = time.perf_counter()
            states[end], _ = jax.block_until_ready(engine.advance(states[end], np.zeros(1, bool)))
            seconds[end].append(time.perf_counter() - began)
    assert int(states[len(tokens_T)].made_B[0]) == 8 * calls
    first, last = (statistics.median(x[10:]) for x in seconds.values())
    print(f"{1e3 * first / 8:.3f} ms a token at {begun:,}, {1e3 * last / 8:.3f} at {MILLION:,}")
    assert last < 1.3 * first
    assert peak_bytes() - peak < 2**26


def test_the_context_is_no_limit_for_a_window(one_device, tmp_path, monkeypatch, capsys):
    cases.save(tmp_path)
    for command in (decode, score):
        monkeypatch.setattr(command, "make_mesh", lambda _: make_mesh((1, 1, 1)))
    fields = dict(prompt="the cat", max_tokens=90, temperature=0.0)
    with pytest.raises(UserError, match=r"more than model.context=64.* decode.cache_window"):
        decode.main(cases.experiment(tmp_path, decode=DecodeConfig(**fields)))
    how = dict(cache_window=8, cache_sinks=2)
    (row,) = decode.main(cases.experiment(tmp_path, decode=DecodeConfig(**fields, **how)))
    assert len(row["tokens"]) == 90
    assert "cache stream 8+2" in capsys.readouterr().err
    path = cases.write_jsonl(tmp_path / "in.jsonl", [{"tokens": [3] * 100}])
    with pytest.raises(UserError, match=r"more than model.context=64: .* score.cache_window"):
        score.main(cases.experiment(tmp_path, score=ScoreConfig(input=path)))
    (row,) = score.main(cases.experiment(tmp_path, score=ScoreConfig(input=path, **how)))
    assert len(row["logprobs"]) == 100
