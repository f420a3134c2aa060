"""Documents from files: whole files, or the rows of jsonl and parquet, all also as .gz.

for document in files(("books/**/*.txt", "rows.jsonl.gz"), text_field="text"): ...
"""

import glob
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from core.config import UserError
from core.storage import json_lines
from data.texts.document import Document, field_bytes

PLAIN = (".txt", ".md", ".py")
ROWS = (".jsonl", ".parquet")
BROKEN = (OSError, EOFError, zlib.error)  # what reading a file, or a .gz, raises


def files(globs: Iterable[str], text_field: str) -> Iterator[Document]:
    """The files that the globs match, in order: one document each, or one for each row.

    UserError that names the glob, the file, or the row and the field at fault.
    """
    readers = {".jsonl": _jsonl, ".parquet": _parquet}
    for path in matches(globs):
        kind = Path(path.name.lower().removesuffix(".gz")).suffix
        if kind in readers:
            yield from readers[kind](path, text_field)
        elif kind in PLAIN:
            yield Document(str(path), read(path))
        else:
            raise UserError(
                f"data.files: {path} is of no known kind; use {' '.join(PLAIN + ROWS)} "
                "or one of these with .gz, or narrow the glob"
            )


def matches(globs: Iterable[str], field: str = "data.files") -> list[Path]:
    """The files that the globs of `field` match, each once, in order.

    UserError where a glob matches none, a link that leads nowhere, a pipe or a device.
    """
    return list(dict.fromkeys(path for pattern in globs for path in _matches(pattern, field)))


def _matches(pattern: str, field: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise UserError(f"{field}: {pattern} is a folder; say which files: {pattern}/**/*.txt")
    # A name that exists is meant literally, even when it holds a bracket.
    found = [pattern]
    if not os.path.lexists(pattern):
        found = sorted(glob.glob(pattern, recursive=True))
    paths = [Path(name) for name in found if not os.path.isdir(name)]
    for path in paths:
        if not os.path.isfile(path):
            is_link = os.path.islink(path) and not os.path.exists(path)
            what = "a link that leads nowhere" if is_link else "no file, but a pipe or a device"
            raise UserError(f"{field}: {path} is {what}; remove it, or narrow the glob")
    if not paths:
        several = ""
        if "," in pattern:
            several = "; a path that holds a comma is written as a literal: \"('a, b.txt',)\""
        raise UserError(
            f"{field}: {pattern} matches no file; check the path (from {os.getcwd()}){several}"
        )
    return paths


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def read(path: Path) -> bytes:
    """All bytes of a file, unpacked if it is a .gz. UserError when it cannot be read."""
    try:
        with _open(path) as file:
            return file.read()
    except BROKEN as error:
        raise UserError(f"data: {path} cannot be read: {error}") from None


def _jsonl(path: Path, field: str) -> Iterator[Document]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():  # a blank line is no document
                    yield Document(f"{path}:{number}", _row(path, number, line, field))
    except BROKEN as error:
        raise UserError(f"data: {path} cannot be read: {error}") from None


def _row(path: Path, number: int, line: bytes, field: str) -> bytes:
    try:
        row = json_lines.parse(line, lenient=True)
    except UnicodeDecodeError:
        return line  # curation counts it as undecodable
    except ValueError as error:
        raise UserError(f"data: {path} line {number}: {error}") from None
    if not isinstance(row, dict) or field not in row:
        has = f"it has {', '.join(row)}" if isinstance(row, dict) else "it is not an object"
        raise UserError(
            f"data: {path} line {number} has no field {field!r} ({has}); set data.text_field"
        )
    return field_bytes(row[field], f"{path} line {number}", field)


def _parquet(path: Path, field: str) -> Iterator[Document]:
    number = 0
    try:
        with _open(path) as file, pyarrow.parquet.ParquetFile(file) as table:
            if field not in table.schema_arrow.names:
                has = ", ".join(table.schema_arrow.names)
                raise UserError(
                    f"data: {path} has no column {field!r} (it has {has}); set data.text_field"
                )
            for batch in table.iter_batches(columns=[field]):
                for value in _bytes(batch.column(0)).to_pylist():
                    number += 1
                    raw = field_bytes(value, f"{path} row {number}", field)
                    yield Document(f"{path}:{number}", raw)
    except (*BROKEN, pyarrow.ArrowException) as error:
        raise UserError(f"data: {path} cannot be read after row {number}: {error}") from None


def _bytes(column: pyarrow.Array) -> pyarrow.Array:
    """A column of strings as bytes: curation judges whether they are UTF-8, as pyarrow does not."""
    if isinstance(column, pyarrow.DictionaryArray):
        column = column.dictionary_decode()
    is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    return column.cast(pyarrow.large_binary()) if is_text else column
