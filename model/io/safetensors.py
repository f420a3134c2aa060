"""The safetensors format, tensor by tensor: no file is ever in memory, mapped or not.

    entries = header(path)                      # {name: Entry}, the file checked
    values = read(entries["model.norm.weight"])

A file is the length of its header (8 bytes), the header (JSON) and the values, end to end. The
library maps the whole file to read it, and takes all tensors at once to write it.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from core.config import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 1 << 24  # bytes made contiguous or compared at once
MAX_HEADER = 100_000_000  # the library's own limit
METADATA = "__metadata__"


class Entry(NamedTuple):
    """The place of a tensor in its file. `code` may be a dtype that we do not read."""

    path: Path
    name: str
    code: str
    shape: tuple[int, ...]
    begin: int  # in the file
    end: int


def header(path: Path) -> dict[str, Entry]:
    """All tensors of a file; UserError names the file, and the tensor that is cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise UserError(
                f"{path} of {size} bytes ends within its header: it is truncated, or is no "
                "safetensors file; get it again"
            )
        try:
            table = json.loads(file.read(length))
            table.pop(METADATA, None)
            entries = {name: _entry(path, 8 + length, name, row) for name, row in table.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} has a header that cannot be read: {error!r}") from None
    _check(path, size, 8 + length, sorted(entries.values(), key=lambda entry: entry.begin))
    return entries


def _entry(path: Path, start: int, name: str, row: dict[str, Any]) -> Entry:
    begin, end = row["data_offsets"]
    return Entry(path, name, row["dtype"], tuple(row["shape"]), start + begin, start + end)


def _check(path: Path, size: int, start: int, entries: list[Entry]) -> None:
    for entry in entries:
        dtype = DTYPES.get(entry.code)
        num_bytes = math.prod(entry.shape) * dtype.itemsize if dtype else entry.end - entry.begin
        if entry.begin != start or entry.end - entry.begin != num_bytes:
            raise UserError(
                f"{path}: {entry.name} of {entry.code} {entry.shape} cannot be bytes "
                f"{entry.begin} to {entry.end} of the file: its header is damaged; get it again"
            )
        start = entry.end
    lost = [entry.name for entry in entries if entry.end > size]
    if lost:
        others = f" and the {len(lost) - 1} tensors after it" if len(lost) > 1 else ""
        raise UserError(
            f"{path} is truncated: it has {size} bytes of {start}, which cuts off "
            f"{lost[0]}{others}; get it again"
        )
    if size > start:
        raise UserError(f"{path} has {size} bytes, but its header tells of {start}; get it again")


def read(entry: Entry) -> np.ndarray:
    """The values of one tensor."""
    dtype = DTYPES[entry.code]
    count = math.prod(entry.shape)
    raw = np.fromfile(entry.path, f"u{dtype.itemsize}", count, offset=entry.begin)
    if raw.size != count:
        raise UserError(f"{entry.path} was cut short while it was read, in {entry.name}")
    return raw.view(dtype).reshape(entry.shape)


def same(one: Entry, other: Entry) -> bool:
    """Whether two tensors are equal bit for bit."""
    if (one.code, one.shape) != (other.code, other.shape):
        return False
    with one.path.open("rb") as a, other.path.open("rb") as b:
        a.seek(one.begin)
        b.seek(other.begin)
        left = one.end - one.begin
        while left:
            block = min(left, BLOCK)
            if a.read(block) != b.read(block):
                return False
            left -= block
    return True


class TensorWriter:
    """Writes one file, its tensors in any order. Close it: only then is the file whole."""

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype):
        self._dtype, self._missing, self._begin = dtype, dict(shapes), {}
        table, offset = {METADATA: {"format": "pt"}}, 0  # transformers asks for the format
        for name, shape in shapes.items():
            end = offset + math.prod(shape) * dtype.itemsize
            table[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
            self._begin[name], offset = offset, end
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)  # values are aligned
        self._start = 8 + len(text)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes one tensor, cast to the file's dtype, block by block."""
        assert values.shape == self._missing.pop(name), name
        self._file.seek(self._start + self._begin[name])
        for block in blocks(values):
            contiguous = np.ascontiguousarray(block, self._dtype)
            self._file.write(contiguous.view(np.uint8).data)

    def close(self) -> None:
        """Leaves a whole file on the disk."""
        assert not self._missing, f"not written: {sorted(self._missing)}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def blocks(values: np.ndarray):
    """Views of rows, at most BLOCK bytes each where a row is less."""
    if values.nbytes <= BLOCK:
        return [values]
    rows = max(1, BLOCK * len(values) // values.nbytes)
    return [values[i : i + rows] for i in range(0, len(values), rows)]
