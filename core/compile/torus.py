"""The order of chips on a torus in which a ring of sends crosses one link at a time.

    order = ring([device.coords for device in devices])     # devices[order[i + 1]] is beside [i]

Row by row, as meshes are made, a ring goes from the end of a row to the start of the next. On a v5e
of 64 chips or more libtpu then makes every send of the ring wait; where each goes to a neighbour,
it works meanwhile (docs/performance.md).
"""

import math
from collections.abc import Sequence

Place = tuple[int, ...]


def ring(places: Sequence[Place]) -> list[int]:
    """Indices of places, such that each is beside the one before, and the last beside the first.

    For boxes of which a side is even, and another longer than 1: if none is even, the last is away
    from the first. What is a line, or no box, stays as it is.
    """
    sides = [sorted(set(values)) for values in zip(*places, strict=True)]
    num_long = sum(len(side) > 1 for side in sides)
    if num_long < 2 or math.prod(map(len, sides)) != len(places):
        return list(range(len(places)))
    axes = sorted(range(len(sides)), key=lambda axis: len(sides[axis]) % 2)  # even sides first
    index = {tuple(place[axis] for axis in axes): i for i, place in enumerate(places)}
    even, *others = (sides[axis] for axis in axes)
    path = _path([even, *others])
    if len(even) % 2 == 0:
        # Out along the even side; back through all else, forth and back at each of its places.
        start, *rest = _path(others)
        path = [(y, *start) for y in even]
        for i, y in enumerate(reversed(even)):
            path += [(y, *place) for place in (rest if i % 2 == 0 else rest[::-1])]
    return [index[place] for place in path]


def _path(sides: list[list[int]]) -> list[Place]:
    """All places of a box, each beside the one before."""
    if not sides:
        return [()]
    first, *others = sides
    inner = _path(others)
    return [
        (value, *place)
        for i, value in enumerate(first)
        for place in (inner if i % 2 == 0 else inner[::-1])
    ]
