"""Prompts that begin alike: what they share is read once, by one row for all.

    reader = Reader(engine, prompts, new, least=64)
    now, logprobs = reader.read(0, 8)

The whole state after the shared tokens is copied to the other rows, so ring buffers and sharded
caches need nothing of their own. A batch is read at up to three widths: a row on every shard of it
for what all its prompts share, a row for each different prompt, all rows.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import offload
from infer.engine import Engine, chunk_for
from infer.steps import Prefilled

Space = jax.memory.Space
LOOK = 8  # batches ahead of the one that is read: what they begin with is kept for them


class SharedPrefix(NamedTuple):
    """The state after the first tokens of several prompts, one row on every shard."""

    row: int  # a prompt that begins so
    length: int
    now: Prefilled
    logprobs: np.ndarray | None  # [length - 1] of all but the first token


class PrefixCache:
    """Reads the prompts of a run, one batch after the other."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[np.ndarray],
        new: Sequence[int],
        least: int,
        scored: bool = False,
    ):
        """Up to new[i] tokens will follow prompts[i]. `least` is from how many shared tokens on
        they are read once; 0 is never. `scored`: log-probabilities are wanted.
        """
        self.engine, self.least, self.scored = engine, least, scored
        self.tokens_read = 0
        self.prompts, self.new = prompts, new
        self._shards = engine.model.rules.size("batch")
        self._dims = batch_dims(engine)
        self._stems: list[SharedPrefix] = []  # each begins with the one before
        ropes = (spec.rope for spec in engine.model.config.pattern)
        by_length = any(rope is not None and rope.by_length for rope in ropes)
        # Where RoPE goes by what the text will have come to, so do the keys of its beginning.
        totals = [(len(p) + n) * by_length for p, n in zip(prompts, new, strict=True)]
        self._names = [(p.tobytes(), total) for p, total in zip(prompts, totals, strict=True)]
        # What a bidirectional prefix holds is seen from its own first token: all of it or nothing.
        whole = any(spec.prefix for spec in engine.model.config.pattern)
        self._alike = []  # tokens that a prompt shares with the next one
        for i, (one, next_one) in enumerate(itertools.pairwise(self._names)):
            apart = one != next_one if whole else one[1] != next_one[1]
            self._alike.append(0 if apart else _common(prompts[i], prompts[i + 1]))

    def read(self, first: int, end: int) -> tuple[Prefilled, list[np.ndarray]]:
        """The state after the prompts first..end-1, which fill a batch of the engine or a part.

        If `scored`, for each prompt [T] the log-probability [T - 1] of all but its first token.
        """
        batch = range(first, end)
        if not self.least:
            return self._extend(self.engine, batch)
        B, longest = self.engine.plan.batch, max(len(self.prompts[i]) for i in batch)
        rows, row_B = self._different(batch)
        stem = self._stem(batch, len(rows), longest)
        if stem is not None and stem.length == longest:
            now = self._spread(stem.now, B, row_B * 0)
            scores = [stem.logprobs] * len(batch) if self.scored else []
        else:
            now, scores = self._each(rows, stem, longest)
            if len(rows) < B:
                now = self._spread(now, B, row_B % (len(rows) // self._shards))
            scores = [scores[row] for row in row_B[: len(batch)]] if scores else []
        self._stems = [stem for stem in self._stems if self._serves(stem, end + 1)]
        return now, scores

    def _different(self, batch: range) -> tuple[list[int], np.ndarray]:
        """(prompts of a narrower batch that has each but once, the row there of each row [B]).

        Every shard of the batch finds the prompts of its rows on itself; 2^n rows each.
        """
        B, P = self.engine.plan.batch, self._shards
        names = [self._names[i] for i in batch]
        names += names[-1:] * (B - len(names))
        parts = [names[i : i + B // P] for i in range(0, B, B // P)]
        once = [list(dict.fromkeys(part)) for part in parts]
        width = min(B // P, 2 ** math.ceil(math.log2(max(map(len, once)))))
        rows = [name for part in once for name in (part + part[-1:] * width)[:width]]
        row_B = [i * width + once[i].index(name) for i, part in enumerate(parts) for name in part]
        return [batch[names.index(name)] for name in rows], np.array(row_B, np.int32)

    def _stem(self, batch: range, width: int, longest: int) -> SharedPrefix | None:
        """The state after what all prompts of a batch share, as far as that saves anything."""
        first, end = batch[0], batch[-1] + 1
        self._stems = [stem for stem in self._stems if self._serves(stem, end)]
        # What it shares with all to come, with the next ones, and among itself.
        soon = min(end + LOOK * (end - first), len(self.prompts))
        lasts = len(self.prompts), *range(soon, end - 1, -1)
        for length in dict.fromkeys(self._shared(first, last) for last in lasts):
            before = self._stems[-1] if self._stems else None
            have = before.length if before else 0
            saved = self._cost(width, longest - have) - self._cost(width, longest - length)
            again = end < len(self.prompts) and self._shared(first, end + 1) >= length
            worth = saved > self._cost(self._shards, length - have) or again
            if length - have >= self.least and worth:
                rows = [first] * self._shards
                now, scores = self._each(rows, before, length)
                self._stems.append(SharedPrefix(first, length, now, scores[0] if scores else None))
        return self._stems[-1] if self._stems else None

    def _shared(self, first: int, end: int) -> int:
        """Tokens that all of the prompts first..end-1 begin with."""
        return min([len(self.prompts[first]), *self._alike[first : end - 1]])

    def _serves(self, stem: SharedPrefix, end: int) -> bool:
        """Whether the prompts up to end-1, if there are so many, begin with this stem."""
        return end <= len(self.prompts) and self._shared(stem.row, end) >= stem.length

    def _cost(self, width: int, tokens: int) -> int:
        """Tokens that are computed to read so many in each of `width` rows, padding included."""
        chunk = chunk_for(tokens, self.engine.plan.chunk)
        return width * math.ceil(tokens / chunk) * chunk

    def _each(
        self, rows: Sequence[int], stem: SharedPrefix | None, end: int
    ) -> tuple[Prefilled, list[np.ndarray]]:
        """The state after the first `end` tokens of these prompts, and their log-probabilities."""
        have = stem.length if stem else 0
        chunk = self.engine.plan.chunk
        if stem or len(rows) < self.engine.plan.batch:
            length = self.engine.model.rules.size("length")
            chunk = math.ceil(chunk_for(end - have, chunk) / length) * length
        now = self._spread(stem.now, len(rows), np.zeros(len(rows), np.int32)) if stem else None
        engine = self.engine.resized(len(rows), chunk)
        now, scores = self._extend(engine, rows, now, have, end)
        if stem and scores:
            scores = [np.concatenate([stem.logprobs, of_row]) for of_row in scores]
        return now, scores

    def _extend(
        self,
        engine: Engine,
        rows: Sequence[int],
        now: Prefilled | None = None,
        first: int = 0,
        end: int | None = None,
    ) -> tuple[Prefilled, list[np.ndarray]]:
        """Reads the tokens first..end-1 of these prompts, after `now`."""
        prompts = [self.prompts[i][:end] for i in rows]
        new = [
            len(self.prompts[i]) + self.new[i] - len(p) for i, p in zip(rows, prompts, strict=True)
        ]
        self.tokens_read += sum(len(self.prompts[i][first:end]) for i in set(rows))
        if self.scored:
            return engine.score(prompts, new, now, first)
        return engine.prefill(prompts, now, first, new), []

    def _spread(self, now: Prefilled, width: int, row_B: np.ndarray) -> Prefilled:
        """`now` with these of its rows, counted on each shard, in a batch of `width` rows."""
        before = now.last_BD.shape[0]
        engine = self.engine.resized(width, self.engine.plan.chunk)
        spread = jax.jit(functools.partial(take, dims=self._dims))
        key = "spread", engine.model.config, before, width
        return engine.programs.run(key, spread, now, engine.place(row_B))


def _common(a_T: np.ndarray, b_T: np.ndarray) -> int:
    """Tokens that two prompts share, from the first on."""
    T = min(len(a_T), len(b_T))
    differ_T = a_T[:T] != b_T[:T]
    return int(differ_T.argmax()) if differ_T.any() else T


def batch_dims(engine: Engine) -> Any:
    """Returns the batch dim of each array of a state: the one that grows with the batch."""
    shards, chunk = engine.model.rules.size("batch"), engine.plan.chunk
    one, two = (engine.resized(n * shards, chunk).abstract() for n in (1, 2))

    def grows(a, b) -> int:
        return [m != n for m, n in zip(a.shape, b.shape, strict=True)].index(True)

    return jax.tree.map(grows, one, two)


def take(now: Prefilled, row_B: jax.Array, dims: Any) -> Prefilled:
    """Rows `row_B` of every shard of the batch: nothing crosses the mesh."""
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, now)

    def pick(x: jax.Array, row_B: jax.Array, dim: int) -> jax.Array:
        if jax.typeof(x).memory_space != Space.Host:
            return jnp.take(x, row_B, axis=dim, mode="clip")
        clipped = functools.partial(jnp.take, axis=dim, mode="clip")
        return offload.run_on_host(clipped)(x, jax.device_put(row_B, Space.Host))

    def local(now, row_B):
        return jax.tree.map(lambda x, dim: pick(x, row_B, dim), now, dims)

    in_specs = specs, jax.typeof(row_B).sharding.spec
    return jax.shard_map(local, in_specs=in_specs, out_specs=specs)(now, row_B)
