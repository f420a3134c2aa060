"""What masks say of tiles and of lengths, held to what they say pair by pair."""

import dataclasses
import itertools

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import CASES, UNTIL, documents
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention.kernels.tiles import cut, met
from model.attention.mask import Mask, Positions
from model.attention.spec import MASKS

LENGTH = 24
OF_CASES = sorted({attention_cases.mask(case) for case in CASES}, key=repr)


def masks():
    """Any mask of any kind: numbers from 1 on, or from 0 where a field has a default."""
    return st.sampled_from(sorted(set(MASKS.values()), key=repr)).flatmap(
        lambda kind: st.builds(
            kind,
            **{
                field.name: st.integers(int(field.default is dataclasses.MISSING), 12)
                for field in dataclasses.fields(kind)
            },
        )
    )


@st.composite
def rows(draw):
    """Positions [2, LENGTH] of packed documents in any order, with some padding."""
    lengths = [draw(st.lists(st.integers(1, LENGTH), max_size=4)) for _ in range(2)]
    fitting = [
        [n for n, end in zip(x, itertools.accumulate(x), strict=True) if end <= LENGTH]
        for x in lengths
    ]
    places = documents(*fitting, length=LENGTH)
    until = draw(st.sampled_from([None, *UNTIL.values()]))
    arrays = [*places, places[0] if until is None else until(places[0])]
    if draw(st.booleans()):
        order = np.array(draw(st.permutations(range(LENGTH))))
        arrays = [x[:, order] for x in arrays]
    return Positions(*(jnp.asarray(x, jnp.int32) for x in arrays))


def check_tiles(mask: Mask, q_at: Positions, k_at: Positions, R: int, C: int) -> int:
    """Asserts what the mask says of all tiles; returns how many are seen whole."""
    may_BYZ, whole_BYZ = (np.asarray(x) for x in met(mask, cut(q_at, R), cut(k_at, C)))
    q_at = jax.tree.map(lambda x_BT: x_BT[:, :, None], q_at)
    pairs = np.asarray(mask.pairs(q_at, jax.tree.map(lambda x_BS: x_BS[:, None], k_at)))
    B, T, S = pairs.shape
    pairs_BYZRC = pairs.reshape(B, T // R, R, S // C, C).swapaxes(2, 3)
    assert not (pairs_BYZRC.any((3, 4)) & ~may_BYZ).any(), "a pair that counts is not visited"
    assert pairs_BYZRC.all((3, 4))[whole_BYZ].all(), "a tile is called whole that is not"
    return int(whole_BYZ.sum())


def check_lengths(mask: Mask, length: int) -> None:
    """Asserts what the mask says of keys that are far away, and how many there are."""
    q, k = np.arange(length)[:, None], np.arange(length)[None]
    at = (Positions(jnp.asarray(x, jnp.int32), jnp.ones_like(x)) for x in (q, k))
    seen = np.asarray(mask.pairs(*at))
    np.testing.assert_array_equal(mask.count(length), seen.sum(1))
    np.testing.assert_array_equal(mask.count(length), Mask.count(mask, length))
    if mask.reach:
        assert not seen[q - k >= mask.reach].any(), "a key beyond the reach is seen"
    if mask.kept:
        sinks = getattr(mask, "sinks", 0)
        assert not (seen & (q - k >= mask.kept - sinks) & (k >= sinks)).any(), "a cache drops it"


@pytest.mark.parametrize("mask", OF_CASES, ids=str)
def test_masks_of_the_case_table(mask):
    """Also: a method of a mask's own finds tiles where no mask needs to be evaluated."""
    wholes = 0
    for layout in ("one", "packed", "padded", "shuffled", "zigzag"):
        tokens = attention_cases.LAYOUTS[layout]()
        for until in (None, *UNTIL.values()):
            arrays = [tokens.q_positions, tokens.q_segments]
            arrays += [until(arrays[0])] if until else []
            at = Positions(*map(jnp.asarray, arrays))
            wholes += sum(check_tiles(mask, at, at, R, C) for R, C in ((4, 2), (8, 8)))
    check_lengths(mask, 41)
    assert wholes or type(mask).sees_all is Mask.sees_all


@settings(max_examples=60, deadline=None, derandomize=True)
@given(masks(), rows(), st.sampled_from([1, 2, 4, 8]), st.sampled_from([2, 3, 12]))
def test_any_mask_over_any_rows(mask, at, R, C):
    check_tiles(mask, at, at, R, C)
    check_lengths(mask, LENGTH)
