"""Chosen blocks by the kernels for TPUs, interpreted: equal to the tiles of picked.py.

What is chosen here is arbitrary: other blocks than MoBA or NSA would choose, later ones, and ones
that are not there. Both against the papers' equations: test_model_attention_select.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import documents
from tolerances import assert_close

from core.config import Unsupported
from model.attention import blocks
from model.attention.block_topk import picked_call, picked_steps, picked_tpu
from model.attention.block_topk.pairs import RoutingPairs, SortedRuns
from model.attention.block_topk.picked import GatheredBlocks
from model.attention.block_topk.picked_call import GatheredCall
from model.attention.block_topk.picked_tpu import GatheredBlocksTpu
from model.attention.blocks import MaskedKernel
from model.attention.kernels import reference
from model.attention.mask import Full, Positions
from model.attention.spec import Heads

LENGTH, H = 40, 8
DOCUMENTS = (LENGTH,), (7, 1, 20, 3, 3), ()
RESULTS = "out", "lse", "dq", "dk", "dv"


@dataclasses.dataclass(frozen=True)
class Case:
    """M heads choose `top` blocks each, for N query heads of K kv heads."""

    N: int
    M: int
    K: int
    block: int = 4
    top: int = 3
    softcap: float = 0.0
    alibi: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}{getattr(self, f.name)}" for f in changed)


CASES = [
    Case(4, 4, 2),  # MoBA: each head chooses, and GQA
    Case(6, 2, 2, block=6, softcap=2.0),  # NSA: a group chooses; tiles have rows of padding
    Case(3, 1, 1, block=5, top=4, dtype="bfloat16"),  # MQA
    Case(2, 2, 1, alibi=True),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several look-ups and parts a lane, tiles a part, blocks a tile and parts a block."""
    monkeypatch.setattr(picked_tpu, "PART_FLOATS", 300)
    monkeypatch.setattr(picked_steps, "RUNS", 6)
    for name, size in dict(LANES=8, ALIGN=4, KEYS=3).items():
        monkeypatch.setattr(picked_call, name, size)


def inputs(case: Case) -> tuple:
    """(q, k, v, heads, where queries stand, where keys do, dout); some keys are elsewhere."""
    draw = np.random.default_rng(0)
    B = len(DOCUMENTS)
    q, k, v, dout = (
        draw.standard_normal((B, LENGTH, n, H)) for n in (case.N, case.K, case.K, case.N)
    )
    at = documents(*DOCUMENTS, length=LENGTH)
    scores = draw.random((B, LENGTH, case.M, LENGTH // case.block + 1))
    chosen = np.argsort(scores, axis=3)[..., : case.top].astype(np.int32)
    chosen = np.where(draw.random(chosen.shape) < 0.2, -1, chosen)
    # Every query sees its own block: none is without any key, as long as all keys are there.
    own = at[0][:, :, None] // case.block
    chosen[..., 0] = np.where((chosen[..., 1:] == own[..., None]).any(3), -1, own)
    orders = [draw.permutation(LENGTH) for _ in "qk"]
    q_order, k_order = orders[0], orders[1][: LENGTH - 4]
    slope = np.linspace(0.1, 1, case.N, dtype=np.float32) if case.alibi else None
    return (
        *(jnp.asarray(x, case.dtype) for x in (q[:, q_order], k[:, k_order], v[:, k_order])),
        Heads(slope_N=slope, chosen=chosen[:, q_order]),
        *(Positions(*(x[:, order] for x in at)) for order in (q_order, k_order)),
        jnp.asarray(dout[:, q_order], case.dtype),
    )


@functools.partial(jax.jit, static_argnums=0)
def attended(picked, q, k, v, heads, q_at, k_at, dout):
    """RESULTS."""
    heads = heads._replace(chosen=RoutingPairs.of(heads.chosen, q_at))
    out, lse = picked.forward(q, k, v, heads, q_at, k_at)
    done = dout, lse, blocks.delta(out, dout)
    return out, lse, *picked.backward(q, k, v, heads, q_at, k_at, *done)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_tiles(case):
    pair = MaskedKernel(reference, Full(), H**-0.5, case.softcap)
    actual, expected = (
        attended(of(pair, case.block, LENGTH), *inputs(case))
        for of in (GatheredBlocksTpu, GatheredBlocks)
    )
    assert np.isneginf(expected[1]).any() and np.isfinite(expected[1]).any()
    for name, a, b in zip(RESULTS, actual, expected, strict=True):
        assert a.dtype == jnp.float32
        assert_close(a, b, "attention", case.dtype, what=name)


def test_a_step_begins_with_each_block_and_each_tile():
    """Nobody chose blocks (0, 0) and (1, 3); of (1, 2) no key is here, so its pair is left out."""
    of_pairs = [(1, 0)] * 3 + [(1, 1)] * 6 + [(1, 2)] * 1 + [(2, 0)] * 2
    of_keys = [(0, 0)] * 2 + [(1, 0)] * 4 + [(1, 1)] * 3 + [(1, 3)] * 4 + [(2, 0)]
    both = (SortedRuns.of(*jnp.asarray(x, jnp.int32).T) for x in (of_pairs, of_keys))
    found = []

    def see(carry, queries_P, steps):
        count = int(steps.count)
        found.append((queries_P.tolist(), *(x[: count + 1].tolist() for x in steps[1:])))
        return carry

    pairs, keys = both
    with jax.disable_jit():
        starts = picked_steps.starts(keys)
        here = RoutingPairs(pairs, jnp.arange(12))
        picked_steps.each_part(here, keys, starts, 8, 4, see, 0)
    assert starts.tolist()[:6] == [0, 2, 6, 9, 13, 14]
    (queries, begin, low, high), (last_queries, *last) = found
    assert queries == list(range(8))
    assert (begin, low, high[:-1]) == ([0, 3, 4, 8], [2, 6, 6, -1], [6, 9, 9])
    # The ninth pair of block (1, 1), both of (2, 0); then nothing, in a tile of its own.
    assert last_queries[:3] == [8, 10, 11]
    assert last[:2] == [[0, 1, 3, 4, 8], [6, 13, 13, 13, -1]]
    assert last[2][:-1] == [9, 14, 13, 13]


def test_blocks_too_long_for_vector_memory_are_refused(monkeypatch):
    monkeypatch.undo()
    pair = MaskedKernel(reference, Full(), 1.0, 0.0)
    call = GatheredCall.of(pair, 1, 512, 2**17, alibi=False)
    with pytest.raises(Unsupported, match="choose a smaller block"):
        call.memory(picked_tpu.picked_kernel.forward, {"q_RH": jnp.zeros((1, 512, 128))})
