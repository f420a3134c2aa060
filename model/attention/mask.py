"""WHAT attention sees: one frozen class a kind of mask.

    mask = Window(1024, sinks=4)
    mask.pairs(q_pos, k_pos)                        # booleans, pair by pair
    mask.may_see(bounds(q_pos), bounds(k_pos))      # may any pair of two blocks count?

A mask is a pure function of positions, evaluated on tiles, never on S x S. A new kind must write
`allowed` and nothing else: what a class does not say has a default that is safe and slow.
test_model_attention_mask.py holds every method to `allowed`, over all pairs of tiles.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FAR = jnp.iinfo(jnp.int32).max


class Positions(NamedTuple):
    """The positions of tokens, int32 [B, T] each.

    Positions count from 0 inside each document. Segments tell the documents of a row apart; segment
    0 is padding, or an empty slot of a cache: it sees nothing and nothing sees it. A query sees no
    position of its document beyond `until`. That is its own position in plain text (None), the
    last one of its image where the tokens of an image see each other, and the last one of the
    prefix in a prefix-LM.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array
    until_BT: jax.Array | None = None

    @property
    def last_BT(self) -> jax.Array:
        """The last position that each query may see."""
        return self.positions_BT if self.until_BT is None else self.until_BT

    def stacked(self, axis: int) -> jax.Array:
        """One array of positions, segments and until, for a kernel."""
        return jnp.stack((self.positions_BT, self.segments_BT, self.last_BT), axis)


class Edge(NamedTuple):
    """One end of a block of tokens in the order of (segment, position), [Y]."""

    segment: jax.Array
    position: jax.Array
    until: jax.Array  # the lowest of the first segment, or the highest of the last


class Bounds(NamedTuple):
    """The two ends of a block of tokens: enough to decide about the block without its tokens."""

    low: Edge
    high: Edge


def bounds(pos_YPR: Positions) -> Bounds:
    """The bounds of each block of [Y, P, R]; those of an empty block see and are seen by none."""
    positions, segments, until = pos_YPR.positions_BT, pos_YPR.segments_BT, pos_YPR.last_BT
    axes = (1, 2)
    first = jnp.where(segments > 0, segments, FAR).min(axes, keepdims=True)
    last = segments.max(axes, keepdims=True)
    in_first, in_last = segments == first, (segments == last) & (last > 0)
    low = (jnp.where(in_first, x, FAR).min(axes) for x in (positions, until))
    high = (jnp.where(in_last, x, -1).max(axes) for x in (positions, until))
    return Bounds(Edge(first[:, 0, 0], *low), Edge(last[:, 0, 0], *high))


def bounds_of_rows(pos_BT: Positions) -> Bounds:
    """The bounds of each row, [B]: all its tokens are one block."""
    return bounds(jax.tree.map(lambda x_BT: x_BT[:, None], pos_BT))


@dataclasses.dataclass(frozen=True)
class Mask:
    """The keys of its own document that a query may see. Distances count from the query back."""

    causal: ClassVar[bool] = True  # no key beyond the query's `until`

    def allowed(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Whether a query at position q may see a key at k <= `until` of the same document.

        Both are int32, of NumPy or JAX, and broadcast against each other. A mask that is not
        causal is asked about all keys.
        """
        raise NotImplementedError

    @property
    def reach(self) -> int:
        """Tokens back that a query can see at all, itself included; 0 is no limit."""
        return 0

    @property
    def kept(self) -> int:
        """Tokens that a cache must keep, the first ones of a text included; 0 is all."""
        return self.reach

    @property
    def extent(self) -> int:
        """Tokens by which kernels size their blocks: about what a query sees; 0 is no limit."""
        return self.reach

    def limit(self, until: jax.Array) -> jax.Array:
        """The last position that queries with this `until` see."""
        return until

    def may_see(self, q: Bounds, k: Bounds) -> jax.Array:
        """Whether a query of one block may see a key of the other: True where it is not known.

        Blocks are ordered by (segment, position), so this holds for any order of tokens in them.
        """
        touch = (k.low.segment <= q.high.segment) & (q.low.segment <= k.high.segment)
        if not self.causal:
            return touch
        # Where the two touch in one document alone, its positions decide.
        ahead = (k.low.segment == q.high.segment) & (k.low.position > self.limit(q.high.until))
        if not self.reach:
            return touch & ~ahead
        distance = q.low.position - k.high.position
        behind = (q.low.segment == k.high.segment) & (distance >= self.reach)
        return touch & ~ahead & ~behind

    def sees_all(self, q: Bounds, k: Bounds) -> jax.Array:
        """Whether each query of one block sees each key of the other: False where it is not known.

        Asked about blocks that hold tokens of one document, without padding.
        """
        return jnp.zeros_like(q.low.segment == k.low.segment)

    def count(self, length: int) -> np.ndarray:
        """Keys that each token of a document of `length` sees, int [length]."""
        k = np.arange(length)[None]
        counts = []
        for start in range(0, length, 1024):
            q = np.arange(start, min(start + 1024, length))[:, None]
            seen = np.broadcast_to(self.allowed(q, k), (len(q), length))
            counts.append((seen & (k <= self.limit(q)) if self.causal else seen).sum(1))
        return np.concatenate(counts)

    def pairs(self, q: Positions, k: Positions) -> jax.Array:
        """Whether each query sees each key: booleans of the broadcast shape of their arrays."""
        seen = (q.segments_BT == k.segments_BT) & (k.segments_BT > 0)
        seen = seen & self.allowed(q.positions_BT, k.positions_BT)
        return seen & (k.positions_BT <= self.limit(q.last_BT)) if self.causal else seen


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """The whole document up to the query."""

    def allowed(self, q, k):
        return True

    def sees_all(self, q: Bounds, k: Bounds) -> jax.Array:
        return (q.low.segment == k.low.segment) & (k.high.position <= self.limit(q.low.until))

    def count(self, length: int) -> np.ndarray:
        return self.limit(np.arange(length)).clip(max=length - 1) + 1


@dataclasses.dataclass(frozen=True)
class Prefix(Full):
    """The whole document up to the query, and the first `prefix` tokens, whoever asks."""

    prefix: int

    def limit(self, until):
        return (np if isinstance(until, np.ndarray) else jnp).maximum(until, self.prefix - 1)


@dataclasses.dataclass(frozen=True)
class Bidirectional(Mask):
    """The whole document; with a `window`, only what is less than that away on either side."""

    causal: ClassVar[bool] = False
    window: int = 0

    @property
    def extent(self) -> int:
        return self.window

    def allowed(self, q, k):
        return abs(q - k) < self.window if self.window else True

    def may_see(self, q: Bounds, k: Bounds) -> jax.Array:
        seen = super().may_see(q, k)
        if not self.window:
            return seen
        ahead = (k.low.segment == q.high.segment) & (
            k.low.position - q.high.position >= self.window
        )
        behind = (k.high.segment == q.low.segment) & (
            q.low.position - k.high.position >= self.window
        )
        return seen & ~ahead & ~behind

    def sees_all(self, q: Bounds, k: Bounds) -> jax.Array:
        seen = q.low.segment == k.low.segment
        if not self.window:
            return seen
        ahead, behind = k.high.position - q.low.position, q.high.position - k.low.position
        return seen & (ahead < self.window) & (behind < self.window)

    def count(self, length: int) -> np.ndarray:
        if not self.window:
            return np.full(length, length)
        q = np.arange(length)
        return np.minimum(q, self.window - 1) + np.minimum(length - q, self.window)


@dataclasses.dataclass(frozen=True)
class _Near(Mask):
    """The keys near a query, one piece of the document; and the first `sinks`, however far."""

    sinks: int = dataclasses.field(default=0, kw_only=True)

    @property
    def near(self) -> int:
        """The most keys that are near a query, itself included."""
        raise NotImplementedError

    def is_near(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Whether a key at k is near a query at q."""
        raise NotImplementedError

    def count_near(self, q: np.ndarray) -> np.ndarray:
        """Counts the keys at 0 .. q that are near each query at q."""
        raise NotImplementedError

    @property
    def reach(self) -> int:
        return 0 if self.sinks else self.near

    @property
    def kept(self) -> int:
        return self.near + self.sinks

    @property
    def extent(self) -> int:
        return self.near

    def allowed(self, q, k):
        near = self.is_near(q, k)
        return near | (k < self.sinks) if self.sinks else near

    def may_see(self, q: Bounds, k: Bounds) -> jax.Array:
        # Where the last key is too far back for the first query of its document, all keys are.
        behind = ~self.is_near(q.low.position, k.high.position)
        behind &= (q.low.segment == k.high.segment) & (q.low.position > k.high.position)
        if self.sinks:  # a document that begins in the block has its first tokens there
            behind &= (k.low.segment == k.high.segment) & (k.low.position >= self.sinks)
        return super().may_see(q, k) & ~behind

    def sees_all(self, q: Bounds, k: Bounds) -> jax.Array:
        near = self.is_near(q.high.position, k.low.position)
        near &= self.is_near(q.low.position, k.high.position)
        past = k.high.position <= self.limit(q.low.until)
        return (q.low.segment == k.low.segment) & past & (near | (k.high.position < self.sinks))

    def count(self, length: int) -> np.ndarray:
        q = np.arange(length)
        near = self.count_near(q)
        return near + np.minimum(self.sinks, q + 1 - near)


@dataclasses.dataclass(frozen=True)
class Window(_Near):
    """The last `window` tokens, the query included."""

    window: int

    @property
    def near(self) -> int:
        return self.window

    def is_near(self, q, k):
        return q - k < self.window

    def count_near(self, q: np.ndarray) -> np.ndarray:
        return np.minimum(q + 1, self.window)


@dataclasses.dataclass(frozen=True)
class Chunk(_Near):
    """The query's own chunk: tokens i // `chunk` of a document."""

    chunk: int

    @property
    def near(self) -> int:
        return self.chunk

    def is_near(self, q, k):
        return q // self.chunk == k // self.chunk

    def count_near(self, q: np.ndarray) -> np.ndarray:
        return q % self.chunk + 1


@dataclasses.dataclass(frozen=True)
class BlockSparse(_Near):
    """The last `local` blocks of `block` tokens, the own included, and each `stride`-th back."""

    block: int
    local: int
    stride: int = 0  # 0 is none

    @property
    def near(self) -> int:
        return self.local * self.block

    @property
    def reach(self) -> int:
        return 0 if self.stride else super().reach

    @property
    def kept(self) -> int:
        return 0 if self.stride else super().kept

    @property
    def extent(self) -> int:
        return 2 * self.block

    def is_near(self, q, k):
        return q // self.block - k // self.block < self.local

    def count_near(self, q: np.ndarray) -> np.ndarray:
        return np.minimum(q + 1, q % self.block + 1 + (self.local - 1) * self.block)

    def allowed(self, q, k):
        seen = super().allowed(q, k)
        if not self.stride:
            return seen
        # Blocks apart by a multiple of the stride; no division is made pair by pair.
        q_phase, k_phase = (x // self.block % self.stride for x in (q, k))
        return seen | (q_phase == k_phase)

    def may_see(self, q: Bounds, k: Bounds) -> jax.Array:
        seen = super().may_see(q, k)
        if not self.stride:
            return seen
        fewest = q.low.position // self.block - k.high.position // self.block
        most = q.high.position // self.block - k.low.position // self.block
        on_stride = most // self.stride * self.stride >= fewest
        one_document = (k.low.segment == k.high.segment) & (q.low.segment == q.high.segment)
        return seen | (Mask.may_see(self, q, k) & (on_stride | ~one_document))

    def count(self, length: int) -> np.ndarray:
        count = super().count(length)
        if not self.stride:
            return count
        block = np.arange(length) // self.block
        far = block // self.stride - (self.local - 1) // self.stride
        count += far.clip(0) * self.block
        for first in range(0, self.sinks, self.block):  # both a sink and on the stride
            back = block - first // self.block
            both = (back >= self.local) & (back % self.stride == 0)
            count -= both * min(self.block, self.sinks - first)
        return count


@dataclasses.dataclass(frozen=True)
class Dilated(Mask):
    """Every `dilation`-th of the last `window` x `dilation` tokens, the query the last of them."""

    window: int
    dilation: int

    @property
    def reach(self) -> int:
        return (self.window - 1) * self.dilation + 1

    def allowed(self, q, k):
        return (q - k < self.reach) & ((q - k) % self.dilation == 0)

    def count(self, length: int) -> np.ndarray:
        return np.minimum(np.arange(length) // self.dilation + 1, self.window)
