"""Beam search against a plain restatement, one whole forward pass a candidate."""

import itertools
import json
from types import SimpleNamespace

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from core.config import UserError
from infer import decode, load
from infer.config import DecodeConfig
from infer.engine import Engine, Plan
from infer.sampling import beam
from infer.sampling.beam import Search
from model.attention.spec import full, sliding
from model.cache.form import CacheConfig

V, PLAIN = 7, CacheConfig()
PROMPTS = [np.random.default_rng(n).integers(0, V, n).astype(np.int32) for n in (9, 1, 13, 4)]
LIMITS = 9, 5, 6, 1


def search(model, beams, penalty, eos=(), small=V, prompts=PROMPTS, limits=LIMITS, form=PLAIN):
    """[(score, tokens, log-probabilities)] of each prompt, best first."""
    rows = [prompt for prompt in prompts for _ in range(beams)]
    engine = Engine(
        model, Plan.of(beam.at_once(99, len(prompts), beams), 13, 9, 8),
        SimpleNamespace(eos=eos, vocab_size=small), form=form,
    )  # fmt: skip
    length_B, limit_B = np.ones(engine.plan.batch, int), np.zeros(engine.plan.batch, int)
    length_B[: len(rows)] = [len(row) for row in rows]
    limit_B[: len(rows)] = np.repeat(limits, beams)
    now = engine.prefill(rows, new=limit_B)
    tokens_BT, logprobs_BT, score_B = Search(engine, beams, penalty)(now, length_B, limit_B)
    found = []
    for b in range(len(rows)):
        kept_T = tokens_BT[b] >= 0
        found.append((score_B[b], tokens_BT[b][kept_T].tolist(), logprobs_BT[b][kept_T]))
    return [found[b : b + beams] for b in range(0, len(rows), beams)]


def slow(model, prompt, beams, limit, penalty, eos=(), small=V):
    """[(score, tokens)], as in `transformers` with early_stopping="never"."""
    running, finished = [(0.0, [])], []
    for length in range(1, limit + 1):
        ways = []
        for score, tokens in running:
            logits_V = cases.full_logits(model, [*prompt, *tokens])[-1].astype(np.float64)
            logprobs_V = logits_V - np.log(np.exp(logits_V).sum())
            ways += [(score + logprobs_V[v], [*tokens, v]) for v in range(small)]
        ways.sort(key=lambda way: -way[0])
        ended = [way for way in ways[:beams] if way[1][-1] in eos]
        running = [way for way in ways if way[1][-1] not in eos][:beams]
        if length == limit:
            ended += running
        finished += [(score / length**penalty, tokens) for score, tokens in ended]
        finished = sorted(finished, key=lambda text: -text[0])[:beams]
        best = running[0][0] / (limit if penalty > 0 else length) ** penalty
        if len(finished) == beams and finished[-1][0] >= best:
            break
    return finished


def check(model, beams, penalty, eos=()):
    lengths = set()
    for prompt, limit, texts in zip(
        PROMPTS, LIMITS, search(model, beams, penalty, eos), strict=True
    ):
        expected = slow(model, prompt, beams, limit, penalty, eos)
        assert [tokens for _, tokens, _ in texts] == [tokens for _, tokens in expected]
        scores = [score for score, _, _ in texts]
        np.testing.assert_allclose(scores, [score for score, _ in expected], rtol=1e-4)
        for score, tokens, logprobs_T in texts:
            np.testing.assert_allclose(logprobs_T.sum() / len(tokens) ** penalty, score, rtol=1e-4)
            lengths.add(len(tokens))
    return lengths


@pytest.mark.parametrize(
    "penalty", [1.0, -0.5, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 2.0))]
)
def test_a_plain_restatement_finds_the_same(one_device, penalty):
    model = cases.random_model(cases.model_config(num_layers=2))
    assert len(check(model, 3, penalty, eos=(2, 5))) > 3  # ends came at many lengths


def test_without_end_tokens_texts_grow_to_their_limits(one_device):
    model = cases.random_model(cases.model_config(num_layers=1, pattern=(sliding(4),)))
    assert check(model, 4, 1.0) == set(LIMITS)


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), pytest.param((1, 4, 1), marks=pytest.mark.slow)], ids=str
)
def test_on_a_mesh(sizes):
    with jax.set_mesh(make_mesh((1, 1, 1))):
        expected = search(cases.random_model(cases.model_config(num_layers=2)), 3, 1.0, eos=(2,))
    with jax.set_mesh(make_mesh(sizes)):
        found = search(cases.random_model(cases.model_config(num_layers=2)), 3, 1.0, eos=(2,))
    for texts, others in zip(found, expected, strict=True):
        assert [text[1] for text in texts] == [other[1] for other in others]


@pytest.mark.slow
def test_rows_of_the_hosts_memory(one_device):
    model = cases.random_model(cases.model_config(num_layers=1, pattern=(full(),)))
    found, expected = (
        search(model, 3, 1.0, form=form) for form in (CacheConfig(cache_host=True), PLAIN)
    )
    for texts, others in zip(found, expected, strict=True):
        assert [text[1] for text in texts] == [other[1] for other in others]


def test_enough_beams_find_the_best_of_all_texts(one_device):
    model = cases.random_model(cases.model_config(num_layers=2))
    (texts,) = search(model, 9, 1.0, small=3, prompts=PROMPTS[:1], limits=(3,))
    scores = {}
    for tokens in itertools.product(range(3), repeat=3):
        logits_TV = cases.full_logits(model, [*PROMPTS[0], *tokens])[-4:-1].astype(np.float64)
        logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
        scores[tokens] = logprobs_TV[np.arange(3), tokens].sum() / 3
    best = sorted(scores, key=lambda tokens: -scores[tokens])[:9]
    assert [tuple(tokens) for _, tokens, _ in texts] == best


def test_one_beam_is_greedy(one_device):
    model = cases.random_model(cases.model_config(num_layers=2))
    for prompt, limit, texts in zip(PROMPTS, LIMITS, search(model, 1, 1.0), strict=True):
        assert texts[0][1] == cases.greedy(model, prompt, limit, V)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    with jax.set_mesh(make_mesh((1, 1, 1))):
        workdir = tmp_path_factory.mktemp("bundle")
        cases.save(workdir, cases.model_config(num_layers=2))
    return workdir


def run(bundle, **fields):
    fields = dict(beams=3, stream=False, max_tokens=5) | fields
    return decode.main(cases.experiment(bundle, decode=DecodeConfig(**fields)))


def test_the_command(bundle, tmp_path, monkeypatch, capsys):
    """Two prompts a batch of 6 rows, and one of the next; the second of them has one text."""
    monkeypatch.setattr(decode, "make_mesh", lambda _: make_mesh((1, 1, 1)))
    lines = [
        {"text": "the cat"},
        {"text": "a caf", "n": 1},
        {"text": "sat on the", "max_tokens": 3},
    ]
    prompts = cases.write_jsonl(tmp_path / "in.jsonl", lines)
    rows = run(bundle, prompts=prompts, n=2, batch_size=7, logprobs=True, prompt_logprobs=True)
    assert [row["prompt"] for row in rows] == [
        "the cat", "the cat", "a caf", "sat on the", "sat on the",
    ]  # fmt: skip
    for row in rows:
        assert row["finish_reason"] in ("stop", "length")
        assert len(row["prompt_logprobs"]) == len(row["prompt_tokens"])
        score = sum(row["logprobs"]) / len(row["tokens"])
        assert row["score"] == pytest.approx(score, rel=1e-4)
        json.dumps(row)
    assert rows[0]["score"] >= rows[1]["score"] and rows[3]["score"] >= rows[4]["score"]
    assert rows[0]["tokens"] != rows[1]["tokens"] and len(rows[3]["tokens"]) <= 3
    out, err = capsys.readouterr()
    assert out == "".join(row["text"] + "\n" for row in rows)
    assert "3 beams, length_penalty 1" in err
    alone = run(bundle, prompt="sat on the", n=2, max_tokens=3)
    assert [row["tokens"] for row in alone] == [row["tokens"] for row in rows[3:]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(stream=True), "decode.beams=3 with stream=True"),
        (dict(speculate=2), "beams=3 with speculate=2"),
        (dict(top_logprobs=2), "beams=3 with top_logprobs=2"),
        (dict(temperature=0.5), "beams=3 with temperature=0.5: beam search looks for the"),
        (dict(temperature=0.0), "beams=3 with temperature=0.0"),
        (dict(stop=("a",)), "beams=3 with stop=('a',)"),
        (dict(n=4), "n=4 with decode.beams=3"),
        (dict(beams=291), "decode.beams=291 is more than the vocabulary of 290"),
        (dict(beams=0, length_penalty=0.5), "length_penalty=0.5 with beams=0"),
    ],
)
def test_refused(bundle, monkeypatch, fields, message):
    monkeypatch.setattr(load, "restore", None)
    with pytest.raises(UserError) as error:
        run(bundle, prompt="a", **fields)
    assert message in str(error.value)


def test_the_cache_is_donated(one_device):
    model = cases.random_model(cases.model_config(num_layers=1, pattern=(sliding(4),)))
    engine = Engine(model, Plan.of(2, 4, 4, 4))
    now = engine.prefill(PROMPTS[3:] * 2)
    Search(engine, 2, 1.0)(now, np.full(2, 4), np.full(2, 4))
    assert now.cache.slots[0].k_LBKSH.is_deleted()
