"""The table of attention cases that every kernel, strategy and cache must get right.

A case is what is asked (heads, window, soft-cap) and where the tokens stand (a layout). The
oracle follows the words of `Mask` token by token in float64 and knows nothing of tiles.
"""

import dataclasses
import zlib

import numpy as np

B, T, H = 2, 40, 8  # 40 is no multiple of the 16 to which tests set the kernels' blocks


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table; its `layout` is a key of LAYOUTS."""

    layout: str
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    N: int = 4
    K: int = 2

    def __str__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}{getattr(self, f.name)}" for f in changed)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Positions and segments of queries [B, T] and keys [B, S]."""

    q_positions: np.ndarray
    q_segments: np.ndarray
    k_positions: np.ndarray
    k_segments: np.ndarray


def documents(*rows: tuple[int, ...], length: int = T) -> tuple[np.ndarray, np.ndarray]:
    """(positions, segments) of rows packed from documents of these lengths, padded at the end."""
    positions, segments = np.zeros((2, len(rows), length), np.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, size in enumerate(lengths, 1):
            positions[row, start : start + size] = np.arange(size)
            segments[row, start : start + size] = number
            start += size
    return positions, segments


def _same(positions, segments) -> Tokens:
    return Tokens(positions, segments, positions, segments)


def _shuffled() -> Tokens:
    """Each row in an order of its own, as load-balancing permutations make."""
    order = np.stack([np.random.default_rng(seed).permutation(T) for seed in range(B)])
    return _same(*(np.take_along_axis(x, order, 1) for x in documents((7, 1, 20, 12), (23, 10))))


def _zigzag() -> Tokens:
    """First and last quarter together, then the middle: each half costs the same."""
    order = np.r_[0:10, 30:40, 10:30]
    return _same(*(x[:, order] for x in documents((T,), (25, 15))))


def _cache() -> Tokens:
    """5 new queries over a ring of 48 slots: wrapped in row 0, mostly empty in row 1."""
    slots, seen = 48, np.array([70, 11])
    k_positions = np.full((B, slots), -1, np.int32)
    for row, count in enumerate(seen):
        for position in range(count):
            k_positions[row, position % slots] = position
    q_positions = (seen[:, None] + np.arange(5)).astype(np.int32)
    q_segments = np.ones_like(q_positions)
    q_segments[1, 3:] = 0
    return Tokens(q_positions, q_segments, k_positions, (k_positions >= 0).astype(np.int32))


def _future() -> Tokens:
    """Keys start at position 20: the first queries see nothing at all."""
    q_positions, q_segments = documents((T,), (T,))
    return Tokens(q_positions, q_segments, q_positions[:, 20:], q_segments[:, 20:])


LAYOUTS = {
    "one": lambda: _same(*documents((T,), (T,))),
    "packed": lambda: _same(*documents((7, 1, 20, 12), (16, 16, 8))),
    "padded": lambda: _same(*documents((9, 14), ())),  # row 1 is padding alone
    "shuffled": _shuffled,
    "zigzag": _zigzag,
    "cache": _cache,
    "future": _future,
}

# Cases of equal heads, window and lengths share one compilation: keep their number small.
CASES = (
    Case("one"),
    Case("packed"),
    Case("padded"),
    Case("shuffled"),
    Case("zigzag"),
    Case("one", window=7),
    Case("packed", window=7),
    Case("padded", window=7),
    Case("shuffled", window=7),
    Case("zigzag", window=7),
    Case("one", window=1, N=1, K=1),
    Case("one", window=16, K=4),
    Case("packed", window=17, softcap=2.0, K=1),
    Case("packed", window=100, softcap=2.0, causal=False),
    Case("cache"),
    Case("cache", window=30),
    Case("future", window=7),
)


def inputs(case: Case) -> tuple[Tokens, tuple[np.ndarray, ...]]:
    """Where the tokens stand, and random (q, k, v, dout) in float32."""
    tokens = LAYOUTS[case.layout]()
    random = np.random.default_rng(zlib.crc32(str(case).encode()))
    q_shape = (*tokens.q_positions.shape, case.N, H)
    k_shape = (*tokens.k_positions.shape, case.K, H)
    arrays = (random.standard_normal(s) for s in (q_shape, k_shape, k_shape, q_shape))
    return tokens, tuple(x.astype(np.float32) for x in arrays)


def oracle(case: Case, tokens: Tokens, q, k, v) -> tuple[np.ndarray, np.ndarray]:
    """(out [B, T, N, H], lse [B, T, N]) in float64, one query and one head at a time."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out, lse = np.zeros_like(q), np.full(q.shape[:3], -np.inf)
    for row, query in np.ndindex(q.shape[:2]):
        keys = [key for key in range(k.shape[1]) if sees(case, tokens, row, query, key)]
        for head in range(case.N if keys else 0):
            kv_head = head * case.K // case.N
            scores = k[row, keys, kv_head] @ q[row, query, head] / np.sqrt(H)
            if case.softcap:
                scores = np.tanh(scores / case.softcap) * case.softcap
            weights = np.exp(scores - scores.max())
            out[row, query, head] = weights @ v[row, keys, kv_head] / weights.sum()
            lse[row, query, head] = np.log(weights.sum()) + scores.max()
    return out, lse


def sees(case: Case, tokens: Tokens, row: int, query: int, key: int) -> bool:
    """Whether this query may look at this key."""
    if not 0 < tokens.q_segments[row, query] == tokens.k_segments[row, key]:
        return False
    distance = int(tokens.q_positions[row, query]) - int(tokens.k_positions[row, key])
    if case.causal and distance < 0:
        return False
    return case.window == 0 or distance < case.window
