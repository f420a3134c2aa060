"""The order of a row's tokens over the shards of its length: which shard has which token.

    order = layout.order("striped", length=32768, shards=8)     # tokens[order] goes to the mesh
    before, after = layout.reach("zigzag", 32768, 8, window=1024)     # (1, 1)

Attention is a function of positions, so any order gives the same numbers. `contiguous` leaves the
last shards of a causal row with most of the work; `zigzag` pairs first with last, which is right
for one document a row; the other two deal out tiles, which is right for packed documents too.
"""

import itertools

import numpy as np

from core.sharding import Layout

TILE = 128  # tokens: the smallest tile for which kernels decide whether to visit it


def order(layout: Layout, length: int, shards: int) -> np.ndarray:
    """order[new place] = old place, int [length]; shards keep the order of their tokens."""
    return np.argsort(owner(layout, length, shards), kind="stable")


def owner(layout: Layout, length: int, shards: int) -> np.ndarray:
    """The shard of each place of the row, int [length].

    Tiles have 128 tokens, or as many as the largest divisor of a shard below that.
    """
    place = np.arange(length)
    size = length // shards
    tile = tile_size(size)
    if layout == "zigzag":  # 2P pieces: shard i has i and 2P - 1 - i, of an odd size the middle too
        front = size - size // 2
        behind = place - front * shards
        return np.where(behind < 0, place // front, shards - 1 - behind // max(1, size - front))
    if layout == "striped":  # tile t to shard t mod P
        return place // tile % shards
    if layout == "multizigzag":  # the same, but every other round of P tiles goes back
        turn, there = np.divmod(place // tile, shards)
        return np.where(turn % 2, shards - 1 - there, there)
    return place // size


def tile_size(shard: int) -> int:
    """The largest divisor of a shard's tokens up to TILE."""
    return max(tile for tile in range(1, min(shard, TILE) + 1) if shard % tile == 0)


def reach(layout: Layout, length: int, shards: int, window: int) -> tuple[int, int]:
    """Returns the number of shards before and after its own that hold what a token may see.

    It sees so many tokens back, itself included.
    """
    owner_T = owner(layout, length, shards)
    begin = np.flatnonzero(np.diff(owner_T, prepend=-1))  # pieces that lie together
    end, shard = np.append(begin[1:], length), owner_T[begin]
    seen = {0}  # the own shard minus the one that is seen, on the ring
    for apart in range(1, len(begin)):
        is_near = begin[apart:] - (end[:-apart] - 1) < window
        if not is_near.any():
            break
        seen.update(((shard[apart:] - shard[:-apart]) % shards)[is_near].tolist())
    # What is left out is the widest gap in the ring, the last of those.
    seen = [*sorted(seen), shards]
    _, before, after = max((b - a, a, shards - b) for a, b in itertools.pairwise(seen))
    return before, after
