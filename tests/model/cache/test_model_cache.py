"""A cache over many shards holds each token once, and attention to it equals the oracle.

Old tokens are written in two chunks, so that rings go round; then 24 new ones of each row attend
to what is stored and to each other. Rows differ in length, and what is longer is padding.
"""

import dataclasses
import functools
import itertools

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from conftest import make_mesh, sampled
from tolerances import assert_close

from core import sharding
from core.config import Unsupported
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec, Heads
from model.cache import cached, flash_decode, kv_cache
from model.cache.form import CacheConfig
from model.config import ModelConfig

H = attention_cases.H
OLD, NEW, ROOM, BLOCK = 48, 24, 72, 4
SEEN = np.array([35, 4])  # tokens before the new ones
END = np.array([35 + NEW, 4 + 17])

KINDS = {  # fields that Case and AttentionSpec share
    "full": dict(softcap=2.0, sink_logit=True),
    "sliding": dict(window=7),
    "sinks": dict(window=5, sinks=3, sink_logit=True, alibi=1.0),
    "chunked": dict(chunk=9),
    "chunked-sinks": dict(chunk=4, sinks=2),
    "strided": dict(block=3, local=2, stride=3),
    "block_sparse": dict(block=2, local=2, sinks=6),
    "dilated": dict(window=4, dilation=3),
    "prefix": dict(prefix=11),
}


@dataclasses.dataclass(frozen=True)
class How:
    """A kind on a mesh (data, seq, model); no strategy: the chunk is whole on every shard."""

    kind: str
    sizes: tuple[int, int, int]
    strategy: str = ""
    heads: tuple[int, int] = (8, 2)
    form: CacheConfig = CacheConfig()

    def __str__(self) -> str:
        mesh = "x".join(map(str, self.sizes))
        form = f"-{self.form.name}" * (self.form != CacheConfig())
        return f"{self.kind}-{mesh}-{self.strategy or 'whole'}{form}"

    @property
    def rules(self) -> sharding.Rules:
        return sharding.prefilling(self.strategy) if self.strategy else sharding.decoding()

    @property
    def case(self) -> Case:
        return Case("", N=self.heads[0], K=self.heads[1], **KINDS[self.kind])

    @property
    def spec(self) -> AttentionSpec:
        fields = KINDS[self.kind]
        kinds = dict(dilation="dilated", window="sliding", chunk="chunked", block="block_sparse")
        kinds |= dict(prefix="prefix")
        kind = next((kinds[name] for name in kinds if name in fields), "full")
        return AttentionSpec(kind=kind, **fields)


# Each kind and each number of shards, whole and by a strategy, though not all of them at once.
HOWS = (
    How("full", (1, 1, 1)),
    How("full", (1, 3, 1), "allgather"),
    How("full", (1, 8, 1)),
    How("full", (2, 2, 2), "auto"),
    How("sliding", (1, 2, 1)),
    How("sliding", (1, 8, 1), "ring", heads=(8, 1)),
    How("sinks", (2, 2, 2)),
    How("sinks", (1, 4, 1), "ulysses"),
    How("chunked", (1, 4, 1)),
    How("chunked", (1, 3, 1), "ring"),
    How("chunked-sinks", (1, 2, 1), "allgather"),
    How("strided", (1, 3, 1)),
    How("strided", (1, 2, 1), "ulysses"),
    How("block_sparse", (1, 8, 1)),
    How("block_sparse", (1, 4, 2), "ring"),
    How("dilated", (1, 8, 1)),
    How("dilated", (1, 3, 1), "ring"),
    How("prefix", (1, 4, 1)),
    How("prefix", (1, 8, 1), "allgather"),
)
EVERY = [
    How(kind, (1, seq, 1), strategy, heads=(6, 3) if seq == 3 else (8, 2))
    for kind, seq, strategy in itertools.product(
        KINDS, (1, 2, 3, 4, 8), ("", "allgather", "ring", "ulysses")
    )
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 4 keys, so that the 9 of a shard are several."""
    monkeypatch.setattr(flash_decode, "BLOCK", BLOCK)


@functools.cache
def inputs(heads: tuple[int, int]) -> list[np.ndarray]:
    """(q, k, v) of the tokens at positions 0, 1, ... of each row."""
    shapes = [(2, OLD + NEW, n, H) for n in (heads[0], heads[1], heads[1])]
    draw = np.random.default_rng(0)
    return [draw.standard_normal(shape).astype(np.float32) for shape in shapes]


def config(how: How) -> ModelConfig:
    """Two layers of one slot: the second is looked at."""
    N, K = how.heads
    sizes = dict(vocab_size=8, context=ROOM, num_layers=2, embed_dim=8, mlp_dim=8, head_dim=H)
    return ModelConfig(**sizes, num_heads=N, num_kv_heads=K, pattern=(how.spec,), dtype="float32")


def placed(how: How, first_B: np.ndarray, T: int, end_B: np.ndarray):
    """((q, k, v) [2, T, heads, H], Positions, order): T tokens of each row from `first_B` on.

    Where the length is sharded they stand by the shard that keeps them; that is the order.
    """
    P = how.sizes[1] if how.strategy else 1
    offset_BT = np.stack(
        [np.argsort((first + np.arange(T)) % P, kind="stable") for first in first_B]
    )
    positions = (first_B[:, None] + offset_BT).astype(np.int32)
    at = Positions(positions, (positions < end_B[:, None]).astype(np.int32))
    rows = np.arange(2)[:, None]
    arrays = [x[rows, np.minimum(positions, OLD + NEW - 1)] for x in inputs(how.heads)]
    # One kv head for several shards of the heads: repeated as model/block.py does.
    repeats = max(1, how.sizes[2] // how.heads[1])
    arrays = [x if i == 0 else np.repeat(x, repeats, axis=2) for i, x in enumerate(arrays)]
    names = "act_heads", "act_kv_heads", "act_kv_heads"
    arrays = [
        jax.device_put(x, how.rules("batch", "length", name, None))
        for x, name in zip(arrays, names, strict=True)
    ]
    at = Positions(*(jax.device_put(x, how.rules("batch", "length")) for x in at))
    return arrays, at, offset_BT


def spoilt(held: kv_cache.KVCache, how: How) -> kv_cache.KVCache:
    """NaN in the blocks that no shard needs to read, as it holds nothing there yet."""
    (slot,), P = held.slots, how.sizes[1]
    shard_S, place_S = np.divmod(
        np.arange(slot.positions_BS.shape[1]), slot.positions_BS.shape[1] // P
    )
    counts = np.array([len(range(shard, SEEN.max(), P)) for shard in range(P)])
    never_S = place_S >= np.ceil(counts / BLOCK)[shard_S] * BLOCK
    never_S = jax.sharding.reshard(never_S, how.rules("kv_length"))

    def spoil(x):
        never = never_S.reshape(1, 1, 1, -1, *[1] * (x.ndim - 4))
        return jnp.where(never, jnp.nan, x) if x.dtype != jnp.int8 else x

    v_LBKSH = jax.tree.map(spoil, slot.v_LBKSH)
    return dataclasses.replace(held, slots=(dataclasses.replace(slot, v_LBKSH=v_LBKSH),))


@functools.cache
def run(how: How) -> tuple[np.ndarray, kv_cache.KVCache]:
    """(out [2, NEW, N, H] in the order of the rows, the cache after the new tokens)."""
    rules = how.rules

    @jax.jit
    def go(old, new):
        held = kv_cache.create(config(how), 2, ROOM, rules, how.form)
        for (_, k, v), at in (*old, new):
            k, v = (jnp.stack((x * 0 - 1, x)) for x in (k, v))
            before, held = held, held.write([flash_decode.NewKV(k, v)], at, rules)
        before = spoilt(before, how)
        (q, k, v), at = new
        sinks, slopes = attention_cases.heads(how.case)
        each = jax.tree.map(lambda x: jax.sharding.reshard(x, rules("act_heads")), (sinks, slopes))
        out = cached.attend_cached(
            q, k, v, at, before.stored(0, jnp.int32(1)), how.spec,
            kernel="reference", rules=rules, heads=Heads(*each),
        )  # fmt: skip
        return out, held

    with jax.set_mesh(make_mesh(how.sizes)):
        half = np.full(2, OLD // 2)
        *old, (new, at, offset_BT) = (
            placed(how, half * 0, OLD // 2, SEEN),
            placed(how, half, OLD // 2, SEEN),
            placed(how, SEEN, NEW, END),
        )
        out, held = go([(arrays, at) for arrays, at, _ in old], (new, at))
        ordered = np.take_along_axis(
            np.asarray(out), np.argsort(offset_BT, axis=1)[:, :, None, None], axis=1
        )
        return ordered, held


@functools.cache
def exact(kind: str, heads: tuple[int, int]) -> np.ndarray:
    """The oracle's out [2, NEW, N, H], over all tokens that came before."""
    case = How(kind, (1, 1, 1), heads=heads).case
    q_positions = (SEEN[:, None] + np.arange(NEW)).astype(np.int32)
    k_positions = np.tile(np.arange(OLD + NEW, dtype=np.int32), (2, 1))
    segments = [(x < END[:, None]).astype(np.int32) for x in (q_positions, k_positions)]
    tokens = attention_cases.Tokens(q_positions, segments[0], k_positions, segments[1])
    q, k, v = inputs(heads)
    rows = np.arange(2)[:, None]
    q = q[rows, np.minimum(q_positions, OLD + NEW - 1)]
    return attention_cases.oracle(case, tokens, q, k, v)[0]


def assert_exact(how: How) -> None:
    real = (SEEN[:, None] + np.arange(NEW) < END[:, None])[:, :, None, None]
    expected = exact(how.kind, how.heads)
    assert_close(run(how)[0] * real, expected * real, "attention")


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_attention_to_a_sharded_cache_equals_the_oracle(how):
    assert_exact(how)


@pytest.mark.parametrize("how", sampled([(how,) for how in EVERY], 7))
def test_every_kind_strategy_and_number_of_shards(how):
    assert_exact(how)


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_each_token_is_kept_once_where_it_belongs(how):
    """Position p on shard p % P; each shard has as much room and, of what stays, as much."""
    P = how.sizes[1]
    (slot,) = run(how)[1].slots
    _, _, k = inputs(how.heads)
    held_BPS = np.asarray(slot.positions_BS).reshape(2, P, -1)
    values = np.asarray(slot.v_LBKSH)[1].reshape(2, -1, P, held_BPS.shape[2], H)
    kept = how.spec.mask.kept
    for row, shard in np.ndindex(2, P):
        held = held_BPS[row, shard]
        here = held[held >= 0]
        assert (here % P == shard).all() and len(set(here)) == len(here)
        np.testing.assert_array_equal(values[row, 0, shard, held >= 0], k[row, here, 0])
    for row in range(2):
        held = set(held_BPS[row].ravel().tolist()) - {-1}
        first = END[row] - kept + how.spec.sinks if kept else 0
        assert held >= {*range(min(how.spec.sinks, END[row])), *range(max(0, first), END[row])}
        counts = (held_BPS[row] >= 0).sum(1)
        assert counts.max() - counts.min() <= 1
    assert held_BPS[0].size < (kept or ROOM) + 2 * P


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("kind", ["full", "sinks"])
def test_bytes_are_those_that_are_allocated(kind, sizes):
    """The last mesh has more shards of the heads than there are kv heads."""
    how = How(kind, sizes)
    with jax.set_mesh(make_mesh(sizes)):
        held = kv_cache.create(config(how), 4, ROOM + 1, how.rules)
        (slot,) = held.slots
        expected = kv_cache.kv_bytes(config(how), 4, ROOM + 1, how.rules)
        assert slot.k_LBKSH.nbytes + slot.v_LBKSH.nbytes == expected
        (share,) = {shard.data.nbytes for shard in slot.k_LBKSH.addressable_shards}
        assert share == slot.k_LBKSH.nbytes // np.prod(sizes)


def test_a_shard_counts_its_tokens():
    for size in (1, 2, 3, 8):
        for tokens in range(20):
            counted = [flash_decode.Shard(index, size).count(tokens) for index in range(size)]
            assert counted == [len(range(index, tokens, size)) for index in range(size)]


@pytest.mark.parametrize("start", [0, 5, 16])
def test_dealing_puts_tokens_on_the_shards_that_keep_them(start):
    rules = sharding.prefilling()
    with jax.set_mesh(make_mesh((2, 4, 1))):
        natural = jax.device_put(np.stack([np.arange(12), -np.arange(12)]), rules("batch", None))
        dealt = jax.jit(lambda x: kv_cache.deal(x, start, rules))(natural)
        assert dealt.sharding.spec == rules("batch", "length")
        first, second = np.asarray(dealt)
        np.testing.assert_array_equal((start + first) % 4, np.repeat(np.arange(4), 3))
        np.testing.assert_array_equal(second, -first)
        back = jax.jit(lambda x: kv_cache.collect(x, start, rules))(dealt)
        np.testing.assert_array_equal(back, natural)


def test_local_refuses_a_chunk_over_shards():
    with pytest.raises(Unsupported, match="mesh.strategy='local' needs whole rows.*2 shards"):
        run(How("full", (1, 2, 1), "local"))


def test_a_chunk_in_another_order_is_no_chunk_for_the_cache():
    with jax.set_mesh(make_mesh((1, 2, 1))):
        held = kv_cache.create(config(HOWS[0]), 2, ROOM, sharding.prefilling())
        wrong = dataclasses.replace(sharding.prefilling(), layout="contiguous")
        with pytest.raises(AssertionError, match="contiguous"):
            held.write([], Positions(None, None), wrong)


def test_merging_shards_equals_one_softmax():
    """Parts of no key at all, on one shard or on every one, count for nothing."""
    lse = np.array([[0.5, -np.inf, -np.inf], [1.0, 2.0, -np.inf], [-80.0, 90.0, -np.inf]])
    lse = np.tile(lse[:, None, :, None], (1, 1, 1, 4)).astype(np.float32)  # [shard, B, T, N]
    out = np.random.default_rng(0).standard_normal((*lse.shape, H)).astype(np.float32)
    out = np.where(np.isneginf(lse)[..., None], 0, out)
    weight = np.exp(lse - lse.max(0).clip(-1e30))
    total = weight.sum(0)
    expected = (out * weight[..., None]).sum(0) / np.where(total == 0, 1, total)[..., None]
    with jax.set_mesh(make_mesh((1, 3, 1))):
        by_shard = jax.P("seq")
        for rules in (sharding.decoding(), sharding.prefilling()):
            spread = rules(None, "length")

            def merged(out, lse, rules=rules):
                return cached.merge_shards((out[0], lse[0]), rules)

            found = jax.jit(jax.shard_map(merged, in_specs=by_shard, out_specs=spread))(
                *(jax.device_put(x, by_shard) for x in (out, lse))
            )
            assert_close(found[0], expected, "attention", what="out")
            sums = np.log(np.where(total == 0, 1, total)) + lse.max(0)
            assert_close(found[1], sums, "attention", what="lse")
