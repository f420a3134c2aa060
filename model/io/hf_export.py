"""Our parameters as a checkpoint's tensors: from a bundle's step into safetensors files.

What is read at once is one piece as it is stored: a layer in an imported bundle, all layers of a
parameter in a trained one. It goes into the files at once, each tensor to its place.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from core.lazy import StoredArray
from core.storage.files import write_text
from model.families.tensor import Tensor
from model.io.checkpoint_files import INDEX, WHOLE
from model.io.hf_import import Done
from model.io.safetensors import TensorWriter


def shard(tensors: list[Tensor], dtype: np.dtype, limit: float) -> list[list[Tensor]]:
    """The tensors in order, cut into files of at most `limit` bytes (or one tensor)."""
    shards: list[list[Tensor]] = []
    size = limit + 1
    for tensor in tensors:
        num_bytes = int(np.prod(tensor.layout.shape)) * dtype.itemsize
        if size + num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += num_bytes
    return shards


def groups(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of the same parameters together, by layer."""
    found: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.params, []).append(tensor)
    return [sorted(group, key=lambda tensor: tensor.layer or 0) for group in found.values()]


def save(
    step: Path, tensors: list[Tensor], directory: Path, dtype: np.dtype, limit: float, done: Done
) -> None:
    """Writes model.safetensors, or shards and their index."""
    shards = shard(tensors, dtype, limit)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = [WHOLE] if count == 1 else names
    writers = {}
    for name, held in zip(names, shards, strict=True):
        writer = TensorWriter(directory / name, {t.name: t.layout.shape for t in held}, dtype)
        writers.update({tensor.name: writer for tensor in held})
    for group in groups(tensors):
        for tensor, values in joined(step, group):
            writers[tensor.name].write(tensor.name, values)
            done(tensor.name)
            del values
    for writer in dict.fromkeys(writers.values()):
        writer.close()
    if count > 1:
        total = sum(int(np.prod(t.layout.shape)) for t in tensors) * dtype.itemsize
        weights = {t.name: n for n, held in zip(names, shards, strict=True) for t in held}
        index = {"metadata": {"total_size": total}, "weight_map": weights}
        write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")


def joined(step: Path, group: list[Tensor]) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Each tensor with its values; all of the group hold the same parameters."""
    stores = [StoredArray(step / "model", name) for name in group[0].params]
    if group[0].layer is None:
        (tensor,) = group
        yield tensor, tensor.layout.join(*(store.read() for store in stores))
        return
    at_once = max(store.rows_at_once for store in stores)
    for first in range(0, len(group), at_once):
        some = group[first : first + at_once]
        values = [store.read(first, first + len(some)) for store in stores]
        for i, tensor in enumerate(some):
            yield tensor, tensor.layout.join(*(value[i] for value in values))
        del values  # before the next layers are read
