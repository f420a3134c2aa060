"""Arrays of a checkpoint that are made while they are saved, and read piece by piece.

    leaf = StreamedArray((22, 2048, 5632), dtype, lambda: ((i, layer(i)) for i in range(22)))
    Bundle(path, lazily=True).save(0, {"model": {"mlp.up_DF": leaf}}, {})

A leaf is never whole: one part of one leaf is alive at a time. It is restored as any other.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

CHUNK = 1 << 25  # bytes stored as one piece, at most


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array to be saved. `parts` gives (layer, values), or (None, values) of the whole."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterator[tuple[int | None, np.ndarray]]]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class _Handler(ocp.type_handlers.NumpyHandler):
    """Saves StreamedArray leaves as Orbax saves NumPy's arrays, but one part after the other."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(self, values, infos, args=None):
        for each in zip(values, infos, args, strict=True):  # all at once are Orbax's way
            await super()._background_serialize(*([one] for one in each))

    async def _open_and_write(self, value: StreamedArray, tspec: dict[str, Any], ts_context):
        for layer, values in value.parts():
            if layer in (None, 0):
                stacked = () if layer is None else (1,)
                tspec["metadata"]["chunks"] = [*stacked, *chunk(values.shape, value.dtype)]
                store = await tensorstore.open(
                    tensorstore.Spec(tspec), create=True, open=True, context=ts_context
                )
            target = store if layer is None else store[layer]
            for rows in row_blocks(values.shape, value.dtype):
                block = values[rows].astype(value.dtype, copy=False)
                await target[rows].write(block, can_reference_source_data_indefinitely=True)
                del block
            del values  # before the next part is made


def handler() -> ocp.PyTreeCheckpointHandler:
    """Returns the handler that saves pytrees of StreamedArray leaves."""
    usual = ocp.type_handlers.get_type_handler(jax.Array)  # Orbax warns if there is none
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, usual), (StreamedArray, _Handler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def chunk(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The piece of an array that is stored as one: whole rows, up to CHUNK bytes."""
    row = math.prod(shape[1:]) * dtype.itemsize
    return (min(shape[0], max(1, CHUNK // row)), *shape[1:])


def row_blocks(shape: tuple[int, ...], dtype: np.dtype) -> list[slice]:
    """The rows of each chunk."""
    step = chunk(shape, dtype)[0]
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]


class StoredArray:
    """A saved array, to be read in parts; `directory` is an item of a step."""

    def __init__(self, directory: Path, name: str):
        base = {"driver": "file", "path": f"{directory}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": kvstore}
        self._store = tensorstore.open(spec, open=True, read=True).result()
        self.shape = self._store.shape

    @property
    def rows_at_once(self) -> int:
        """Rows of the first dim that are stored together: to read fewer decodes them twice."""
        return self._store.chunk_layout.read_chunk.shape[0]

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows `first` to `last` of the first dim; little more than the result is in memory."""
        store = self._store[first:last].translate_to[0]
        values = np.empty(store.shape, store.dtype.numpy_dtype)
        dim = 1 if store.rank > 1 and len(values) <= self.rows_at_once else 0
        step = self._store.chunk_layout.read_chunk.shape[dim]
        for i in range(0, store.shape[dim], step):
            block = (slice(None),) * dim + (slice(i, min(i + step, store.shape[dim])),)
            values[block] = store[block].read().result()
        return values
