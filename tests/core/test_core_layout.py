"""Orders of the length are permutations, and a window reaches the shards that hold what it sees."""

from typing import get_args

import numpy as np
import pytest

from core import layout
from core.sharding import Layout

LAYOUTS = get_args(Layout)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("length", "shards"), [(12, 1), (12, 2), (12, 3), (35, 5), (7, 7), (4096, 8), (3 * 514, 3)]
)
def test_orders_are_permutations_that_keep_shards_in_order(name, length, shards):
    order = layout.order(name, length, shards)
    np.testing.assert_array_equal(np.sort(order), np.arange(length))
    assert (np.diff(order.reshape(shards, -1)) > 0).all()
    if shards == 1 or name == "contiguous":
        np.testing.assert_array_equal(order, np.arange(length))


def test_orders_by_hand(monkeypatch):
    monkeypatch.setattr(layout, "TILE", 2)

    def shards(name, length, count):
        return layout.order(name, length, count).reshape(count, -1).tolist()

    assert shards("zigzag", 12, 3) == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert shards("zigzag", 9, 3) == [[0, 1, 8], [2, 3, 7], [4, 5, 6]]
    assert shards("zigzag", 3, 3) == [[0], [1], [2]]
    assert shards("striped", 12, 3) == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert shards("multizigzag", 12, 3) == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert shards("multizigzag", 12, 2) == [[0, 1, 6, 7, 8, 9], [2, 3, 4, 5, 10, 11]]
    assert shards("striped", 9, 3) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]], "3 has no divisor 2"


def test_tiles_are_the_largest_divisor():
    assert [layout.tile_size(shard) for shard in (1, 100, 128, 257, 4096, 384, 250)] == [
        1, 100, 128, 1, 128, 128, 125,
    ]  # fmt: skip


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shards", [1, 2, 3, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_window_reaches_what_it_sees(monkeypatch, name, shards, tile):
    """All shards between the first and the last that any token sees, and none beyond those."""
    monkeypatch.setattr(layout, "TILE", tile)
    length = 8 * shards
    owner_T = np.empty(length, int)
    owner_T[layout.order(name, length, shards)] = np.arange(length) // 8
    for window in range(1, length + 2):
        seen = {
            (owner_T[t] - owner_T[s]) % shards
            for t in range(length)
            for s in range(max(0, t - window + 1), t + 1)
        }
        before, after = layout.reach(name, length, shards, window)
        reached = {*range(before + 1), *range(shards - after, shards)}
        assert seen <= reached and {before, (shards - after) % shards} <= seen
        gap = max(np.diff([*sorted(seen), shards]))
        assert len(reached) == shards + 1 - gap, "the widest gap is left out"


def test_a_window_ends_the_round_early():
    """Of 8 shards of 8 tokens, a window of 9 needs the one before, a window of 10 two."""
    reach = {w: layout.reach("contiguous", 64, 8, w) for w in (1, 2, 9, 10, 58, 1000)}
    assert reach == {1: (0, 0), 2: (1, 0), 9: (1, 0), 10: (2, 0), 58: (7, 0), 1000: (7, 0)}
    assert layout.reach("zigzag", 2**20, 128, 4096) == (1, 1)
    assert layout.reach("striped", 2**20, 128, 4096) == (32, 0)
