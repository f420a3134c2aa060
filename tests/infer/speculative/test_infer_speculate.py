"""Guesses change nothing but the number of steps: tokens equal those that are drawn without."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh
from scipy import stats

from core.config import Unsupported, UserError
from infer import decode, load
from infer.config import DecodeConfig
from infer.engine import Engine, Plan
from infer.prefix import PrefixCache
from infer.sampling.params import Sampling, pack
from infer.speculative import guess
from infer.speculative.speculate import Speculator
from model.attention.spec import full, moba, nsa, prefix, sliding
from model.cache.form import CacheConfig

PLAIN = CacheConfig()
V = 12  # so few that n-grams come again
LIMITS = 24, 7, 15, 1
PROMPTS = [np.random.default_rng(n).integers(0, V, n).astype(np.int32) for n in (20, 1, 9, 17)]
HOWS = [
    Sampling(temperature=0),
    Sampling(temperature=0.6, top_p=0.9, seed=3, frequency_penalty=0.2, presence_penalty=0.1),
    Sampling(temperature=0.7, top_k=5, min_p=0.01, min_tokens=9, logit_bias=((3, 1.0),), seed=4),
    Sampling(temperature=0.5, repetition_penalty=1.1, banned_tokens=(1,), typical_p=0.9),
]
PATTERNS = {
    "full and ring": (sliding(6), full()),
    "sinks": (sliding(5, sinks=2),),
    "moba": (moba(block=4, top=2),),
    "nsa": (nsa(block=4, top=3, window=6, compress=4, step=2),),
}


def rows_of(parts, num):
    """(tokens, log-probabilities, the likeliest) of each row: what is not -1."""
    parts = list(parts)
    fields = [np.concatenate(field, axis=1) for field in zip(*parts, strict=True)]
    return [[field[b][fields[0][b] >= 0] for field in fields] for b in range(num)]


def check(model, hows, guesses=4, ngram=2, draft=None, eos=(), form=PLAIN):
    """The same rows with guesses as without; the speculator. `draft` is a model."""
    B = len(PROMPTS)
    hows = [dataclasses.replace(how, max_tokens=n) for how, n in zip(hows, LIMITS, strict=True)]
    hows = [dataclasses.replace(h, min_tokens=min(h.min_tokens, h.max_tokens)) for h in hows]
    tokenizer = SimpleNamespace(eos=eos, vocab_size=V)
    engine = Engine(model, Plan.of(B, 20, 24, 8), tokenizer, 2, form)
    if draft is not None:
        draft = PrefixCache(Engine(draft, engine.plan, tokenizer, 0, form), PROMPTS, LIMITS, 0)
    speculator = Speculator(engine, guesses, ngram, draft)

    def start():
        now = engine.prefill(PROMPTS, new=LIMITS)
        return engine.start(now, PROMPTS, [0] * B, pack(hows)), np.zeros(engine.plan.batch, bool)

    plain = rows_of(engine.decode(*start()), B)
    parts = speculator.decode(*start(), PROMPTS, speculator.read(slice(0, B)))
    for row, expected in zip(rows_of(parts, B), plain, strict=True):
        assert row[0].tolist() == expected[0].tolist()
        np.testing.assert_array_equal(row[2], expected[2])
        for i in (1, 3):
            np.testing.assert_allclose(row[i], expected[i], atol=2e-5)
        assert not eos or row[0][-1] in eos or len(row[0]) in LIMITS
    speculator.made = sum(len(row[0]) for row in plain)
    return speculator


def model_of(name, **fields):
    pattern = PATTERNS[name]
    return cases.random_model(
        cases.model_config(num_layers=len(pattern), pattern=pattern, **fields)
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("sinks", "moba", "nsa") else name
        for name in PATTERNS
    ],
)
def test_right_and_wrong_ngrams_give_the_same_tokens(one_device, name):
    speculator = check(model_of(name), HOWS)
    guesses, right, steps = speculator.tally
    assert 0 < right < guesses
    # Each step of a row gives one token beside the right guesses; the first is of no step.
    assert steps + right == speculator.made - len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4, 1), (2, 2, 2)], ids=str)
def test_on_a_mesh(sizes):
    """The text and a ring over seq, rows over data, heads over model."""
    with jax.set_mesh(make_mesh(sizes)):
        _, right, _ = check(model_of("full and ring"), HOWS).tally
        assert right


def test_a_draft_of_the_same_weights_is_always_right(one_device):
    model = model_of("full and ring")
    guesses, right, steps = check(model, HOWS, guesses=3, draft=model).tally
    # 23 tokens after the first are 5 steps of 4 and one of 3, and so on: all that is possible.
    assert steps == 6 + 2 + 4 + 0 and right == 23 + 6 + 14 - steps
    assert guesses == right


@pytest.mark.slow
def test_a_draft_of_other_weights_and_another_padded_vocabulary(one_device):
    config = cases.model_config(num_layers=1, pattern=(sliding(5),), vocab_size=300, init_scale=0.1)
    guesses, right, _ = check(
        model_of("full and ring"), HOWS, draft=cases.random_model(config)
    ).tally
    assert 0 < right < guesses


@pytest.mark.slow
def test_a_cache_for_texts_without_end(one_device):
    model = cases.random_model(cases.model_config(num_layers=1, pattern=(full(),)))
    form = CacheConfig(cache_window=6, cache_sinks=2)
    guesses, right, _ = check(model, HOWS, draft=model, form=form).tally
    assert guesses == right > 0
    guesses, right, _ = check(model, HOWS, form=form).tally
    assert 0 < right < guesses


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", [CacheConfig(cache_host=True), CacheConfig(k_cache="int8", v_cache="int4")]
)
def test_a_cache_in_few_bits_or_in_the_memory_of_the_host(one_device, form):
    guesses, right, _ = check(model_of("full and ring"), HOWS, form=form).tally
    assert 0 < right < guesses


@pytest.mark.slow
def test_a_row_ends_at_an_end_mark_among_guesses(one_device):
    speculator = check(model_of("full and ring"), HOWS, eos=(4, 9))
    assert speculator.tally[1] and speculator.made < sum(LIMITS)


@pytest.mark.slow
def test_ngrams_against_a_restatement(one_device):
    def slow(text, num, ngram):
        for size in range(min(ngram, len(text) - 1), 0, -1):
            for at in range(len(text) - size - 1, -1, -1):
                if text[at : at + size] == text[-size:]:
                    after = text[at + size :]
                    return [after[i % len(after)] for i in range(num)]
        return [-1] * num

    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 4, n).tolist() for n in (1, 2, 3, 5, 8, 13, 14, 14)]
    tokens_BS = np.full((8, 14), -1, np.int32)
    for row_S, text in zip(tokens_BS, texts, strict=True):
        row_S[: len(text)] = text
    end_B = np.array([len(text) for text in texts], np.int32)
    rules = cases.random_model(cases.model_config(num_layers=2)).rules
    tokens_BS = jax.device_put(tokens_BS, rules("batch", None))
    end_B = jax.device_put(end_B, rules("batch"))
    for ngram in (1, 2, 4):
        guess_Bk = guess.by_ngram(tokens_BS, end_B, 3, ngram, rules)
        assert np.asarray(guess_Bk).tolist() == [slow(text, 3, ngram) for text in texts]


def test_what_is_drawn_with_a_draft_has_the_distribution_of_the_model(one_device):
    """Chi-square of three tokens of four each, over 4096 seeds, against softmax itself."""
    small, temperature, rows = 4, 0.8, 4096
    config = cases.model_config(num_layers=1, pattern=(sliding(2),), context=16, init_scale=0.4)
    model = cases.random_model(config)
    other = cases.random_model(dataclasses.replace(config, init_scale=0.35, mlp_dim=16))
    prompt = [np.array([1, 3, 0], np.int32)] * rows
    expected = np.ones((small,) * 3)
    for depth in range(3):
        for before in itertools.product(range(small), repeat=depth):
            logits_V = cases.full_logits(model, [1, 3, 0, *before])[-1, :small]
            p_V = np.exp(logits_V.astype(np.float64) / temperature)
            expected[before] *= (p_V / p_V.sum()).reshape((small,) + (1,) * (2 - depth))
    tokenizer = SimpleNamespace(eos=(), vocab_size=small)
    engine = Engine(model, Plan.of(rows, 3, 3, 4), tokenizer)
    draft = PrefixCache(Engine(other, engine.plan, tokenizer), prompt, [3] * rows, 0)
    speculator = Speculator(engine, 2, 1, draft)
    packed = pack([Sampling(temperature=temperature, max_tokens=3)] * rows)
    state = engine.start(engine.prefill(prompt), prompt, range(rows), packed)
    parts = speculator.decode(state, np.zeros(rows, bool), prompt, speculator.read(slice(0, rows)))
    counts = np.zeros((small,) * 3)
    for tokens, _ in rows_of([part[:2] for part in parts], rows):
        counts[tuple(tokens)] += 1
    guesses, right, _ = speculator.tally
    assert 0.2 < right / guesses < 0.95
    assert stats.chisquare(counts.ravel(), rows * expected.ravel()).pvalue > 1e-3


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Two bundles with one tokenizer; a third has none."""
    folders = [tmp_path_factory.mktemp(name) for name in ("model", "draft", "other")]
    with jax.set_mesh(make_mesh((1, 1, 1))):
        for i, folder in enumerate(folders):
            config = cases.model_config(num_layers=2, context=(64, 32, 64)[i])
            cases.save(folder, config, with_tokenizer=i < 2)
    return folders


def run(bundles, **fields):
    config = DecodeConfig(prompt="the cat sat on the cat", temperature=0.0, **fields)
    return decode.main(cases.experiment(bundles[0], decode=config))


def test_the_command(bundles, monkeypatch, capsys):
    monkeypatch.setattr(decode, "make_mesh", lambda _: make_mesh((1, 1, 1)))
    plain = run(bundles, max_tokens=10)[0]
    capsys.readouterr()
    # One row and one guess: a slice of it is a single element, whose sharding JAX 0.12 forgets.
    for fields in (dict(ngram=2, speculate=3), dict(draft=str(bundles[1]), speculate=1)):
        row = run(bundles, max_tokens=10, stop=("never",), **fields)[0]
        assert (row["tokens"], row["text"]) == (plain["tokens"], plain["text"])
        out, err = capsys.readouterr()
        assert out == row["text"] + "\n"
        assert re.search(r"\d+ of \d+ guesses right \(\d+%\), \d\.\d\d tokens a step", err)


def test_refused(bundles, monkeypatch):
    monkeypatch.setattr(load, "restore", None)
    draft, other = map(str, bundles[1:])
    for fields, message in (
        (dict(draft=draft), "with speculate=0: a draft guesses the tokens"),
        (dict(draft_step=3), "draft_step=3 with draft=''"),
        (dict(speculate=2, draft="nowhere"), "nowhere is no bundle"),
        (dict(speculate=2, draft=other, max_tokens=9), "has another vocabulary (320 ids, no tok"),
        (dict(speculate=2, draft=draft, max_tokens=40), "reads model.context=32 tokens, but a"),
    ):
        with pytest.raises(UserError) as error:
            run(bundles, **{"max_tokens": 4, **fields})
        assert message in str(error.value)


def test_a_pattern_that_takes_no_guesses(bundles, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "restore", None)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        cases.save(tmp_path, cases.model_config(num_layers=1, pattern=(prefix(8),)))
    with pytest.raises(Unsupported, match="decode.speculate=2 with kind='prefix'"):
        run([tmp_path], speculate=2, max_tokens=4)
