"""Quest: which pages a query reads, and what it makes of them, against its words in NumPy.

One new token of each row after 35 and 4 old ones, as `test_model_cache` stores them.
"""

import dataclasses
import functools

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_model_cache as cases
from conftest import make_mesh
from test_model_cache import How
from tolerances import assert_close

from core.config import Unsupported, UserError
from model.attention.spec import Heads, full, sliding
from model.cache import cached, flash_decode, kv_cache, quest
from model.cache.form import CacheConfig

PAGE = 4
SPECS = {"full": dict(softcap=2.0), "alibi": dict(alibi=0.2)}
FEW, ALL = (CacheConfig(cache_pages=pages, cache_page=PAGE) for pages in (3, 1000))
HOWS = (
    How("full", (1, 1, 1), form=FEW),
    How("alibi", (2, 2, 2), form=FEW),
    How("full", (1, 3, 1), heads=(6, 3), form=FEW),
    How("full", (1, 2, 1), heads=(8, 1), form=FEW),
    How("alibi", (1, 8, 1), form=dataclasses.replace(FEW, cache_pages=1, cache_page=2)),
)


def spec_of(how: How):
    return full(**SPECS[how.kind])


@functools.cache
def run(how: How, new: int = 1) -> tuple[np.ndarray, kv_cache.KVCache]:
    """(out [2, new, N, H], the cache before these tokens)."""
    rules, spec, (N, K) = how.rules, spec_of(how), how.heads
    config = dataclasses.replace(cases.config(How("full", how.sizes)), pattern=(spec,))
    config = dataclasses.replace(config, num_heads=N, num_kv_heads=K)
    case = attention_cases.Case("", N=N, K=K, alibi=spec.alibi)

    @jax.jit
    def go(old, new):
        held = kv_cache.create(config, 2, cases.ROOM, rules, how.form)
        for (_, k, v), at in old:
            k, v = (jnp.stack((x * 0 - 1, x)) for x in (k, v))
            held = held.write([flash_decode.NewKV(k, v)], at, rules)
        each = jax.tree.map(
            lambda x: jax.sharding.reshard(x, rules("act_heads")), attention_cases.heads(case)
        )
        (q, k, v), at = new
        out = cached.attend_cached(
            q, k, v, at, held.stored(0, jnp.int32(1)), spec,
            kernel="reference", rules=rules, heads=Heads(*each),
        )  # fmt: skip
        return out, held

    with jax.set_mesh(make_mesh(how.sizes)):
        half = np.full(2, cases.OLD // 2)
        *old, (new, at, _) = (
            cases.placed(how, half * 0, cases.OLD // 2, cases.SEEN),
            cases.placed(how, half, cases.OLD // 2, cases.SEEN),
            cases.placed(how, cases.SEEN, new, cases.SEEN + new),
        )
        return jax.device_get(go([(arrays, at) for arrays, at, _ in old], (new, at)))


def pages_of(q_GH, k_SH, slope_G, row: int, how: How) -> list[int]:
    """Positions that a group of heads reads: of each shard the newest page and the best others."""
    form, P, t = how.form, how.sizes[1], cases.SEEN[row]
    read = []
    for shard in range(P):
        mine = np.arange(shard, t, P)
        pages = [mine[i : i + form.cache_page] for i in range(0, len(mine), form.cache_page)]

        def bound(page):
            low, high = k_SH[page].min(0), k_SH[page].max(0)
            far = slope_G * (t - page[-1])
            return (np.maximum(q_GH * low, q_GH * high).sum(-1) * cases.H**-0.5 - far).max()

        best = sorted(pages[:-1], key=bound, reverse=True)[: -(-form.cache_pages // P) - 1]
        read += [*best, *pages[-1:]]
    return sorted(int(p) for page in read for p in page)


def exact(how: How) -> tuple[np.ndarray, int]:
    """(out [2, 1, N, H] of softmax over the pages that are read, most tokens that a head reads)."""
    spec, (N, K) = spec_of(how), how.heads
    q, k, v = (x.astype(np.float64) for x in cases.inputs(how.heads))
    case = attention_cases.Case("", N=N, K=K, alibi=spec.alibi)
    _, slopes_N = attention_cases.heads(case)
    slopes_N = np.zeros(N) if slopes_N is None else np.asarray(slopes_N, np.float64)
    out, most = np.zeros((2, 1, N, cases.H)), 0
    for row, head in np.ndindex(2, K):
        t, group = cases.SEEN[row], slice(head * N // K, (head + 1) * N // K)
        read = pages_of(q[row, t, group], k[row, :, head], slopes_N[group], row, how)
        most = max(most, len(read))
        read.append(t)
        s_GS = q[row, t, group] @ k[row, read, head].T * cases.H**-0.5
        s_GS = spec.softcap * np.tanh(s_GS / spec.softcap) if spec.softcap else s_GS
        s_GS -= slopes_N[group, None] * (t - np.array(read))[None]
        p_GS = np.exp(s_GS)
        out[row, 0, group] = p_GS @ v[row, read, head] / p_GS.sum(-1, keepdims=True)
    return out, most


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_query_reads_the_pages_whose_keys_can_score_most(how):
    expected, most = exact(how)
    assert most < cases.SEEN.max()
    assert_close(run(how)[0], expected, "attention")


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_pages_bound_their_keys(how):
    (slot,) = run(how)[1].slots
    _, k, _ = cases.inputs(how.heads)
    P, page = how.sizes[1], how.form.cache_page
    low, high = (x[1] for x in (slot.pages.low_LBKZH, slot.pages.high_LBKZH))
    low, high = (x.reshape(*x.shape[:2], P, -1, cases.H) for x in (low, high))
    for row, shard in np.ndindex(2, P):
        mine = np.arange(shard, cases.SEEN[row], P)
        for z in range(low.shape[3]):
            keys = k[row, mine[z * page : (z + 1) * page]].swapaxes(0, 1)
            if keys.shape[1]:
                np.testing.assert_array_equal(low[row][:, shard, z][: len(keys)], keys.min(1))
                np.testing.assert_array_equal(high[row][:, shard, z][: len(keys)], keys.max(1))
            else:
                assert (low[row][:, shard, z] > 1e38).all()


@pytest.mark.parametrize("new", [1, 3, quest.QUERIES + 1])
def test_pages_that_cover_the_text_are_all_of_it(new):
    """Also when they are read as pages: 5 of 4 tokens on each of two shards."""
    plain = run(How("full", (1, 2, 1)), new)[0]
    exact = dataclasses.replace(FEW, cache_pages=2 * 5)
    for form in (ALL, exact):
        out, held = run(How("full", (1, 2, 1), form=form), new)
        assert (held.slots[0].pages is None) == (form is ALL)
        assert_close(out, plain, "attention")


def test_quantised_pages():
    how = dataclasses.replace(HOWS[0], form=dataclasses.replace(FEW, k_cache="int8"))
    error = np.abs(run(how)[0] - exact(how)[0]).max()
    assert 1e-5 < error < 0.02


def test_a_long_chunk_reads_everything():
    new = quest.QUERIES + 1
    plain = run(How("full", (1, 1, 1)), new)[0]
    assert_close(run(HOWS[0], new)[0], plain, "attention")


def test_mistakes():
    with pytest.raises(UserError, match="cache_pages=2 with cache_window=4"):
        CacheConfig(cache_pages=2, cache_window=4)
    config = dataclasses.replace(cases.config(HOWS[0]), pattern=(sliding(4),))
    with pytest.raises(Unsupported, match="cache_pages=3 with model.pattern of kind sliding"):
        FEW.apply(config)
    assert FEW.name == "quest 3x4"
