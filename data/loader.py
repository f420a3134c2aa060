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


class RowDataset:
    """Random access to the rows of a store that have a target: `windows[i]` is a Batch of [length].

    The last row may be shorter: it is filled up with padding.
    """

    def __init__(
        self,
        store: TokenStore,
        length: int,
        order: np.ndarray | None = None,
        restart: bool = False,
    ):
        self.store, self.length, self.order, self.restart = store, length, order, restart
        self._num_rows = -(-(len(store) - 1) // length)  # the last token is only ever a target
        if self._num_rows < 1:
            raise UserError(
                f"{store.directory} has {len(store)} {store.split} tokens, and one to train on "
                "needs another before it: prepare more text"
            )

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> Batch:
        return cut(self.store, row, self.length, self.order, self.restart)

    def summary(self) -> str:
        """Returns one line: the rows of an epoch, and how much of the last one is padding."""
        last = len(self.store) - (self._num_rows - 1) * self.length
        padding = max(0, self.length - last)
        rows = f"{self._num_rows:,} row{'s' * (self._num_rows != 1)} of {self.length:,}"
        filled = f", the last with {padding:,} of padding" if padding else ""
        return f"an epoch is {len(self.store):,} tokens in {rows}{filled}"


def train_batches(
    store: TokenStore,
    batch_size: int,
    length: int,
    seed: int,
    process_index: int | None = None,
    process_count: int | None = None,
    order: np.ndarray | None = None,
    restart: bool = False,
) -> ElasticIterator:
    """Endless Batches of numpy [batch_size / process_count, length]; each epoch in a new order.

    `batch_size` counts the rows of all processes. Index and count are JAX's own by default.
    `order` is that of the tokens in each row (core/layout.py), `restart` that of `batch.cut`.
    """
    windows = RowDataset(store, length, order, restart)
    index, count = _process(batch_size, process_index, process_count)
    return ElasticIterator(
        row_order(len(windows), seed).map(windows.__getitem__),
        global_batch_size=batch_size,
        shard_options=grain.sharding.ShardOptions(shard_index=index, shard_count=count),
        # One thread reads a memory map fastest: 16, the default, is half as quick.
        read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=8),
    )


def row_order(num_rows: int, seed: int) -> grain.MapDataset:
    """Returns the order of the rows: a new permutation of all rows each epoch."""
    return grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat(None)


def rows_before(
    state: Mapping[str, int], store: TokenStore, batch_size: int, length: int, seed: int
) -> list[int]:
    """The rows of the global batch that led to `state`, in the order they were taken."""
    order = row_order(len(RowDataset(store, length)), seed)
    stop = state["global_next_index"]
    return [int(order[place]) for place in range(stop - batch_size, stop)]


def documents_of(store: TokenStore, rows: Sequence[int], length: int) -> list[list[str]]:
    """Returns the names of the documents in each row, to say where a loss went wrong."""
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
    first, which stands for the start of a text. The tail is padding: segment 0, weight 0. Every
    process has the same number of batches.
    """

    def __init__(
        self,
        store: TokenStore,
        batch_size: int,
        length: int,
        index: int,
        count: int,
        order: np.ndarray | None = None,
        restart: bool = False,
    ):
        self._store, self._batch_size, self._length = store, batch_size, length
        self._index, self._count, self._order, self._restart = index, count, order, restart

    def __len__(self) -> int:
        return -(-len(self._store) // (self._length * self._batch_size))

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start = i * self._batch_size
        rows = range(start + self._index, start + self._batch_size, self._count)
        how = self._length, self._order, self._restart
        return stack([cut(self._store, row, *how) for row in rows])

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    def text_bytes(self, limit: int = 0) -> float:
        """Returns the bytes of text that the first `limit` batches predict; 0 is all batches.

        Where the last of them cuts a document in two, its bytes count by the share of its tokens
        that are predicted.
        """
        document_bytes, starts = self._store.document_bytes(), self._store.starts
        end = len(self._store)
        if limit:
            end = min(end, limit * self._batch_size * self._length)
        # Document d has sizes - 1 targets; the input at `end` - 1 is the last that has one.
        targets = np.diff(starts) - 1
        predicted = np.clip(end - starts[:-1], 0, targets)
        return float((document_bytes * (predicted / np.maximum(targets, 1))).sum())


def validation_batches(
    store: TokenStore,
    batch_size: int,
    length: int,
    process_index: int | None = None,
    process_count: int | None = None,
    order: np.ndarray | None = None,
    restart: bool = False,
) -> Validation:
    """A sequence of Batches of numpy [batch_size / process_count, length], in order.

    `order` is that of the tokens in each row (core/layout.py), `restart` that of `batch.cut`.
    """
    process = _process(batch_size, process_index, process_count)
    return Validation(store, batch_size, length, *process, order, restart)


def _process(batch_size: int, index: int | None, count: int | None) -> tuple[int, int]:
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if batch_size % count:
        raise UserError(
            f"train.batch_size={batch_size} does not divide into {count} processes: "
            f"set it to a multiple of {count}"
        )
    return index, count
