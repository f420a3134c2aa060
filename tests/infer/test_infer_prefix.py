"""Prompts that begin alike give the same with what they share read once, and less is read."""

import re

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from infer import decode
from infer.config import DecodeConfig
from infer.engine import Engine, Plan
from infer.prefix import PrefixCache
from infer.sampling.params import Sampling, pack
from model.attention.spec import full, moba, nsa, prefix, sliding
from model.cache.form import CacheConfig
from model.ops.rope import Rope

NEW, PLAIN = 6, CacheConfig()
rng = np.random.default_rng(0)
SYSTEM = rng.integers(0, 320, 21).astype(np.int32)
ENDS = [rng.integers(0, 320, n).astype(np.int32) for n in (3, 0, 9, 1)]
PROMPTS = [np.concatenate([SYSTEM, end]) for end in ENDS]
OTHER = rng.integers(0, 320, 30).astype(np.int32)


def read_and_go_on(engine, prompts, least, scored):
    """(greedy tokens and log-probabilities of each prompt, the reader)."""
    reader = PrefixCache(engine, prompts, [NEW] * len(prompts), least, scored)
    packed = pack([Sampling(temperature=0, max_tokens=NEW)] * len(prompts))
    tokens, scores = [], []
    for first in range(0, len(prompts), engine.plan.batch):
        rows = slice(first, min(first + engine.plan.batch, len(prompts)))
        now, some = reader.read(rows.start, rows.stop)
        state = engine.start(now, prompts[rows], [0] * len(prompts[rows]), packed.rows(rows))
        made = list(engine.decode(state, np.zeros(engine.plan.batch, bool)))
        tokens_BC = np.concatenate([part.tokens_BC for part in made], axis=1)
        tokens += tokens_BC[: len(prompts[rows]), :NEW].tolist()
        scores += some
    return tokens, scores, reader


def check(model, prompts, read, batch=4, least=4, chunk=5, scored=True, form=PLAIN):
    """Equal to reading each prompt for itself, and `read` tokens were read. The reader."""
    engine = Engine(model, Plan.of(batch, max(map(len, prompts)), NEW, chunk), form=form)
    plain, expected, before = read_and_go_on(engine, prompts, 0, scored)
    assert before.tokens_read == sum(map(len, prompts))
    tokens, scores, reader = read_and_go_on(engine, prompts, least, scored)
    assert tokens == plain
    assert len(scores) == len(expected) == len(prompts) * scored
    for prompt, score_T, expected_T in zip(prompts, scores, expected, strict=False):
        assert score_T.shape == expected_T.shape == (len(prompt) - 1,)
        np.testing.assert_allclose(score_T, expected_T, atol=2e-5)
    assert reader.tokens_read == read
    return reader


PATTERNS = {
    "full": (full(),),
    "ring": (sliding(6), full()),
    "sinks": (sliding(5, sinks=2),),
    "moba": (moba(block=4, top=2),),
    "nsa": (nsa(block=4, top=3, window=6, compress=4, step=2),),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "ring" else pytest.param(name, marks=pytest.mark.slow) for name in PATTERNS],
)
def test_what_prompts_share_is_read_once(one_device, name):
    pattern = PATTERNS[name]
    model = cases.random_model(cases.model_config(num_layers=len(pattern), pattern=pattern))
    check(model, PROMPTS, 21 + 3 + 9 + 1)


@pytest.mark.parametrize(
    ("sizes", "read"),
    [
        pytest.param((1, 4, 1), 34, marks=pytest.mark.slow),
        ((2, 2, 2), 34),
        pytest.param((4, 1, 1), 97, marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh(sizes, read):
    """Over 4 shards of the batch every prompt has one of its own: there is nothing to gain."""
    with jax.set_mesh(make_mesh(sizes)):
        model = cases.random_model(cases.model_config(num_layers=2))
        check(model, PROMPTS, read, chunk=8)


@pytest.mark.slow
def test_samples_of_prompts_in_several_batches(one_device):
    """The first batch has one of them, the second both."""
    model = cases.random_model(cases.model_config(num_layers=2))
    prompts = [PROMPTS[2]] * 5 + [PROMPTS[0]] * 3
    reader = check(model, prompts, 30 + 9 + 3, scored=False)
    assert not reader._stems  # nothing is held that no row will ask for


def test_a_single_row_a_batch(one_device):
    model = cases.random_model(cases.model_config(num_layers=2))
    check(model, [*[PROMPTS[0]] * 2, *PROMPTS[:3], OTHER], 24 + 0 + 9 + 30, batch=1, least=3)


def test_little_in_common_is_not_worth_it(one_device):
    model = cases.random_model(cases.model_config(num_layers=2))
    prompts = [*PROMPTS[:2], OTHER]
    check(model, prompts, 24 + 21 + 30, scored=False)
    check(model, PROMPTS, 97, least=22, scored=False)


@pytest.mark.slow
def test_rope_that_goes_by_the_length_of_the_text(one_device):
    """Beginnings of texts of other lengths have other keys; samples of one prompt have the same."""
    rope = Rope(scaling="dynamic", factor=4.0, original=16)
    model = cases.random_model(cases.model_config(num_layers=2, pattern=(full(rope=rope),)))
    check(model, PROMPTS, 97, scored=False)
    check(model, [PROMPTS[0]] * 4, 24, scored=False)


@pytest.mark.slow
def test_a_bidirectional_prefix_is_not_cut(one_device):
    """Its tokens see each other: the shared ones see what is not shared."""
    model = cases.random_model(cases.model_config(num_layers=1, pattern=(prefix(23),)))
    check(model, PROMPTS, 97, chunk=32, scored=False)
    check(model, [PROMPTS[0]] * 4, 24, chunk=32, scored=False)


FORMS = {
    "k8v4": CacheConfig(k_cache="int8", v_cache="int4"),
    "stream": CacheConfig(cache_window=6, cache_sinks=2),
    "host": CacheConfig(cache_host=True),
    "quest": CacheConfig(cache_pages=3, cache_page=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_cache(one_device, name):
    model = cases.random_model(cases.model_config(num_layers=1, pattern=(full(),)))
    # Quest reads everything for more than 8 queries at a time, whatever chunk they are in.
    check(model, PROMPTS, 34, chunk=16, form=FORMS[name])


@pytest.mark.slow
def test_the_summary_tells(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "make_mesh", lambda _: make_mesh((1, 1, 1)))
    with jax.set_mesh(make_mesh((1, 1, 1))):
        cases.save(tmp_path, cases.model_config(num_layers=2))

    def texts(**fields):
        config = DecodeConfig(prompt="the cat sat", max_tokens=8, n=3, seed=1, **fields)
        rows = decode.main(cases.experiment(tmp_path, decode=config))
        length = len(rows[0]["prompt_tokens"])
        found = re.search(r"prefill (\d+) tokens( and \d+ shared)? in", capsys.readouterr().err)
        return [row["text"] for row in rows], length, int(found[1]), found[2]

    shared, length, read, told = texts()
    assert (read, told) == (length, f" and {2 * length} shared")
    plain, _, read, told = texts(share_prefix=0)
    assert plain == shared and (read, told) == (3 * length, None)
