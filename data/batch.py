"""Rows of training: cut from the stream of all documents, one after the other.

    row i of length T is w = stream[i*T : i*T + T + 1];  tokens = w[:-1], targets = w[1:]

No token is dropped: the last row of the stream is filled up with padding. Attention must stay
inside a segment. Positions are true even where a document began rows before; a model that has a
learned vector for each position asks for `restart`, and its positions stay below the length.
"""

import dataclasses

import jax
import numpy as np

from data.store import TokenStore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A pytree of five arrays [B, T] (or [T]: one row), of numpy or of JAX."""

    tokens: np.ndarray | jax.Array  # int32
    targets: np.ndarray | jax.Array  # int32, the next token
    weights: (
        np.ndarray | jax.Array
    )  # float32: 0 where the target is of another document, or padding
    positions: np.ndarray | jax.Array  # int32, in the whole document or, restarted, in the row
    segments: np.ndarray | jax.Array  # int32: 1, 2, ... for the documents of a row; 0 is padding


def cut(
    store: TokenStore,
    row: int,
    length: int,
    order: np.ndarray | None = None,
    restart: bool = False,
) -> Batch:
    """Returns row `row`, five arrays [length]; past the end of the stream it is padding.

    With an `order` the token of place `order[i]` stands at place i, in each of the five arrays.
    With `restart` the positions of a document that began rows before start again at 0.
    """
    start, stop = row * length, min(row * length + length, len(store))
    window = np.zeros(length + 1, np.int32)
    positions, segments = np.zeros((2, length), np.int32)
    weights = np.zeros(length, np.float32)
    if start < stop:
        window[: min(len(store) - start, length + 1)] = store[start : start + length + 1]
        # Documents first..last-1 touch [start, stop); `inner` is where all but the first begin.
        first = np.searchsorted(store.starts, start, "right") - 1
        last = np.searchsorted(store.starts, stop, "left")
        inner = store.starts[first + 1 : last]
        counts = np.diff(inner, prepend=start, append=stop)
        begins = np.repeat(store.starts[first:last], counts)
        if restart:
            begins = np.maximum(begins, start)
        positions[: stop - start] = np.arange(start, stop) - begins
        segments[: stop - start] = np.repeat(np.arange(1, last - first + 1), counts)
        weights[: stop - start] = 1
        weights[inner - 1 - start] = 0  # eos: the target is the bos of the next document
        if store.starts[last] == stop:
            weights[stop - 1 - start] = 0  # eos at the end of the row, or of the stream
    whole = Batch(window[:-1], window[1:], weights, positions, segments)
    return whole if order is None else jax.tree.map(lambda x: x[order], whole)


def stack(rows: list[Batch]) -> Batch:
    """One batch [B, T] of B rows [T]."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
