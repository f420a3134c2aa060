"""Tokens on disk: flat shards, where each document ends, and a manifest that says it all.

    manifest.json        totals, tokenizer, sha256 of every file below
    train-00000.bin      uint16 or uint32 tokens, documents one after the other
    train-00000.idx      two uint64 for each document: the token where it ends, counted in the
                         shard, and the bytes of its text
    train-00000.names    one JSON string for each document: where it came from

`TokenStore` reads a split as one long array; `ShardWriter` makes it. A document is text between a
first token, which no model has to predict, and the end token. The first one is bos, or the end
token where the tokenizer has no bos: so every token of the text has one before it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from core.config import UserError

FORMAT = 2  # 1 had no bytes of each document, and no first token where there is no bos
MANIFEST = "manifest.json"
AGAIN = "run python -m data.prepare --config=... again"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes the shards of one split; a file gets its name only when it is complete."""

    def __init__(
        self, directory: str | os.PathLike, split: str, dtype: np.dtype, shard_tokens: int
    ):
        self._directory, self._split = Path(directory), split
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self._shards = []
        self._num_bytes = 0  # of all shards
        self._begin()

    def _begin(self) -> None:
        self._path = self._directory / f"{self._split}-{len(self._shards):05d}.bin"
        self._index, self._names, self._num_tokens = [], [], 0
        self._hash, self._file = hashlib.sha256(), None

    def add(self, name: str, tokens: np.ndarray, num_bytes: int) -> None:
        """Appends a document: `tokens` with its first and its end token, `num_bytes` of text."""
        if self._num_tokens and self._num_tokens + len(tokens) > self._shard_tokens:
            self._finish_shard()
        if self._file is None:
            self._file = open(partial(self._path), "wb")  # noqa: SIM115, closed with the shard
        assert tokens.min() >= 0 and tokens.max() <= np.iinfo(self._dtype).max, name
        content = tokens.astype(self._dtype).tobytes()
        self._file.write(content)
        self._hash.update(content)
        self._num_tokens += len(tokens)
        self._num_bytes += num_bytes
        self._index.append((self._num_tokens, num_bytes))
        self._names.append(json.dumps(name) + "\n")

    def close(self) -> dict[str, Any]:
        """Writes what is left; returns the manifest's entry for this split."""
        if self._file is not None:
            self._finish_shard()
        return dict(
            documents=sum(shard["documents"] for shard in self._shards),
            tokens=sum(shard["tokens"] for shard in self._shards),
            bytes=self._num_bytes,
            shards=self._shards,
        )

    def _finish_shard(self) -> None:
        self._file.close()
        partial(self._path).replace(self._path)
        hashes = {"bin": self._hash.hexdigest()}
        names = "".join(self._names).encode()
        for suffix, content in (("idx", np.array(self._index, "<u8").tobytes()), ("names", names)):
            write_file(self._path.with_suffix(f".{suffix}"), content)
            hashes[suffix] = hashlib.sha256(content).hexdigest()
        sizes = dict(documents=len(self._index), tokens=self._num_tokens)
        self._shards.append(dict(name=self._path.stem, **sizes, sha256=hashes))
        self._begin()


def partial(path: Path) -> Path:
    """The name of a file while it is being written."""
    return path.with_name(path.name + ".partial")


def write_file(path: Path, content: bytes) -> None:
    """Writes under a temporary name, then renames: no reader ever sees half a file."""
    partial(path).write_bytes(content)
    partial(path).replace(path)


def write_manifest(directory: str | os.PathLike, manifest: dict[str, Any]) -> None:
    """Writes `manifest` with the format version."""
    text = json.dumps({"format": FORMAT, **manifest}, indent=2) + "\n"
    write_file(Path(directory, MANIFEST), text.encode())


def read_manifest(directory: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a prepared directory. UserError when there is none or it is not ours."""
    path = Path(directory, MANIFEST)
    remedy = "run python -m data.prepare --config=... first"
    if not path.is_file():
        raise UserError(f"there is no prepared data at {directory}: {remedy}")
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: {remedy.replace('first', 'again')}") from None
    if version != FORMAT:
        raise UserError(
            f"{path} has format {version}, but this code reads {FORMAT}: "
            f"{remedy.replace('first', 'again')}"
        )
    return manifest


class TokenStore:
    """One split as one array: `len(store)` tokens, `store[a:b]` read across shards.

    `starts` is int64 [D + 1]: where each document begins, and the end of the last one.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        self.directory, self.manifest = Path(directory), read_manifest(directory)
        if split not in self.manifest["splits"]:
            raise UserError(f"{directory} has {', '.join(self.manifest['splits'])}, not {split!r}")
        self.split = split
        self.num_bytes = self.manifest["splits"][split]["bytes"]
        self.vocab_size = self.manifest["vocab_size"]
        self._dtype = np.dtype(self.manifest["dtype"])
        self._shards = self.manifest["splits"][split]["shards"]
        self._check_sizes()
        self._bins = [np.memmap(self._path(s, "bin"), self._dtype, "r") for s in self._shards]
        self._edges = np.cumsum([0] + [shard["tokens"] for shard in self._shards])
        ends = [self._index(shard)[:, 0] for shard in self._shards]
        parts = [e + edge for e, edge in zip(ends, self._edges, strict=False)]
        self.starts = np.concatenate([[0], *parts])

    def _path(self, shard: dict[str, Any], suffix: str) -> Path:
        return self.directory / f"{shard['name']}.{suffix}"

    def _check_sizes(self) -> None:
        for shard in self._shards:
            sizes = {"bin": shard["tokens"] * self._dtype.itemsize, "idx": shard["documents"] * 16}
            for suffix, expected in sizes.items():
                path = self._path(shard, suffix)
                size = path.stat().st_size if path.is_file() else None
                if size != expected:
                    found = "is missing" if size is None else f"has {size:,} bytes"
                    raise UserError(
                        f"{path} {found}, but its manifest says {expected:,} bytes: {AGAIN}"
                    )

    def _index(self, shard: dict[str, Any]) -> np.ndarray:
        """int64 [D, 2] of a shard: where each document ends, and the bytes of its text."""
        path = self._path(shard, "idx")
        index = np.fromfile(path, "<u8").astype(np.int64).reshape(-1, 2)
        sizes = np.diff(index[:, 0], prepend=0)
        # Positions count in a document, as int32.
        if (sizes <= 0).any() or sizes.sum() != shard["tokens"] or sizes.max() >= 2**31:
            raise UserError(
                f"{path} does not cut the {shard['tokens']:,} tokens of its shard into documents "
                f"of up to 2^31: {AGAIN}"
            )
        return index

    def verify(self) -> None:
        """Reads every file and compares its sha256; UserError names the first that differs."""
        for shard in self._shards:
            for suffix, expected in shard["sha256"].items():
                path = self._path(shard, suffix)
                with open(path, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != expected:
                    raise UserError(
                        f"{path} was changed: its sha256 is {found[:16]}..., the manifest says "
                        f"{expected[:16]}...; {AGAIN}"
                    )

    def digest(self) -> str:
        """Returns what tells this split from others: a sha256 over its tokens and documents.

        It comes from the manifest, so it costs nothing. Names of files count for nothing.
        """
        told = [[s["tokens"], s["sha256"]["bin"], s["sha256"]["idx"]] for s in self._shards]
        return hashlib.sha256(json.dumps([self._dtype.str, told]).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        """The tokens of `span` (step 1), as they are stored: uint16 or uint32.

        UserError on one that is not in the vocabulary: an embedding has no row for it, and JAX
        would take the last one.
        """
        start, stop, step = span.indices(len(self))
        assert step == 1, span
        first, last = np.searchsorted(self._edges, [start, stop], "right") - 1
        parts = [
            self._bins[i][max(0, start - self._edges[i]) : max(0, stop - self._edges[i])]
            for i in range(first, min(last + 1, len(self._bins)))
        ]
        tokens = np.concatenate(parts) if parts else np.zeros(0, self._dtype)
        if tokens.size and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{self.directory}: the {self.split} tokens {start:,} to {stop:,} hold "
                f"{tokens.max()}, but manifest.json says vocab_size={self.vocab_size}: {AGAIN}"
            )
        return tokens

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    def document_bytes(self) -> np.ndarray:
        """int64 [D], bytes of each document's text; read from disk at each call."""
        parts = [self._index(shard)[:, 1] for shard in self._shards]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def names(self) -> list[str]:
        """Returns the source of each document; read from disk at each call."""
        texts = [self._path(shard, "names").read_text("utf-8") for shard in self._shards]
        return [json.loads(line) for text in texts for line in text.splitlines()]
