"""Every kernel, strategy and cache against one float64 oracle, over attention_cases.py."""

import functools

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, Case, documents
from conftest import small_tiles
from tolerances import assert_close

from model.attention import blocks
from model.attention.blocks import MaskedKernel
from model.attention.kernels import chunked, reference
from model.attention.kernels.table import KERNELS
from model.attention.mask import Full, Mask, Positions, Window
from model.attention.spec import Heads
from model.attention.strategies import local
from model.cache import flash_decode

BLOCK = 16
IDS = [str(case) for case in CASES]
# Interpreted kernels take long to compile: each kind once, the other cases are slow.
SPLASH_CASES = {
    Case("packed"),
    Case("shuffled", window=7),
    Case("one", window=1, N=1, K=1),
    Case("packed", window=17, softcap=2.0, K=1),
    Case("packed", window=100, softcap=2.0, causal=False),
    Case("cache", window=30),
    Case("future", window=7),
    Case("one", chunk=9),
    Case("shuffled", window=5, sinks=3, sink_logit=True),
    Case("packed", block=3, local=2, stride=3),
    Case("packed", prefix=11),
    Case("packed", window=4, dilation=3),
    Case("shuffled", window=7, until="groups"),
    Case("padded", alibi=1.0),
}
GPU_CASES = {  # the masks are those of splash, evaluated by the same lines
    Case("shuffled", window=7),
    Case("packed", window=17, softcap=2.0, K=1),
    Case("cache", window=30),
    Case("future", window=7),
    Case("packed", block=3, local=2, stride=3),
    Case("shuffled", window=7, until="groups"),
    Case("padded", alibi=1.0),
}
QUICK = {"splash": SPLASH_CASES, "gpu": GPU_CASES}


def every(kernels):
    """(kernel, case) of the whole table."""
    assert set(CASES) >= SPLASH_CASES >= GPU_CASES
    return [
        pytest.param(kernel, case, id=f"{kernel}-{case}", marks=[pytest.mark.slow] * is_slow)
        for kernel in kernels
        for case in CASES
        for is_slow in [case not in QUICK.get(kernel, CASES)]
    ]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16, so that 40 tokens are two whole tiles and a half."""
    monkeypatch.setattr(chunked, "MIN_BLOCK", BLOCK)
    monkeypatch.setattr(chunked, "MAX_BLOCK", BLOCK)
    monkeypatch.setattr(chunked, "TILE_SCORES", 2 * BLOCK * BLOCK)
    small_tiles(monkeypatch, BLOCK)
    monkeypatch.setattr(flash_decode, "BLOCK", 8)


def where(*at) -> Positions:
    return Positions(*(x if x is None else jnp.asarray(x) for x in at))


def query_and_key_places(tokens) -> tuple[Positions, Positions]:
    q_at = where(tokens.q_positions, tokens.q_segments, tokens.q_until)
    return q_at, where(tokens.k_positions, tokens.k_segments)


@functools.cache
def compiled(kernel: str, mask: Mask, softcap: float):
    """(out, lse) and (dq, dk, dv, dsink) of a kernel, through the pair that it exports."""
    pair = MaskedKernel(KERNELS[kernel], mask, attention_cases.H**-0.5, softcap)

    @jax.jit
    def run(q, k, v, dout, q_at, k_at, heads):
        out, lse = blocks.add_sink(pair.forward(q, k, v, heads, q_at, k_at), heads)
        done = dout, lse, blocks.delta(out, dout)
        gradients = pair.backward(q, k, v, heads, q_at, k_at, *done)
        return out, lse, (*gradients, blocks.sink_gradient(heads, *done[1:]).sink_N)

    return run


def run(kernel: str, case: Case, dtype=jnp.float32):
    tokens, arrays = attention_cases.inputs(case)
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    mask = attention_cases.mask(case)
    heads = Heads(*attention_cases.heads(case))
    places = query_and_key_places(tokens)
    results = compiled(kernel, mask, case.softcap)(*arrays, *places, heads)
    rounded = [np.asarray(x, np.float32) for x in arrays]
    return tokens, rounded, results


@pytest.mark.parametrize(("kernel", "case"), every(KERNELS))
def test_kernel_equals_the_oracle(kernel, case):
    tokens, (q, k, v, _), (out, lse, _) = run(kernel, case)
    expected_out, expected_lse = attention_cases.oracle(case, tokens, q, k, v)
    assert out.dtype == lse.dtype == jnp.float32
    assert_close(out, expected_out, "attention", what="out")
    assert_close(lse, expected_lse, "attention", what="lse")


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients_of_the_reference_equal_differences_of_the_oracle(case):
    tokens, (q, k, v, dout), (_, _, gradients) = run("reference", case)
    sinks, _ = attention_cases.heads(case)
    arguments = (q, k, v) if sinks is None else (q, k, v, sinks.astype(np.float64))
    for index, direction, slope in differences(case, tokens, arguments, dout):
        actual = np.vdot(np.asarray(gradients[index], np.float64), direction)
        # A token that sees itself alone (window 1) has dq = dk = 0, by cancellation.
        assert_close(actual, slope, "difference", what="qkvs"[index], at_least=np.abs(dout).sum())


def differences(case: Case, tokens, qkv, dout, step: float = 1e-5):
    """For q, k, v and sinks: a direction of +1 and -1, and the slope of <dout, out> along it."""
    for index, x in enumerate(qkv):
        direction = np.random.default_rng(index).choice([-1.0, 1.0], x.shape)
        values = []
        for moved in (x + step * direction, x - step * direction):
            arrays = (*qkv[:index], moved, *qkv[index + 1 :])
            values.append(np.vdot(dout, attention_cases.oracle(case, tokens, *arrays)[0]))
        yield index, direction, (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize(("kernel", "case"), every(name for name in KERNELS if name != "reference"))
def test_gradients_equal_those_of_the_reference(kernel, case):
    expected = run("reference", case)[2][2]
    actual = run(kernel, case)[2][2]
    for name, a, b in zip(("dq", "dk", "dv", "dsink"), actual, expected, strict=True):
        if b is not None:
            assert_close(a, b, "attention", what=name, at_least=np.abs(expected[2]).max())


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16(kernel):
    case = Case("packed", window=7)
    tokens, (q, k, v, dout), (out, lse, gradients) = run(kernel, case, jnp.bfloat16)
    assert {x.dtype for x in (out, lse, *gradients[:3])} == {jnp.dtype(jnp.float32)}
    expected_out, expected_lse = attention_cases.oracle(case, tokens, q, k, v)
    assert_close(out, expected_out, "attention", "bfloat16", "out")
    assert_close(lse, expected_lse, "attention", "bfloat16", "lse")
    mask = Window(case.window)
    exact = compiled("reference", mask, case.softcap)(
        *map(jnp.asarray, (q, k, v, dout)), *query_and_key_places(tokens), Heads()
    )
    for name, a, b in zip(("dq", "dk", "dv"), gradients[:3], exact[2][:3], strict=True):
        assert_close(a, b, "attention", "bfloat16", name)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("layout", "row", "blind"), [("padded", 1, 40), ("future", 0, 20)])
def test_rows_that_see_nothing_are_zero_and_pass_nothing_back(kernel, layout, row, blind):
    _, _, (out, lse, gradients) = run(kernel, Case(layout, window=7))
    np.testing.assert_array_equal(out[row, :blind], 0)
    assert np.isneginf(lse[row, :blind]).all()
    np.testing.assert_array_equal(gradients[0][row, :blind], 0)
    assert all(np.isfinite(x).all() for x in gradients[:3])


@pytest.mark.parametrize("kernel", ["chunked", "splash", "gpu"])
def test_tiles_out_of_reach_are_never_touched(kernel):
    """NaN in a tile that is visited spreads, masked or not: 0 * NaN is NaN.

    Documents of 4 and 6 blocks; a window of 2 blocks reaches back 2 blocks.
    """
    document, end = 4 * BLOCK, 10 * BLOCK
    shape = (1, end, 1, attention_cases.H)
    q, k, v, dout = np.random.default_rng(0).standard_normal((4, *shape)).astype(np.float32)
    at = where(*documents((document, end - document), length=end))
    run_it = compiled(kernel, Window(2 * BLOCK), 0.0)

    def spoilt(x, start, stop):
        x = x.copy()
        x[:, start:stop] = np.nan
        return x

    def is_finite(x, start, stop=end):
        return np.isfinite(x[:, start:stop]).all()

    out, lse, _ = run_it(q, k, spoilt(v, 0, document), dout, at, at, Heads())
    assert is_finite(out, document), "tiles of another document are visited"
    assert not is_finite(out, 0, document)
    out, lse, _ = run_it(q, k, spoilt(v, 0, 5 * BLOCK), dout, at, at, Heads())
    assert is_finite(out, 7 * BLOCK), "tiles behind the window are visited"
    assert is_finite(lse, 0)
    # A query passes gradients to its own block and two before; a key hears from two after.
    _, _, (dq, dk, dv, _) = run_it(q, k, v, spoilt(dout, 8 * BLOCK, end), at, at, Heads())
    assert is_finite(dq, 0, 8 * BLOCK)
    assert not is_finite(dq, 8 * BLOCK)
    assert is_finite(dk, 0, 6 * BLOCK)
    assert is_finite(dv, 0, 6 * BLOCK)
    _, _, (dq, dk, dv, _) = run_it(q, k, v, spoilt(dout, 4 * BLOCK, 5 * BLOCK), at, at, Heads())
    assert all(is_finite(x, 0, document) for x in (dq, dk, dv)), "another document is visited"
    assert is_finite(dk, 5 * BLOCK), "tiles of earlier queries are visited"


def test_the_log_sum_exp_has_a_gradient():
    """That of the softmax, and of the sink; autodiff of the dense formula is the other side."""
    draw, T, N, H = np.random.default_rng(0), 20, 4, 8
    q, k, v, weight = (jnp.asarray(draw.standard_normal((1, T, N, H)), "float32") for _ in "qkvw")
    sink_N = jnp.linspace(-1.0, 1.0, N)
    at = Positions(*(jnp.asarray(x) for x in documents((T,), length=T)))

    def ours(q, k, v, sink_N):
        pair = MaskedKernel(chunked, Full(), H**-0.5, 0.0)
        out, lse = local.with_lse(pair, q, k, v, Heads(sink_N), at, at)
        return (out * weight).sum() + jnp.sin(lse).sum()

    def dense(q, k, v, sink_N):
        s_NTS = jnp.einsum("BTNH,BSNH->NTS", q, k) * H**-0.5
        s_NTS = jnp.where(jnp.tri(T, dtype=bool), s_NTS, -jnp.inf)
        sink_NT1 = jnp.broadcast_to(sink_N[:, None, None], (N, T, 1))
        lse_NT1 = jax.nn.logsumexp(jnp.concatenate([s_NTS, sink_NT1], 2), axis=2, keepdims=True)
        out = jnp.einsum("NTS,BSNH->BTNH", jnp.exp(s_NTS - lse_NT1), v)
        return (out * weight).sum() + jnp.sin(lse_NT1).sum()

    actual, expected = (jax.grad(f, (0, 1, 2, 3))(q, k, v, sink_N) for f in (ours, dense))
    for name, a, b in zip(("dq", "dk", "dv", "dsink"), actual, expected, strict=True):
        assert_close(a, b, "attention", what=name)


def test_chunked_memory_grows_with_the_length_not_its_square():
    def loss(q, k, v, at):
        return local.attention(
            MaskedKernel(chunked, Full(), 1.0, 0.0), q, k, v, Heads(), at, at
        ).sum()

    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        at = Positions(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2)
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, at)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2048) < 2.2 * temporary_bytes(1024)


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (9, 2.0)])
def test_cache_and_new_tokens_merge_to_attention_over_both(window, softcap):
    """Row 0 has filled a ring of 20 slots and gone round, row 1 holds 5 tokens in it."""
    L, layer, N, K, H, S, new = 3, 1, 4, 2, 8, 20, 6
    seen = np.array([27, 5])
    random = np.random.default_rng(0)
    kv = random.standard_normal((2, 2, 40, K, H)).astype(np.float32)  # (k or v, row, position)
    q = random.standard_normal((2, new, N, H)).astype(np.float32)
    cached = np.full((2, L, 2, K, S, H), np.nan, np.float32)
    cached[:, layer] = 0
    at_BS = np.full((2, S), -1, np.int32)
    for row in range(2):
        for position in range(max(0, seen[row] - S), seen[row]):
            cached[:, layer, row, :, position % S] = kv[:, row, position]
            at_BS[row, position % S] = position
    positions = (seen[:, None] + np.arange(new)).astype(np.int32)
    segments = np.ones_like(positions)
    segments[1, 4:] = 0
    rows = np.arange(2)[:, None]
    stored = flash_decode.LayerCache(*map(jnp.asarray, (*cached, at_BS, layer, seen)))
    pair = MaskedKernel(reference, Window(window) if window else Full(), H**-0.5, softcap)
    at = where(positions, segments)

    @jax.jit
    def run(q, k, v, stored, at):
        old = flash_decode.forward(q, stored, Heads(), at, pair)
        return blocks.merge(old, pair.forward(q, k, v, Heads(), at, at))

    out, lse = run(q, *kv[:, rows, positions], stored, at)
    # The oracle sees everything in the order of positions; it lacks what the ring has dropped.
    everything = np.broadcast_to(np.arange(40, dtype=np.int32), (2, 40))
    end = seen[:, None] + segments.sum(1, keepdims=True)
    kept = (everything >= seen[:, None] - S) & (everything < end)
    tokens = attention_cases.Tokens(positions, segments, everything, kept.astype(np.int32))
    case = Case("cache", window=window, softcap=softcap, N=N, K=K)
    expected_out, expected_lse = attention_cases.oracle(case, tokens, q, *kv)
    assert_close(out, expected_out, "attention", what="out")
    assert_close(lse, expected_lse, "attention", what="lse")
