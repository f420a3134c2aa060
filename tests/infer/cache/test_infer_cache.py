"""Every kind of cache at work: log-probabilities in chunks and steps against one forward pass."""

import functools

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh
from tolerances import assert_close

from core.config import Unsupported
from infer.config import DecodeConfig
from infer.engine import Engine, Plan
from infer.sampling.params import Sampling, pack
from model.attention.spec import full, moba, nsa, sliding
from model.cache.form import CacheConfig

ROWS = [np.random.default_rng(n).integers(0, 320, n).astype(np.int32) for n in (1, 17, 48, 33)]
HOST = CacheConfig(cache_host=True)
INT8, INT4 = (CacheConfig(k_cache=kind, v_cache=kind) for kind in ("int8", "int4"))
NEAR_AND_FAR = cases.model_config()
FAR_FIRST = cases.model_config(pattern=(full(), sliding(6)))  # a group of layers begins with it
CHOOSING = cases.model_config(
    num_layers=2, pattern=(moba(4, 3), nsa(4, 4, 5, compress=4, step=2)), init_scale=0.2
)


@functools.cache
def expected(config):
    """Log-probabilities of all but the first token of each row."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        model = cases.random_model(config)
        logprobs = [jax.nn.log_softmax(cases.full_logits(model, row)) for row in ROWS]
        return [
            np.asarray(x)[np.arange(len(x) - 1), row[1:]]
            for x, row in zip(logprobs, ROWS, strict=True)
        ]


def scores(config, form, sizes=(1, 1, 1), chunk=5):
    """Log-probabilities of all rows, one after the other, read in chunks."""
    with jax.set_mesh(make_mesh(sizes)):
        engine = Engine(cases.random_model(config), Plan.of(4, 48, 0, chunk), form=form)
        return np.concatenate(engine.score(ROWS)[1])


def error(*how, **more):
    """Root mean square of what scores in chunks are off by, in nats."""
    config, *_ = how
    off = scores(*how, **more) - np.concatenate(expected(config))
    return float(np.sqrt((off**2).mean()))


# Of the nats that a token's log-probability is off by, root mean square; these weights are random
# and large, so that what they say hangs on single keys.
STATED = {"int8": 0.02, "int4": 0.3}


@pytest.mark.parametrize(
    ("config", "form", "sizes"),
    [
        (NEAR_AND_FAR, INT8, (1, 1, 1)),
        pytest.param(NEAR_AND_FAR, INT4, (1, 3, 1), marks=pytest.mark.slow),
        pytest.param(NEAR_AND_FAR, INT8, (2, 2, 2), marks=pytest.mark.slow),
        pytest.param(CHOOSING, INT8, (1, 1, 1), marks=pytest.mark.slow),
        pytest.param(CHOOSING, INT4, (1, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_quantised_scores_are_off_by_little(config, form, sizes):
    worst = STATED[form.name]
    assert worst / 20 < error(config, form, sizes, chunk=6) < worst


@pytest.mark.parametrize(
    "config", [NEAR_AND_FAR, pytest.param(CHOOSING, marks=pytest.mark.slow)], ids=["near", "choose"]
)
def test_quantised_scores_do_not_hang_on_the_chunks(config):
    """New tokens meet as they will be read, also where one chunk is the whole text."""
    in_chunks, at_once = (scores(config, INT4, chunk=chunk) for chunk in (5, 48))
    assert_close(in_chunks, at_once, "model")


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (FAR_FIRST, (1, 1, 1)),
        pytest.param(NEAR_AND_FAR, (1, 3, 1), marks=pytest.mark.slow),
        pytest.param(NEAR_AND_FAR, (2, 2, 2), marks=pytest.mark.slow),
        pytest.param(CHOOSING, (1, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_scores_from_the_hosts_memory_are_those_of_the_full_forward(config, sizes):
    assert error(config, HOST, sizes, chunk=6) < 2e-5


def test_whole_texts_stay_in_the_hosts_memory(one_device):
    """Rings do not; steps of decoding give back what they were given, where it was."""
    model = cases.random_model(NEAR_AND_FAR)
    engine = Engine(model, Plan.of(1, 17, 8, 6), form=HOST)
    now = engine.prefill(ROWS[1:2])
    state = engine.start(now, ROWS[1:2], [0], pack([Sampling(temperature=0, max_tokens=8)]))
    state, (_, made) = engine.advance(state, np.zeros(1, bool))
    assert made.tokens_BC[0].tolist() == cases.greedy(model, ROWS[1], 8, 320)
    held = state.prefilled.cache.slots
    assert [slot.host for slot in held] == [False, True]
    for slot in held:
        kinds = {x.sharding.memory_kind for x in (slot.k_LBKSH, slot.v_LBKSH)}
        assert kinds == {"pinned_host" if slot.host else "device"}
        assert slot.positions_BS.sharding.memory_kind == "device"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(cache_pages=2), "cache_host=True with cache_pages=2: .*; take cache_host=False or"),
        (dict(k_cache="int8"), "cache_host=True with k_cache='int8': no compiler"),
    ],
)
def test_what_the_hosts_memory_is_not_for(fields, message):
    with pytest.raises(Unsupported, match=message):
        CacheConfig(cache_host=True, **fields)


def test_pages_take_no_guesses():
    with pytest.raises(
        Unsupported, match="cache_pages=4 with speculate=2: .*; take cache_pages=0 or"
    ):
        DecodeConfig(cache_pages=4, speculate=2)


def test_rings_are_not_worth_the_hosts_memory():
    with pytest.raises(Unsupported, match="cache_host=True with layers of kind sliding"):
        HOST.apply(cases.model_config(pattern=(sliding(6),)))
    with pytest.raises(Unsupported, match="cache_host=True with layers of kind stream"):
        CacheConfig(cache_host=True, cache_window=8, cache_sinks=2).apply(
            cases.model_config(pattern=(full(),))
        )
