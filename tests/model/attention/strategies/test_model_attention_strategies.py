"""Every strategy over a sharded length equals one device, for every order of the length.

Programs take where the tokens stand as arguments: one compilation serves all documents and orders.
"""

import dataclasses
import functools
import itertools
import re
import types
from typing import get_args

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, documents
from attention_runs import like
from conftest import make_mesh, quick, sampled, small_tiles
from tolerances import assert_close

from core import layout, sharding
from core.config import UserError
from core.sharding import Layout
from model.attention import attend
from model.attention.kernels import chunked, reference
from model.attention.kernels import table as kernels
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec, full, sliding

LENGTH, H = 48, attention_cases.H
ROWS = (LENGTH,), (7, 1, 20, 12), (), (16, 16, 16)  # one, packed and padded, padding alone, even
ORDERS = get_args(Layout)
SPECS = {"full": full(), "window": sliding(7, softcap=2.0)}
HEADS = {"full": (8, 2), "window": (8, 1)}
ODD_HEADS = (6, 3)  # for 3 devices that exchange heads
RESULTS = "out", "dq", "dk", "dv"


@dataclasses.dataclass(frozen=True)
class How:
    """One way to spread attention over a mesh (data, seq, model)."""

    strategy: str
    sizes: tuple[int, int, int]
    kernel: str = "chunked"
    spec: str = "full"
    ulysses: int = 1
    both_ways: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        groups = f"x{self.ulysses}" if self.ulysses > 1 else "-both_ways" * self.both_ways
        sizes = "x".join(map(str, self.sizes))
        return f"{self.strategy}{groups}-{sizes}-{self.kernel}-{self.spec}"

    @property
    def heads(self) -> tuple[int, int]:
        return ODD_HEADS if 3 in self.sizes else HEADS[self.spec]

    def rules(self, order: str) -> sharding.Rules:
        return sharding.training(self.strategy, self.ulysses, order, self.both_ways)


def over(strategy: str, seq: int, kernel: str, spec: str, ulysses=1, both_ways=False) -> How:
    return How(strategy, (1, seq, 1), kernel, spec, ulysses, both_ways)


# Each strategy with each number of shards, kernel and spec, though not with all of them at once.
HOWS = (
    over("allgather", 2, "reference", "window"),
    over("allgather", 3, "chunked", "full"),
    over("allgather", 8, "chunked", "window"),
    over("ring", 2, "reference", "full"),
    over("ring", 3, "chunked", "window"),
    over("ring", 4, "reference", "window"),
    over("ring", 8, "chunked", "full"),
    over("ring", 4, "splash", "window"),
    over("allgather", 3, "splash", "full"),
    over("ring", 4, "gpu", "full"),
    over("ulysses", 2, "chunked", "full"),
    over("ulysses", 3, "reference", "full"),
    over("ulysses", 4, "reference", "window"),
    over("ulysses", 8, "chunked", "full"),
    over("ring", 4, "reference", "full", ulysses=2),
    over("ring", 8, "chunked", "window", ulysses=2),
    over("ring", 4, "chunked", "full", ulysses=4),
    over("ring", 3, "chunked", "full", both_ways=True),
    over("ring", 8, "reference", "window", ulysses=2, both_ways=True),
    How("ring", (2, 2, 2), "chunked", "full"),
    How("auto", (1, 4, 2), "auto", "full"),
)
EVERY = [
    over(strategy, seq, kernel, spec, ulysses)
    for (strategy, ulysses), seq, kernel, spec in itertools.product(
        [("allgather", 1), ("ring", 1), ("ulysses", 1), ("ring", 2), ("ring", 4)],
        (2, 3, 4, 8),
        ("reference", "chunked", "splash", "gpu"),
        SPECS,
    )
    if seq % ulysses == 0
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 4 and tiles of 2, so that the 6 tokens of a shard are several of each."""
    monkeypatch.setattr(chunked, "MIN_BLOCK", 4)
    monkeypatch.setattr(chunked, "MAX_BLOCK", 4)
    monkeypatch.setattr(chunked, "TILE_SCORES", 64)
    monkeypatch.setattr(layout, "TILE", 2)
    small_tiles(monkeypatch, 4)


@functools.cache
def inputs(heads: tuple[int, int], dtype: str = "float32") -> list[np.ndarray]:
    """(q, k, v, dout)."""
    shapes = [(len(ROWS), LENGTH, heads[i], H) for i in (0, 1, 1, 0)]
    draw = np.random.default_rng(0)
    return [np.asarray(jnp.asarray(draw.standard_normal(s), dtype), np.float32) for s in shapes]


@functools.cache
def program(how: How, order: str):
    """run(q, k, v, dout, at) -> (out, dq, dk, dv), compiled for numpy arguments."""
    rules, spec = how.rules(order), SPECS[how.spec]
    place = rules("batch", "length", "act_heads", None)
    kv_place = rules("batch", "length", "act_kv_heads", None)

    @jax.jit
    def run(q, k, v, dout, at):
        def out(q, k, v):
            return attend.attend(q, k, v, at, spec, kernel=how.kernel, rules=rules)

        out, pull = jax.vjp(out, q, k, v)
        return out, *pull(dout)

    def call(q, k, v, dout, at):
        with jax.set_mesh(make_mesh(how.sizes)):
            # One kv head for several shards of the heads: repeated as model/block.py does.
            repeats = max(1, how.sizes[2] // k.shape[2])
            k, v = (np.repeat(x, repeats, axis=2) for x in (k, v))
            places = place, kv_place, kv_place, place
            arrays = [
                jax.device_put(jnp.asarray(x, how.dtype), p)
                for x, p in zip((q, k, v, dout), places, strict=True)
            ]
            at = Positions(*(jax.device_put(x, rules("batch", "length")) for x in at))
            results = run(*arrays, at)
            assert results[0].sharding.spec == place
            out, dq, dk, dv = (np.asarray(x, np.float32) for x in results)
            dk, dv = (x.reshape(*x.shape[:2], -1, repeats, H).sum(3) for x in (dk, dv))
            return out, dq, dk, dv

    return call


def attended(how: How, order: str = "contiguous", arrays=None) -> list[np.ndarray]:
    """(out, dq, dk, dv) in the order of the documents, of tokens that stood in `order`."""
    with jax.set_mesh(make_mesh(how.sizes)):
        shards = how.rules(order).ring_size()
    places = layout.order(order, LENGTH, shards)
    same = like(order, LENGTH, shards, SPECS[how.spec].window)
    arrays = [*(arrays or inputs(how.heads, how.dtype)), *documents(*ROWS, length=LENGTH)]
    q, k, v, dout, *at = (x[:, places] for x in arrays)
    results = program(how, same)(q, k, v, dout, at)
    return [x[:, np.argsort(places)] for x in results]


@functools.cache
def exact(spec: str, heads: tuple[int, int], dtype: str = "float32") -> list[np.ndarray]:
    """(out, dq, dk, dv): the oracle's out, the reference's gradients, of inputs of this dtype."""
    how = How("local", (1, 1, 1), "reference", spec)
    arrays = inputs(heads, dtype)
    case = Case("", SPECS[spec].window, SPECS[spec].softcap, N=heads[0], K=heads[1])
    at = documents(*ROWS, length=LENGTH)
    out, _ = attention_cases.oracle(case, attention_cases.Tokens(*at, *at), *arrays[:3])
    return [out, *attended(how, arrays=arrays)[1:]]


def assert_exact(how: How, order: str) -> None:
    expected = exact(how.spec, how.heads)
    for name, a, b in zip(RESULTS, attended(how, order), expected, strict=True):
        assert_close(a, b, "attention", what=f"{order} {name}")


@pytest.mark.parametrize("how", quick(HOWS, 2))
def test_strategy_equals_one_device_in_every_order(how):
    for order in ORDERS:
        assert_exact(how, order)


@pytest.mark.parametrize("how", sampled([(how,) for how in EVERY], 7))
def test_every_strategy_shards_kernel_and_spec(how):
    for order in ORDERS:
        assert_exact(how, order)


@pytest.mark.parametrize("how", quick(HOWS, 2))
@pytest.mark.parametrize("order", ["contiguous", "multizigzag"])
def test_nothing_leaks(how, order):
    """Exactly nothing: masked scores add zeros, whichever device they come from."""
    before = attended(how, order)

    def changed(row, token):
        """Which tokens of the row see a difference, for each result."""
        arrays = [x.copy() for x in inputs(how.heads)]
        for x in arrays[:3]:
            x[row, token] += 1
        after = attended(how, order, arrays)
        found = [(a != b).any((2, 3)) for a, b in zip(after, before, strict=True)]
        others = np.arange(len(ROWS)) != row
        assert not any(x[others].any() for x in found), "another row changed"
        return [x[row] for x in found]

    document = np.arange(8, 28)  # the third of the packed row
    for name, x in zip(RESULTS, changed(1, 15), strict=True):
        assert x[15], f"{name} of the token itself stays"
        assert not np.delete(x, document).any(), f"{name} of another document changed"
    out, dq, _, _ = changed(0, 20)
    assert out[20:27].all()
    assert not out[:20].any() and not dq[:20].any(), "the past changed"


@pytest.mark.parametrize(
    ("strategy", "growth"),
    # Sums and partial outputs are float32: one rounding at the end, on any number of devices. But
    # where kv heads are repeated for Ulysses, dK and dV are rounded once for each of 4 copies.
    [("ring", 1.3), ("allgather", 1.3), ("ulysses", 2.0)],
)
def test_bfloat16_errs_no_more_on_many_devices(strategy, growth):
    expected = exact("full", HEADS["full"], "bfloat16")

    def errors(strategy, shards):
        how = How(strategy, (1, shards, 1), dtype="bfloat16")
        results = zip(attended(how, "striped"), expected, strict=True)
        return np.array([np.abs(a - b).max() for a, b in results])

    alone, found = errors("local", 1), errors(strategy, 8)
    assert (alone > 0).all()
    assert (found <= 2.5 * alone + 2e-3).all(), (found, alone)
    assert (found <= growth * alone).all(), (found, alone)


def call(rules, spec: AttentionSpec, heads=(2, 1), length=64, kernel="chunked", rows=1):
    """(gradient function of attention, its abstract arguments) on the mesh in use."""
    q, k = (
        jax.ShapeDtypeStruct((rows, length, n, H), jnp.float32, sharding=place(rules, n))
        for n in heads
    )
    at = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=place(rules))

    def total(q, k, v, at):
        return attend.attend(q, k, v, at, spec, kernel=kernel, rules=rules).sum()

    return jax.grad(total, (0, 1, 2)), (q, k, k, Positions(at, at))


def place(rules, heads: int = 0):
    names = ("batch", "length", *(("act_heads", None) if heads else ()))
    return jax.sharding.NamedSharding(jax.sharding.get_mesh(), rules(*names))


@pytest.mark.parametrize(
    ("spec", "order", "lengths", "runs"),
    [
        (full(), "contiguous", (64,), 10),  # shard i sees i + 1
        (full(), "zigzag", (64,), 16),
        (full(), "contiguous", (16,) * 4, 4),
        (full(), "striped", (16,) * 4, 16),
        (sliding(16), "contiguous", (64,), 7),  # each its own, and all but the first one before
        (sliding(18), "contiguous", (64,), 9),
        (full(), "contiguous", (20,), 3),  # the other shards are padding: their own alone
    ],
)
def test_hops_out_of_reach_run_no_kernel(monkeypatch, spec, order, lengths, runs):
    counts = {"forward": 0, "backward": 0}

    def counted(name):
        def run(*args, **how):
            jax.debug.callback(lambda: counts.update({name: counts[name] + 1}))
            return getattr(reference, name)(*args, **how)

        return run

    kernel = types.SimpleNamespace(**{name: counted(name) for name in counts})
    monkeypatch.setitem(kernels.KERNELS, "counted", kernel)
    with jax.set_mesh(make_mesh((1, 4, 1))):
        rules = sharding.training("ring", layout=order)
        gradient, (q, k, v, _) = call(rules, spec, kernel="counted")
        at = [x[:, layout.order(order, 64, 4)] for x in documents(lengths, length=64)]
        at = Positions(*(jax.device_put(x, place(rules)) for x in at))
        ones = [jax.device_put(np.ones(x.shape, np.float32), x.sharding) for x in (q, k, v)]
        jax.block_until_ready(jax.jit(gradient)(*ones, at))
        jax.effects_barrier()
    idle = 2 if lengths == (20,) else 0
    assert counts == {"forward": runs + idle, "backward": runs + idle}


def sends(spec: AttentionSpec, heads: tuple[int, int] = (8, 4), to: str = "", **rules) -> int:
    """How many sends stand in the program of forward and backward; `to` whom the first does."""
    gradient, arguments = call(sharding.training(**rules), spec, heads)
    text = str(jax.make_jaxpr(gradient)(*arguments))
    return len(re.findall(rf" ppermute\[[^]]*?perm=\(\(0, {to}", text))


def test_the_last_hop_sends_nothing():
    """Two hops: K and V and where they stand, once; again, with dK and dV, and their way home."""
    with jax.set_mesh(make_mesh((1, 2, 1))):
        assert sends(full(), strategy="ring") == 2 + 2 + 1 + 1
        assert sends(full(), strategy="ring", both_ways=True) == 2 * (2 + 2 + 1 + 1)
        assert sends(sliding(1), strategy="ring") == 0
    with jax.set_mesh(make_mesh((1, 8, 1))):
        assert sends(sliding(9), strategy="ring") == 2 + 2 + 1 + 1
        assert sends(sliding(9), strategy="ring", both_ways=True) == 2 + 2 + 1 + 1
        # Zigzag: the shards at both sides. Back to the later one, and its dK and dV home.
        assert sends(sliding(2), strategy="ring", layout="zigzag") == (2 + 2 + 1 + 1) + (2 + 2 + 1)
        there, back = (sends(full(), to=to, strategy="ring", both_ways=True) for to in "17")
        assert there == back > 0


@pytest.mark.parametrize("strategy", ["auto", "local", "allgather", "ring", "ulysses"])
def test_whole_rows_need_no_strategy(strategy):
    with jax.set_mesh(make_mesh((2, 1, 2))):
        gradient, arguments = call(sharding.training(strategy), full(), (8, 4), rows=2)
        text = str(jax.make_jaxpr(gradient)(*arguments))
    assert not any(name in text for name in ("ppermute", "all_to_all", "all_gather"))


def test_memory_of_a_ring_grows_with_the_shard_not_the_length():
    def temporary_bytes(shards, tokens=128):
        with jax.set_mesh(make_mesh((1, shards, 1))):
            gradient, arguments = call(sharding.training("ring"), full(), (2, 2), shards * tokens)
            lowered = jax.jit(gradient).lower(*arguments)
            return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) < 1.05 * temporary_bytes(4)


def test_local_refuses_a_sharded_length():
    with pytest.raises(NotImplementedError, match=r"(?s)'local'.*2 shards.*'ring'.*mesh.seq=1"):
        attended(How("local", (1, 2, 1)))


@pytest.mark.parametrize(
    ("strategy", "ulysses", "heads", "degree"),
    [("ulysses", 1, (6, 3), 4), ("ulysses", 1, (8, 3), 4), ("ring", 2, (3, 1), 2)],
)
def test_heads_that_cannot_be_dealt_are_refused(strategy, ulysses, heads, degree):
    with (
        jax.set_mesh(make_mesh((1, 4, 1))),
        pytest.raises(NotImplementedError) as error,
    ):
        sends(full(), heads, strategy=strategy, ulysses=ulysses)
    for part in (
        "kind='full'",
        f"mesh.strategy='{strategy}'",
        f"between {degree} devices",
        f"{heads[0]} query heads and {heads[1]} kv heads",
        "mesh.strategy='ring' with mesh.ulysses=1",
    ):
        assert part in str(error.value)


def test_unknown_kernel_is_refused():
    with pytest.raises(UserError, match="attention_kernel='dense' is not one of auto, reference"):
        attended(How("local", (1, 1, 1), "dense"))
