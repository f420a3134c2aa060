"""A ring over a box of chips goes from neighbour to neighbour."""

import itertools

import numpy as np
import pytest

from core.compile.torus import ring


def steps(places, order):
    """How far each is from the one before; the last number is the way home."""
    path = np.array([places[i] for i in order])
    return np.abs(np.roll(path, -1, axis=0) - path).sum(1)


@pytest.mark.parametrize(
    "sides",
    [(2, 2), (4, 4), (3, 4), (8, 3, 1), (16, 16), (4, 4, 8), (3, 5, 2), (1, 2, 3), (2, 2, 2)],
)
def test_each_is_beside_the_next(sides):
    places = list(itertools.product(*map(range, sides)))
    order = ring(places)
    assert sorted(order) == list(range(len(places)))
    assert (steps(places, order) == 1).all()


def test_every_other_place_of_a_side():
    """As where a mesh axis takes a part of a physical one."""
    places = list(itertools.product(range(0, 8, 2), range(4)))
    assert set(steps(places, ring(places))) == {1, 2}


def test_odd_sides_are_a_path():
    places = list(itertools.product(range(3), range(5)))
    assert (steps(places, ring(places))[:-1] == 1).all()


def test_lines_and_what_is_no_box_stay():
    line, corner = [(i, 0) for i in range(8)], [(0, 0), (0, 1), (1, 0)]
    assert ring(line) == list(range(8)) and ring(corner) == [0, 1, 2]
