"""StreamingLLM against its words: keep sinks and window, count positions inside what is kept."""

import dataclasses
import functools

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_model_cache as cases
from conftest import make_mesh, quick
from test_model_cache import How
from tolerances import assert_close

from core.config import Unsupported, UserError
from model.attention import attend
from model.attention.mask import Positions
from model.attention.spec import Heads, chunked, full, moba, prefix, sliding, stream
from model.cache import cached_stream, flash_decode, kv_cache
from model.cache.form import CacheConfig
from model.config import ModelConfig
from model.ops import rope
from model.ops.rope import Rope

WINDOW, SINKS = 5, 3
TURN = Rope(100.0, scaling="yarn", factor=4.0, original=16)
SPECS = {
    "rope": dict(rope=TURN, softcap=2.0),
    "alibi": dict(rope=None, alibi=1.0, sink_logit=True),
    "fast": dict(rope=Rope(2.0)),
}
HOWS = (
    How("rope", (1, 1, 1)),
    How("alibi", (2, 2, 2)),
    How("rope", (1, 3, 1), "allgather"),
    How("fast", (1, 8, 1), "ring"),
    How("fast", (1, 8, 1)),
    How("rope", (2, 2, 2), "ulysses"),
    How("alibi", (1, 2, 1), "ring"),
)

small_blocks = cases.small_blocks


def spec_of(how: How):
    return stream(WINDOW, SINKS, **SPECS[how.kind])


@functools.cache
def run(how: How) -> tuple[np.ndarray, kv_cache.KVCache]:
    """(out [2, NEW, N, H] in the order of the rows, the cache): as in test_model_cache."""
    rules, spec, (N, K) = how.rules, spec_of(how), how.heads
    sizes = dict(vocab_size=8, context=8, num_layers=2, embed_dim=8, mlp_dim=8, head_dim=cases.H)
    heads = dict(num_heads=N, num_kv_heads=K, pattern=(spec,), dtype="float32")
    config = ModelConfig(**sizes, **heads)
    fields = SPECS[how.kind]
    case = attention_cases.Case("", N=N, K=K, sink_logit="alibi" in fields, alibi=spec.alibi)

    @jax.jit
    def go(old, new):
        held = kv_cache.create(config, 2, cases.ROOM, rules, how.form)
        for (q, k, v), at in (*old, new):
            if spec.rope is not None:
                table = rope.table(at.positions_BT, spec.rope, cases.H)
                q, k = rope.rotate(q, table), rope.rotate(k, table)
            before, stacked = held, [jnp.stack((x * 0 - 1, x)) for x in (k, v)]
            held = held.write([flash_decode.NewKV(*stacked)], at, rules)
        each = attention_cases.heads(case)
        each = jax.tree.map(lambda x: jax.sharding.reshard(x, rules("act_heads")), each)
        out = cached_stream.stream_cached(
            q, k, v, at, before.stored(0, jnp.int32(1)), spec,
            kernel="reference", rules=rules, heads=Heads(*each),
        )  # fmt: skip
        return out, held

    with jax.set_mesh(make_mesh(how.sizes)):
        half = np.full(2, cases.OLD // 2)
        *old, (new, at, offset_BT) = (
            cases.placed(how, half * 0, cases.OLD // 2, cases.SEEN),
            cases.placed(how, half, cases.OLD // 2, cases.SEEN),
            cases.placed(how, cases.SEEN, cases.NEW, cases.END),
        )
        out, held = go([(arrays, at) for arrays, at, _ in old], (new, at))
        order = np.argsort(offset_BT, axis=1)[:, :, None, None]
        return np.take_along_axis(np.asarray(out), order, axis=1), held


def turned(x_H: np.ndarray, position: int, turn: Rope | None) -> np.ndarray:
    if turn is None:
        return x_H
    angles = position * np.asarray(rope.frequencies(turn, len(x_H)), np.float64)
    first, second = np.split(x_H, 2)
    cos, sin = turn.magnitude * np.cos(angles), turn.magnitude * np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin])


@functools.cache
def exact(kind: str, heads: tuple[int, int]) -> np.ndarray:
    """Token by token: what is kept is numbered 0, 1, ..., and the query is the last of it."""
    spec, (N, K) = stream(WINDOW, SINKS, **SPECS[kind]), heads
    q, k, v = (x.astype(np.float64) for x in cases.inputs(heads))
    case = attention_cases.Case("", N=N, K=K, sink_logit=spec.sink_logit, alibi=spec.alibi)
    sinks_N, slopes_N = (None if x is None else np.asarray(x) for x in attention_cases.heads(case))
    out = np.zeros((2, cases.NEW, N, cases.H))
    for row, i, n in np.ndindex(2, cases.NEW, N):
        t = cases.SEEN[row] + i
        if t >= cases.END[row]:
            continue
        kept = [p for p in range(t + 1) if p < SINKS or t - p < WINDOW]
        last = len(kept) - 1
        query = turned(q[row, t, n], last, spec.rope)
        scores = []
        for place, p in enumerate(kept):
            key = turned(k[row, p, n * K // N], place, spec.rope)
            s = query @ key * cases.H**-0.5
            s = spec.softcap * np.tanh(s / spec.softcap) if spec.softcap else s
            scores.append(s - (slopes_N[n] * (last - place) if spec.alibi else 0))
        weights = np.exp(scores)
        total = weights.sum() + (np.exp(sinks_N[n]) if spec.sink_logit else 0)
        out[row, i, n] = weights @ v[row, kept, n * K // N] / total
    return out


def assert_exact(how: How) -> None:
    real = (cases.SEEN[:, None] + np.arange(cases.NEW) < cases.END[:, None])[:, :, None, None]
    assert_close(run(how)[0] * real, exact(how.kind, how.heads), "attention")


@pytest.mark.parametrize("how", quick(HOWS, 2))
def test_positions_count_inside_what_is_kept(how):
    """Row 1 begins with 4 tokens: its chunk passes the window, and the first ones are not full."""
    assert_exact(dataclasses.replace(how, heads=(6, 3)) if how.sizes[1] == 3 else how)


def test_a_cache_in_8_bits_is_read_alike():
    how = How("rope", (1, 2, 1), form=CacheConfig(k_cache="int8", v_cache="int8"))
    error = np.abs(run(how)[0] - run(How("rope", (1, 1, 1)))[0])[0]
    assert 1e-4 < error.max() < 0.02


def test_the_cache_does_not_grow_with_the_text():
    for how in HOWS[:4]:
        slot = run(how)[1].slots[0]
        assert slot.positions_BS.shape[1] <= WINDOW + SINKS + 2 * how.sizes[1]


def model(**fields) -> ModelConfig:
    sizes = dict(vocab_size=8, context=64, num_layers=2, embed_dim=8, mlp_dim=8, head_dim=8)
    return ModelConfig(**{**sizes, "num_heads": 2, "num_kv_heads": 1, **fields})


def test_layers_that_see_further_are_those_that_change():
    form = CacheConfig(cache_window=6, cache_sinks=2)
    kinds = full(softcap=3.0), sliding(9), sliding(7), sliding(7, sinks=1), chunked(20)
    assert form.apply(model(pattern=kinds, num_layers=5)).pattern == (
        stream(6, 2, softcap=3.0), stream(6, 2), *kinds[2:]
    )  # fmt: skip
    assert CacheConfig(cache_window=6).apply(model()).pattern == (sliding(6),)
    assert CacheConfig().apply(model()) == model()
    assert form.name == "stream 6+2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(learned_positions=True),
            "cache_window=6 with model.learned_positions: .*model.context=64",
        ),
        (dict(pattern=(moba(4, 2),)), "cache_window=6 with kind='moba' in model.pattern"),
        (dict(pattern=(prefix(4),)), "cache_window=6 with kind='prefix'"),
        (
            dict(pattern=(full(rope=Rope(scaling="dynamic", factor=2.0, original=8)),)),
            "cache_window=6 with scaling='dynamic'",
        ),
    ],
)
def test_what_cannot_go_on_without_end(fields, message):
    with pytest.raises(Unsupported, match=message):
        CacheConfig(cache_window=6).apply(model(**fields))


def test_mistakes():
    with pytest.raises(UserError, match="cache_sinks=4 with cache_window=0: .*set cache_window"):
        CacheConfig(cache_sinks=4)
    with pytest.raises(UserError, match="kind='stream' with sinks=0: that is kind='sliding'"):
        stream(4, 0)
    with pytest.raises(Unsupported, match="kind='stream' is how a cache is read"):
        attend.attend(None, None, None, Positions(None, None), stream(4, 1), kernel="", rules=None)
