"""MoBA and NSA against the papers' equations, for every kernel and strategy, forward and backward.

Programs take where the tokens stand as arguments: one compilation serves all orders.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import selection_oracle
from attention_cases import documents
from attention_runs import like
from conftest import make_mesh, quick
from tolerances import assert_close

from core import layout, sharding
from model.attention import attend, nsa, spec
from model.attention.block_topk import pairs, picked_call, picked_steps, picked_tpu, select
from model.attention.block_topk.picked import GatheredBlocks
from model.attention.blocks import MaskedKernel
from model.attention.kernels import chunked
from model.attention.kernels import table as kernels
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec, Heads
from model.attention.strategies import local
from model.attention.strategies import table as strategies

LENGTH, N, K, H = 48, 4, 2, 8
ROWS = (LENGTH,), (7, 1, 20, 12), (), (16, 16, 16)
# No block divides the documents; with 3 blocks of 4 out of up to 12, and 4, much stays unseen.
MOBA = spec.moba(block=4, top=3)
NSA = spec.nsa(block=4, top=4, window=5, compress=4, step=2, softcap=3.0)
WIDE = spec.nsa(block=6, top=4, window=3, compress=9, step=3)
RESULTS = "out", "dq", "dk", "dv", "dgates", "dcompressors"

# Chosen blocks by the kernels for TPUs, all else chunked.
ON_TPU = types.ModuleType("on_tpu")
ON_TPU.forward, ON_TPU.backward = chunked.forward, chunked.backward


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several tiles a block, and several parts of the scores."""
    monkeypatch.setattr(chunked, "MIN_BLOCK", 4)
    monkeypatch.setattr(chunked, "MAX_BLOCK", 4)
    monkeypatch.setattr(pairs, "TILE_ROWS", 8)
    monkeypatch.setattr(select, "CPU_SCORES", 3000)
    monkeypatch.setattr(layout, "TILE", 2)
    monkeypatch.setattr(picked_tpu, "PART_FLOATS", 600)
    monkeypatch.setattr(picked_steps, "RUNS", 8)
    for name, size in dict(LANES=8, ALIGN=4, KEYS=3).items():
        monkeypatch.setattr(picked_call, name, size)
    monkeypatch.setitem(kernels.KERNELS, "on_tpu", ON_TPU)
    monkeypatch.setitem(strategies.PICKED, ON_TPU, picked_tpu.GatheredBlocksTpu)


@dataclasses.dataclass(frozen=True)
class How:
    """One way to compute a spec on a mesh (data, seq, model)."""

    spec: AttentionSpec
    kernel: str = "chunked"
    strategy: str = "local"
    sizes: tuple[int, int, int] = (1, 1, 1)
    ulysses: int = 1

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.sizes))
        return (
            f"{self.spec.kind}{self.spec.block}-{self.kernel}-{self.strategy}{self.ulysses}-{sizes}"
        )


def over(spec: AttentionSpec, strategy: str, *sizes: int, ulysses: int = 1) -> How:
    return How(spec, "chunked", strategy, sizes, ulysses)


ALONE = [How(s, kernel) for s in (MOBA, NSA, WIDE) for kernel in ("chunked", "reference")]
ALONE += [How(MOBA, "on_tpu"), How(NSA, "on_tpu")]
SHARDED = [
    over(MOBA, "ring", 1, 4, 1),
    over(MOBA, "allgather", 1, 3, 1),
    over(MOBA, "ulysses", 1, 4, 1),
    over(NSA, "ring", 2, 2, 2),
    How(MOBA, "on_tpu", "ring", (1, 2, 2)),
]
MORE = [
    over(NSA, "allgather", 1, 8, 1),
    over(NSA, "ulysses", 1, 2, 1),
    over(NSA, "ring", 1, 4, 1, ulysses=2),
    over(WIDE, "ring", 1, 3, 1),
    over(MOBA, "ring", 1, 8, 1, ulysses=2),
    How(NSA, "on_tpu", "allgather", (1, 3, 1)),
    How(NSA, "on_tpu", "ulysses", (1, 2, 1)),
]
LONG = [pytest.param(how, marks=pytest.mark.slow) for how in MORE]


@functools.cache
def inputs() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """(q, k, v, dout, gates), and what compresses K and V; float32 values."""
    draw = np.random.default_rng(0)
    arrays = [draw.standard_normal((len(ROWS), LENGTH, n, H)) for n in (N, K, K, N)]
    arrays.append(draw.random((len(ROWS), LENGTH, N, 3)))
    places = [draw.standard_normal((9, H)) for _ in "kv"]
    squares = [[draw.standard_normal((H, H)) / 2 for _ in range(2)] for _ in "kv"]
    weights = [[place, *square] for place, square in zip(places, squares, strict=True)]
    return jax.tree.map(lambda x: x.astype(np.float32), (arrays, weights))


def compressors(how: AttentionSpec) -> list[list[np.ndarray]]:
    return [[place[: how.compress], *rest] for place, *rest in inputs()[1]]


@functools.cache
def program(how: How, order: str):
    """run(q, k, v, dout, gates, weights, at) -> RESULTS, compiled, for numpy arguments."""
    rules = sharding.training(how.strategy, how.ulysses, order)
    given = dict(kernel=how.kernel, rules=rules)

    @jax.jit
    def run(q, k, v, dout, gates, weights, at):
        def out(q, k, v, gates, weights):
            if how.spec.kind != "nsa":
                return attend.attend(q, k, v, at, how.spec, **given)
            compress = tuple(nsa.Compressor(*w) for w in weights)
            return nsa.attention(q, k, v, gates, compress, at, how.spec, **given)

        result, pull = jax.vjp(out, q, k, v, gates, weights)
        return result, *pull(dout)

    def call(arrays, weights, at):
        with jax.set_mesh(make_mesh(how.sizes)):
            place = rules("batch", "length", "act_heads", None)
            arrays = [jax.device_put(x, place) for x in arrays]
            weights = jax.tree.map(lambda x: jax.device_put(x, rules(None, None)), weights)
            at = Positions(*(jax.device_put(x, rules("batch", "length")) for x in at))
            return jax.tree.map(np.asarray, run(*arrays, weights, at))

    return call


def attended(how: How, order: str = "contiguous", arrays=None) -> tuple:
    """RESULTS in the order of the documents, of tokens that stood in `order`."""
    parts = 1 if how.strategy == "ulysses" else how.sizes[1] // how.ulysses
    places = layout.order(order, LENGTH, parts)
    rows = [*(arrays or inputs()[0]), *documents(*ROWS, length=LENGTH)]
    *arrays, positions, segments = (x[:, places] for x in rows)
    run = program(how, like(order, LENGTH, parts, how.spec.window))
    *results, weights = run(arrays, compressors(how.spec), (positions, segments))
    return *(x[:, np.argsort(places)] for x in results), weights


def oracle(how: AttentionSpec, arrays, weights) -> np.ndarray:
    q, k, v, _, gates = (x.astype(np.float64) for x in arrays)
    at = documents(*ROWS, length=LENGTH)
    if how.kind == "moba":
        return selection_oracle.moba(q, k, v, *at, how.block, how.top)
    return selection_oracle.nsa(q, k, v, gates, weights, *at, how)


@pytest.mark.parametrize("how", quick(ALONE, 2))
def test_output_equals_the_equations(how):
    expected = oracle(how.spec, inputs()[0], compressors(how.spec))
    assert_close(attended(how)[0], expected, "attention")


@pytest.mark.parametrize("how", quick(ALONE, 2))
def test_gradients_equal_differences_of_the_equations(how, step=1e-6):
    """Blocks stay chosen under so small a step: what is chosen has no gradient."""
    arrays, weights = inputs()[0], compressors(how.spec)
    gradients = attended(how)[1:]
    dout = arrays[3]
    inputs_of = {"q": 0, "k": 1, "v": 2, "gates": 4}
    draw = np.random.default_rng(1)
    for (name, index), gradient in zip(inputs_of.items(), gradients, strict=False):
        direction = draw.choice([-1.0, 1.0], arrays[index].shape)

        def moved(by, index=index, direction=direction):
            changed = [x + by * direction if i == index else x for i, x in enumerate(arrays)]
            return np.vdot(dout, oracle(how.spec, changed, weights))

        slope = (moved(step) - moved(-step)) / (2 * step)
        actual = np.vdot(gradient.astype(np.float64), direction)
        assert_close(actual, slope, "difference", what=name, at_least=np.abs(dout).sum())
    directions = jax.tree.map(lambda x: draw.choice([-1.0, 1.0], x.shape), weights)

    def compressed(by):
        changed = jax.tree.map(lambda x, direction: x + by * direction, weights, directions)
        return np.vdot(dout, oracle(how.spec, arrays, changed))

    slope = (compressed(step) - compressed(-step)) / (2 * step)
    products = jax.tree.map(np.vdot, gradients[-1], directions)
    actual = sum(jax.tree.leaves(products))
    assert_close(actual, slope, "difference", what="compressors", at_least=np.abs(dout).sum())
    assert (how.spec.kind == "nsa") == (actual != 0)


@pytest.mark.parametrize("how", [*SHARDED, *LONG], ids=str)
def test_every_strategy_and_order_equal_one_device(how):
    expected = attended(How(how.spec))
    for order in ("contiguous", "zigzag", "striped", "multizigzag"):
        for name, a, b in zip(RESULTS, attended(how, order), expected, strict=True):
            what = f"{order} {name}"
            jax.tree.map(lambda a, b, w=what: assert_close(a, b, "attention", what=w), a, b)


@pytest.mark.parametrize("how", [*quick(ALONE, 2), *SHARDED, *LONG], ids=str)
def test_nothing_leaks(how):
    """From the future, from another document or row; what is chosen from the past may change."""
    before = attended(how)[0]
    arrays = [x.copy() for x in inputs()[0]]
    for x in arrays[:3]:
        x[1, 15] += 3  # the eighth token of the third document, 8 .. 27
    changed = (attended(how, arrays=arrays)[0] != before).any((2, 3))
    assert changed[1, 15]
    assert changed[1, 16:28].any()
    changed[1, 15:28] = False
    assert not changed.any()


@pytest.mark.parametrize("strategy", list(strategies.STRATEGIES))
def test_a_kernel_for_tpus_goes_to_chosen_blocks_in_its_own_way(strategy):
    for what, kernel, way in (
        (MOBA, "splash", picked_tpu.GatheredBlocksTpu),
        (NSA, "splash", picked_tpu.GatheredBlocksTpu),
        (NSA, "chunked", GatheredBlocks),
        (spec.full(), "splash", MaskedKernel),
    ):
        rules = sharding.training(strategy)
        call = strategies.AttentionCall(
            kernels.KERNELS[kernel], what, rules, (1, LENGTH, N, H), K, 4
        )
        assert type(call.pair) is way


def test_moba_of_all_blocks_is_full_attention():
    everything = attended(How(spec.moba(block=4, top=LENGTH // 4)))
    for name, a, b in zip(RESULTS[:4], everything, attended(How(spec.full())), strict=False):
        assert_close(a, b, "attention", what=name)


@pytest.mark.parametrize("shards", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_work_grows_with_the_blocks_chosen(monkeypatch, shards):
    """Tiles that run: one for 8 pairs of a block, or for what is left of them, on its shard."""
    count = 0

    def forward(*args, **how):
        nonlocal count

        def one_more():
            nonlocal count
            count += 1

        jax.debug.callback(one_more)
        return chunked.forward(*args, **how)

    kernel = types.ModuleType("counted")
    kernel.forward, kernel.backward = forward, chunked.backward
    monkeypatch.setitem(kernels.KERNELS, "counted", kernel)
    tiles = {}
    for length in (256, 512):
        count = 0
        rules = sharding.training("ring")
        with jax.set_mesh(make_mesh((1, shards, 1))):
            place = rules("batch", "length", "act_heads", None)
            draw = np.random.default_rng(0)
            q, k = (draw.standard_normal((1, length, 1, H), np.float32) for _ in "qk")
            q, k = (jax.device_put(x, place) for x in (q, k))
            at = documents((length,), length=length)
            at = Positions(*(jax.device_put(x, rules("batch", "length")) for x in at))
            how = dict(kernel="counted", rules=rules)
            jax.block_until_ready(
                jax.jit(functools.partial(attend.attend, spec=spec.moba(16, 3), **how))(q, k, k, at)
            )
            jax.effects_barrier()
        chosen = 3 * length - 16 - 2 * 16  # the first two blocks have fewer to choose from
        blocks = shards * length // 16  # as the queries of each shard meet them
        assert chosen / 8 <= count <= chosen / 8 + blocks
        tiles[length] = count
    assert tiles[512] <= 2.5 * tiles[256]


def test_memory_grows_with_the_length_not_its_square():
    def temporary_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 2, H), jnp.float32)
        at = Positions(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2)

        def total(q, k, v, at):
            how = dict(kernel="chunked", rules=sharding.whole())
            return attend.attend(q, k, v, at, spec.moba(64, 4), **how).sum()

        with jax.set_mesh(make_mesh((1, 1, 1))):
            lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x, at)
            return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16384) < 2.2 * temporary_bytes(8192)


@pytest.mark.parametrize("how", [MOBA, NSA], ids=lambda how: how.kind)
@pytest.mark.parametrize("kernel", ["chunked", "on_tpu"])
def test_a_scan_over_layers_makes_no_masks_ahead_and_chooses_once(how, kernel):
    """Partial evaluation takes what needs no layer out of the scan, of all parts at once; and
    backward would choose again.
    """
    shards, layers, length = 4, 3, 4 * LENGTH
    rules = sharding.training("ring", layout="zigzag")
    place = rules("batch", "length", "act_heads", None)
    weights, given = compressors(how), dict(kernel=kernel, rules=rules)

    def layer(q, k, at):
        if how.kind == "moba":
            return attend.attend(q, k, k, at, how, **given)
        compress = tuple(nsa.Compressor(*w) for w in weights)
        return nsa.attention(q, k, k, jnp.ones((*q.shape[:3], 3)), compress, at, how, **given)

    def total(q, k, at):
        save = jax.checkpoint_policies.save_only_these_names(local.SAVED)
        step = jax.checkpoint(lambda q, _: (layer(q, k, at), None), policy=save)
        return jax.lax.scan(step, q, length=layers)[0].sum()

    with jax.set_mesh(make_mesh((1, shards, 1))):
        q, k = (jax.ShapeDtypeStruct((1, length, n, H), "float32", sharding=place) for n in (N, K))
        at = jax.ShapeDtypeStruct((1, length), "int32", sharding=rules("batch", "length"))
        traced = jax.make_jaxpr(jax.grad(total))(q, k, Positions(at, at))
    sizes = [v.aval.size for eqn in traced.eqns for v in eqn.outvars]
    assert max(sizes) <= layers * q.size
    assert str(traced).count(" top_k[") == 1


@pytest.mark.parametrize("how", [MOBA, NSA, WIDE], ids=lambda how: how.kind)
def test_keys_seen_are_those_of_the_equations(how):
    """A document of 40 tokens, one head: what each query attends to, counted."""
    counted = np.zeros(40, int)
    original = selection_oracle.attend
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((1, 40, 1, H)) for _ in "qkv")
    at = documents((40,), length=40)
    seen = []
    selection_oracle.attend = lambda q, k, *rest: (seen.append(len(k)), original(q, k, *rest))[1]
    try:
        if how.kind == "moba":
            selection_oracle.moba(q, k, v, *at, how.block, how.top)
        else:
            gates = np.ones((1, 40, 1, 3))
            selection_oracle.nsa(q, k, v, gates, compressors(how), *at, how)
    finally:
        selection_oracle.attend = original
    if how.kind == "moba":
        counted += seen
    else:
        counted += np.array(seen[:80]).reshape(40, 2).sum(1) + seen[80:]
    np.testing.assert_array_equal(how.keys_seen(40), counted)


def test_sinks_and_slopes_go_with_moba():
    """As with full attention, whose equal it is when all blocks are chosen."""
    arrays = inputs()[0][:3]
    at = Positions(*map(jnp.asarray, documents(*ROWS, length=LENGTH)))
    heads = Heads(jnp.linspace(-1, 2, N), 2.0 ** -jnp.arange(1, N + 1))

    def out(what):
        with jax.set_mesh(make_mesh((1, 1, 1))):
            how = dict(spec=what, kernel="chunked", rules=sharding.whole(), heads=heads)
            attention = functools.partial(attend.attend, **how)
            return jax.jit(attention)(*map(jnp.asarray, arrays), at)

    fields = dict(sink_logit=True, alibi=1.0)
    every = spec.moba(block=4, top=LENGTH // 4, **fields)
    assert_close(out(every), out(spec.full(**fields)), "attention")
