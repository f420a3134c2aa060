"""Batches of a token store: shuffled and endless to train, in order and once to validate.

    batches = train_batches(store, batch_size=8, length=4096, seed=0)
    batch = next(batches)                  # a Batch of [8, 4096]
    state = batches.get_state()            # {"global_next_index": 8}, the same on every process
    batches.set_state(state)               # the next batch is the same again

The state counts rows of one `length` and one `seed`: resume with the same two. The number of
processes may differ: process p of P holds rows p, p + P, ... of each global batch.
"""

from collections.abc import Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from grain.experimental import ElasticIterator

from core.config import UserError
from data.batch import Batch, cut, stack
from data.store import TokenStore


class Windows:
    """Random access to the full rows of a store: `windows[i]` is a Batch of [length]."""

    def __init__(self, store: TokenStore, length: int, order: np.ndarray | None = None):
        self.store, self.length, self.order = store, length, order
        self._num_rows = (len(store) - 1) // length  # the last token is only ever a target
        if self._num_rows < 1:
            raise UserError(
                f"{store.directory} has {len(store):,} {store.split} tokens, but one row of "
                f"train.length={length:,} needs {length + 1:,}: use more text or a train.length "
                f"of at most {len(store) - 1:,}"
            )

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> Batch:
        return cut(self.store, row, self.length, self.order)


def train_batches(
    store: TokenStore,
    batch_size: int,
    length: int,
    seed: int,
    process_index: int | None = None,
    process_count: int | None = None,
    order: np.ndarray | None = None,
) -> ElasticIterator:
    """Endless Batches of numpy [batch_size / process_count, length]; each epoch in a new order.

    `batch_size` counts the rows of all processes. Index and count are JAX's own by default.
    `order` is that of the tokens in each row (core/layout.py).
    """
    windows = Windows(store, length, order)
    index, count = _process(batch_size, process_index, process_count)
    return ElasticIterator(
        row_order(len(windows), seed).map(windows.__getitem__),
        global_batch_size=batch_size,
        shard_options=grain.sharding.ShardOptions(shard_index=index, shard_count=count),
        # One thread reads a memory map fastest: 16, the default, is half as quick.
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=8),
    )


def row_order(num_rows: int, seed: int) -> grain.MapDataset:
    """Which row comes at place 0, 1, 2, ...: a new permutation of all rows each epoch."""
    return grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat(None)


def rows_before(
    state: Mapping[str, int], store: TokenStore, batch_size: int, length: int, seed: int
) -> list[int]:
    """The rows of the global batch that led to `state`, in the order they were taken."""
    order = row_order(len(Windows(store, length)), seed)
    stop = state["global_next_index"]
    return [int(order[place]) for place in range(stop - batch_size, stop)]


def documents_of(store: TokenStore, rows: Sequence[int], length: int) -> list[list[str]]:
    """For each row the names of the documents in it, to say where a loss went wrong."""
    names = store.names()
    spans = []
    for row in rows:
        stop = min((row + 1) * length, len(store))
        first = np.searchsorted(store.starts, row * length, "right") - 1
        spans.append(names[first : np.searchsorted(store.starts, stop, "left")])
    return spans


class Validation(Sequence):
    """Batches that hold every token of a store once as a token, so that sums are exact.

    The sum of weights * nll over all batches is that of all documents: of every token but the
    first, which is bos if the tokenizer has one.
    The tail is padding: segment 0, weight 0. Every process has the same number of batches.
    """

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        length: int,
        index: int,
        count: int,
        order: np.ndarray | None = None,
    ):
        self._store, self._batch_size, self._length = store, batch_size, length
        self._index, self._count, self._order = index, count, order

    def __len__(self) -> int:
        return -(-len(self._store) // (self._length * self._batch_size))

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start = i * self._batch_size
        rows = range(start + self._index, start + self._batch_size, self._count)
        return stack([cut(self._store, row, self._length, self._order) for row in rows])

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))


def validation_batches(
    store: TokenStore,
    batch_size: int,
    length: int,
    process_index: int | None = None,
    process_count: int | None = None,
    order: np.ndarray | None = None,
) -> Validation:
    """A sequence of Batches of numpy [batch_size / process_count, length], in order.

    `order` is that of the tokens in each row (core/layout.py).
    """
    return Validation(
        store, batch_size, length, *_process(batch_size, process_index, process_count), order
    )


def _process(batch_size: int, index: int | None, count: int | None) -> tuple[int, int]:
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if batch_size % count:
        raise UserError(
            f"train.batch_size={batch_size} does not divide into {count} processes: "
            f"set it to a multiple of {count}"
        )
    return index, count
