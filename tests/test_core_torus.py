"""A ring over a box of chips goes from neighbour to neighbour."""

import itertools

import numpy as np
import pytest

from core.aot import slice_devices
from core.sharding import MeshConfig, make_mesh
from core.torus import ring


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


@pytest.mark.usefixtures("compile_only")
@pytest.mark.parametrize(
    ("topology", "seq", "model"),
    [("v5e:16x16", 256, 1), ("v5p:4x4x8", 128, 1), ("v5p:4x4x8", 32, 2), ("tpu7x:2x2x2", 16, 1)],
)
def test_the_ring_of_a_mesh(topology, seq, model):
    mesh = make_mesh(MeshConfig(seq=seq, model=model), slice_devices(topology))
    assert len({(*d.coords, d.core_on_chip) for d in mesh.devices.flat}) == mesh.devices.size
    for devices in np.moveaxis(mesh.devices, 1, 2).reshape(-1, seq):
        places = [(*d.coords, d.core_on_chip) for d in devices]
        assert (steps(places, range(seq)) == 1).all()
