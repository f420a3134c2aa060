"""Lazy leaves: saved one part at a time, restored as any other, read in slices."""

import gc
import weakref

import jax
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding, PartitionSpec

from core import checkpoint, lazy
from core.checkpoint import Bundle
from core.lazy import StoredArray, StreamedArray


class Alive(np.ndarray):
    """An array that can be watched."""


def save(path, leaves):
    checkpoint.create(path, '{"name": "x"}', None)
    bundle = Bundle(path, lazily=True)
    bundle.save(0, {"model": leaves}, {"row": 1})
    bundle.close()
    return path


def values():
    random = np.random.default_rng(0)
    return {
        "stacked": random.standard_normal((3, 10, 4), np.float32),
        "whole": random.standard_normal((10, 4), np.float32).astype("bfloat16"),
        "vectors": random.standard_normal((3, 4), np.float32),
    }


def leaf(array, stacked):
    parts = enumerate(array) if stacked else [(None, array)]
    return StreamedArray(array.shape, array.dtype, lambda: iter(parts))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(lazy, "CHUNK", 48)  # three rows of four float32


def test_opens_on_a_mesh_as_any_other(tmp_path, small_chunks):
    arrays = values()
    save(tmp_path / "run", {name: leaf(x, name != "whole") for name, x in arrays.items()})
    specs = {
        "stacked": PartitionSpec(None, "data", "model"),
        "whole": PartitionSpec("data", ("seq", "model")),
        "vectors": PartitionSpec(None, "model"),
    }
    mesh = make_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        abstract = {
            name: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh.abstract_mesh, specs[name])
            )
            for name, x in arrays.items()
        }
        bundle = Bundle(tmp_path / "run")
        restored = bundle.restore(bundle.choose(), model=abstract)
        bundle.close()
    assert restored["data"] == {"row": 1}
    for name, array in arrays.items():
        assert restored["model"][name].sharding == NamedSharding(mesh, specs[name])
        assert restored["model"][name].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(restored["model"][name]), array)


def test_one_part_is_alive_at_a_time(tmp_path):
    made_before, alive = [], []

    def parts(layers):
        for layer in layers:
            gc.collect(1)  # the young: all of them take seconds late in a session
            alive.append(sum(array() is not None for array in made_before))
            array = np.full((10, 4), layer or 0, np.float32).view(Alive)
            made_before.append(weakref.ref(array))
            # A view with a base, as a transposed weight is.
            yield layer, array.T.T
            del array

    def made(shape, layers):
        return StreamedArray(shape, np.dtype(np.float32), lambda: parts(layers))

    leaves = {
        "a": made((5, 10, 4), range(5)),
        "b": made((10, 4), [None]),
        "c": made((3, 10, 4), range(3)),
    }
    save(tmp_path / "run", leaves)
    assert alive == [0] * 9


@pytest.mark.parametrize("chunked", [True, False])
def test_reads_rows(tmp_path, monkeypatch, chunked):
    if chunked:
        monkeypatch.setattr(lazy, "CHUNK", 48)
    arrays = values()
    save(tmp_path / "run", {name: leaf(x, name != "whole") for name, x in arrays.items()})
    for name, array in arrays.items():
        stored = StoredArray(tmp_path / "run" / "0" / "model", name)
        assert stored.shape == array.shape
        np.testing.assert_array_equal(stored.read(), array)
        np.testing.assert_array_equal(stored.read(1, 3), array[1:3])
        assert stored.read().dtype == array.dtype
    assert StoredArray(tmp_path / "run" / "0" / "model", "stacked").rows_at_once == 1


def test_reads_what_was_saved_from_a_mesh(tmp_path):
    """Arrays of a training run are stored by shard, all layers of one together."""
    checkpoint.create(tmp_path / "run", '{"name": "x"}', None)
    array = np.arange(3 * 8 * 4, dtype=np.float32).reshape(3, 8, 4)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        bundle = Bundle(tmp_path / "run")
        placed = jax.device_put(array, PartitionSpec(None, ("data", "seq"), "model"))
        bundle.save(5, {"model": {"x": placed}}, {})
        bundle.close()
    stored = StoredArray(tmp_path / "run" / "5" / "model", "x")
    assert stored.rows_at_once == 3
    np.testing.assert_array_equal(stored.read(), array)
    np.testing.assert_array_equal(stored.read(1, 2), array[1:2])


def test_a_part_that_fails_ends_the_save(tmp_path):
    def parts():
        yield 0, np.zeros((10, 4), np.float32)
        raise RuntimeError("the disk went away")

    failing = StreamedArray((2, 10, 4), np.dtype(np.float32), parts)
    with pytest.raises(RuntimeError, match="the disk went away"):
        save(tmp_path / "run", {"x": failing})
    assert not Bundle(tmp_path / "run").is_complete(0)
