"""MoBA and NSA token by token in float64, from the papers' equations; no blocks, no tiles.

Documents are told apart by segment and read in order of position, wherever the tokens stand.
"""

import numpy as np


def moba(q, k, v, positions, segments, block: int, top: int) -> np.ndarray:
    """Equations 2 to 7 of arXiv 2502.13189; out [B, T, N, H]."""
    out = np.zeros(q.shape)
    for row, tokens in documents(positions, segments):
        for head, q_TH, k_TH, v_TH in heads(q, k, v, row, tokens):
            for t in range(len(tokens)):
                own = t // block
                liking = [q_TH[t] @ k_TH[b * block : (b + 1) * block].mean(0) for b in range(own)]
                chosen = {own, *np.argsort(liking)[::-1][: top - 1]}
                keys = [s for s in range(t + 1) if s // block in chosen]
                out[row, tokens[t], head] = attend(q_TH[t], k_TH[keys], v_TH[keys])[0]
    return out


def nsa(q, k, v, gates, compressors, positions, segments, spec) -> np.ndarray:
    """Equations 5 to 12 of arXiv 2502.11089; out [B, T, N, H], gates [B, T, N, 3]."""
    out = np.zeros(q.shape)
    size, step, block = spec.compress, spec.step, spec.block
    group = q.shape[2] // k.shape[2]
    for row, tokens in documents(positions, segments):
        T = len(tokens)
        starts = range(0, T - size + 1, step)
        weights = {}
        for head, q_TH, k_TH, v_TH in heads(q, k, v, row, tokens):
            k_ZH, v_ZH = (
                np.array([compress(x_TH[s : s + size], *c) for s in starts]).reshape(-1, q.shape[3])
                for c, x_TH in zip(compressors, (k_TH, v_TH), strict=True)
            )
            for t in range(T):
                seen = sum(s + size - 1 <= t for s in starts)
                branch, weights[head, t] = attend(q_TH[t], k_ZH[:seen], v_ZH[:seen], spec.softcap)
                near = slice(max(0, t + 1 - spec.window), t + 1)
                gate = gates[row, tokens[t], head]
                out[row, tokens[t], head] += gate[0] * branch
                window = attend(q_TH[t], k_TH[near], v_TH[near], spec.softcap)[0]
                out[row, tokens[t], head] += gate[2] * window
        for head, q_TH, k_TH, v_TH in heads(q, k, v, row, tokens):
            first = head // group * group
            for t in range(T):
                own = t // block
                shared = sum(weights[h, t] for h in range(first, first + group))
                importance = {
                    j: sum(
                        weight * overlap(s, size, j * block, block) / step
                        for s, weight in zip(starts, shared, strict=False)
                    )
                    for j in range(1, own - 1)
                }
                chosen = sorted(importance, key=importance.get)[::-1][: spec.top - 3]
                chosen = {0, own - 1, own, *chosen}
                keys = [s for s in range(t + 1) if s // block in chosen]
                branch = attend(q_TH[t], k_TH[keys], v_TH[keys], spec.softcap)[0]
                out[row, tokens[t], head] += gates[row, tokens[t], head, 1] * branch
    return out


def compress(x_CH, place_CH, in_HF, out_FH) -> np.ndarray:
    """Ours: the paper asks for a learned MLP over a block that knows the places in it."""
    p_H = ((1 + place_CH) / len(x_CH) * x_CH).sum(0)
    h_F = p_H @ in_HF
    gelu_F = 0.5 * h_F * (1 + np.tanh(np.sqrt(2 / np.pi) * (h_F + 0.044715 * h_F**3)))
    return p_H + gelu_F @ out_FH


def overlap(a: int, a_size: int, b: int, b_size: int) -> int:
    return max(0, min(a + a_size, b + b_size) - max(a, b))


def attend(q_H, k_SH, v_SH, softcap: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(out [H], weights [S]); zeros where there is nothing to see."""
    if not len(k_SH):
        return np.zeros_like(q_H), np.zeros(0)
    scores = k_SH @ q_H / np.sqrt(len(q_H))
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    weights = np.exp(scores - scores.max())
    return weights @ v_SH / weights.sum(), weights / weights.sum()


def documents(positions, segments):
    """(row, its tokens in order of position) of each document."""
    for row in range(len(segments)):
        for segment in set(segments[row]) - {0}:
            tokens = np.flatnonzero(segments[row] == segment)
            yield row, tokens[np.argsort(positions[row, tokens])]


def heads(q, k, v, row: int, tokens):
    """(head, q, k, v [T, H] of the document) of each query head."""
    for head in range(q.shape[2]):
        of = head * k.shape[2] // q.shape[2]
        yield head, q[row, tokens, head], k[row, tokens, of], v[row, tokens, of]
