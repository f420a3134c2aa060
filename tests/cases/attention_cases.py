"""The table of attention cases that every kernel, strategy and cache must get right.

A case is what is asked (heads, window, soft-cap) and where the tokens stand (a layout). The
oracle follows the words of `Mask` token by token in float64 and knows nothing of tiles.
"""

import dataclasses
import zlib

import numpy as np

from model.attention.mask import (
    Bidirectional,
    BlockSparse,
    Chunk,
    Dilated,
    Full,
    Mask,
    Prefix,
    Window,
)

B, T, H = 2, 40, 8  # 40 is no multiple of the 16 to which tests set the kernels' blocks


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table; its `layout` is a key of LAYOUTS."""

    layout: str
    window: int = 0
    softcap: float = 0.0
    causal: bool = True
    chunk: int = 0
    block: int = 0
    local: int = 0
    stride: int = 0
    sinks: int = 0
    prefix: int = 0
    dilation: int = 0
    until: str = ""  # a key of UNTIL
    sink_logit: bool = False
    alibi: float = 0.0
    N: int = 4
    K: int = 2

    def __str__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return "-".join(f"{f.name}{getattr(self, f.name)}" for f in changed)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Positions and segments of queries [B, T] and of keys [B, S], and the queries' `until`."""

    q_positions: np.ndarray
    q_segments: np.ndarray
    k_positions: np.ndarray
    k_segments: np.ndarray
    q_until: np.ndarray | None = None


def groups(positions: np.ndarray) -> np.ndarray:
    """How far queries see if tokens 3 to 5 of a document see each other, 9 to 11, and so on."""
    is_group = positions // 3 % 2 == 1
    return np.where(is_group, positions // 3 * 3 + 2, positions)


def prefixes(positions: np.ndarray) -> np.ndarray:
    """How far queries see in a prefix-LM with prefixes of 5 tokens in row 0, 12 in row 1, ..."""
    return np.maximum(positions, 4 + 7 * np.arange(len(positions))[:, None])


UNTIL = {"groups": groups, "prefixes": prefixes}


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
    Case("packed", causal=False),
    Case("one", chunk=9),
    Case("shuffled", chunk=9),
    Case("one", window=5, sinks=3),
    Case("shuffled", window=5, sinks=3, sink_logit=True),
    Case("packed", chunk=4, sinks=2, sink_logit=True),
    Case("one", block=3, local=2, stride=3),
    Case("packed", block=3, local=2, stride=3),
    Case("zigzag", block=3, local=1, sinks=6),
    Case("shuffled", block=2, local=2, stride=4, sinks=2),
    Case("cache", block=4, local=2, stride=3, sinks=4),
    Case("cache", window=9, sinks=4, alibi=1.0),
    Case("packed", prefix=11),
    Case("shuffled", prefix=11),
    Case("packed", window=4, dilation=3),
    Case("cache", window=5, dilation=4),
    Case("one", until="prefixes"),
    Case("packed", until="groups"),
    Case("shuffled", window=7, until="groups"),
    Case("zigzag", block=3, local=1, stride=3, until="groups"),
    Case("padded", alibi=1.0),
    Case("zigzag", alibi=1.0, window=13, sink_logit=True),
    Case("future", sink_logit=True),
)


def inputs(case: Case) -> tuple[Tokens, tuple[np.ndarray, ...]]:
    """Where the tokens stand, and random (q, k, v, dout) in float32."""
    tokens = LAYOUTS[case.layout]()
    if case.until:
        tokens = dataclasses.replace(tokens, q_until=UNTIL[case.until](tokens.q_positions))
    random = np.random.default_rng(zlib.crc32(str(case).encode()))
    q_shape = (*tokens.q_positions.shape, case.N, H)
    k_shape = (*tokens.k_positions.shape, case.K, H)
    arrays = (random.standard_normal(s) for s in (q_shape, k_shape, k_shape, q_shape))
    return tokens, tuple(x.astype(np.float32) for x in arrays)


def mask(case: Case) -> Mask:
    """What the model makes of the case."""
    if not case.causal:
        return Bidirectional(case.window)
    if case.prefix:
        return Prefix(case.prefix)
    if case.dilation:
        return Dilated(case.window, case.dilation)
    if case.chunk:
        return Chunk(case.chunk, sinks=case.sinks)
    if case.block:
        return BlockSparse(case.block, case.local, case.stride, sinks=case.sinks)
    return Window(case.window, sinks=case.sinks) if case.window else Full()


def heads(case: Case) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(learned sinks [N], slopes of ALiBi [N]), None where the case has none."""
    sinks = np.linspace(-1.0, 2.0, case.N, dtype=np.float32) if case.sink_logit else None
    return sinks, 2.0 ** -np.arange(1, case.N + 1, dtype=np.float32) if case.alibi else None


def oracle(
    case: Case, tokens: Tokens, q, k, v, sinks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(out [B, T, N, H], lse [B, T, N]) in float64, one query and one head at a time.

    A learned sink is one more key with the value zero; `sinks` stand in for those of the case.
    """
    case_sinks, slopes = heads(case)
    sinks = case_sinks if sinks is None else sinks
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out, lse = np.zeros_like(q), np.full(q.shape[:3], -np.inf)
    for row, query in np.ndindex(q.shape[:2]):
        keys = [key for key in range(k.shape[1]) if sees(case, tokens, row, query, key)]
        away = tokens.q_positions[row, query] - tokens.k_positions[row, keys]
        for head in range(case.N if keys or case.sink_logit else 0):
            kv_head = head * case.K // case.N
            scores = k[row, keys, kv_head] @ q[row, query, head] / np.sqrt(H)
            if case.softcap:
                scores = np.tanh(scores / case.softcap) * case.softcap
            if case.alibi:
                scores = scores - slopes[head].astype(np.float64) * away
            values = v[row, keys, kv_head]
            if case.sink_logit:
                scores = np.append(scores, sinks[head])
                values = np.concatenate([values, np.zeros_like(values, shape=(1, H))])
            weights = np.exp(scores - scores.max())
            out[row, query, head] = weights @ values / weights.sum()
            lse[row, query, head] = np.log(weights.sum()) + scores.max()
    return out, lse


def sees(case: Case, tokens: Tokens, row: int, query: int, key: int) -> bool:
    """Whether this query may look at this key."""
    if not 0 < tokens.q_segments[row, query] == tokens.k_segments[row, key]:
        return False
    q, k = int(tokens.q_positions[row, query]), int(tokens.k_positions[row, key])
    until = q if tokens.q_until is None else tokens.q_until[row, query]
    if case.causal and k > until and k >= case.prefix:
        return False
    if k < case.sinks:
        return True
    if case.chunk:
        return q // case.chunk == k // case.chunk
    if case.block:
        blocks_back = q // case.block - k // case.block
        on_stride = case.stride > 0 and blocks_back % case.stride == 0
        return blocks_back < case.local or on_stride
    if case.dilation:
        return (q - k) % case.dilation == 0 and q - k <= (case.window - 1) * case.dilation
    return case.window == 0 or (q - k if case.causal else abs(q - k)) < case.window
