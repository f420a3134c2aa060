"""Orders of a row's tokens, by how busy they keep the shards of a ring on these documents.

balance(segments, layout.order("striped", 32768, 8), shards=8)    # 0.94: what the ring uses
choose(segments, rules, windows=[0])                              # "striped"
"""

import logging
from collections.abc import Sequence
from typing import get_args

import numpy as np

from core.layout import TILE, order, tile_size
from core.sharding import Layout, Rules
from data.batch import cut
from data.store import TokenStore

log = logging.getLogger("cakrawala")

SAMPLE = 16  # rows by which `auto` judges
MARGIN = 1.05  # by which a permuted order must beat contiguous, where windows cross fewer borders


def balance(
    segments_BT: np.ndarray,
    order: np.ndarray,
    shards: int,
    tile: int = TILE,
    windows: Sequence[int] = (0,),
    every_hop: bool = True,
) -> float:
    """Useful share of what causal attention costs on all shards: pairs seen / pairs of time.

    A shard pays for the tiles x tiles that it visits. In a ring all wait for the slowest at
    `every_hop`; else (keys gathered before) once. `segments` stand in the order of the documents;
    one layer of each of `windows` is counted, 0 being none.
    """
    seen = paid = 0
    for segments_T in segments_BT:
        for window in windows:
            reach_T = _reach(segments_T, window)
            seen += (np.arange(len(reach_T)) - reach_T + 1)[segments_T > 0].sum()
            tiles_PP = _visits(segments_T, reach_T, order.reshape(shards, -1, tile))
            if every_hop:
                # Row h: what each shard does at hop h, with the keys of the shard h before it.
                shard = np.arange(shards)
                slowest = tiles_PP[shard, shard - shard[:, None]].max(1).sum()
            else:
                slowest = tiles_PP.sum(1).max()
            paid += shards * slowest * tile**2
    return float(seen / max(paid, 1))


def sample(store: TokenStore, length: int) -> np.ndarray:
    """Segments [B, T] of a few rows, taken evenly from the whole store."""
    rows = np.linspace(0, max(0, len(store) // length - 1), SAMPLE).astype(int)
    return np.stack([cut(store, row, length).segments for row in np.unique(rows)])


def choose(segments_BT: np.ndarray, rules: Rules, windows: Sequence[int]) -> Layout:
    """Returns the layout of mesh.layout=auto, the best balanced on these segments, and logs it."""
    shards, length = rules.ring_size(), segments_BT.shape[1]
    if shards == 1:
        return "contiguous"
    tile = tile_size(length // shards)
    every_hop = rules.strategy != "allgather"
    found = {
        name: balance(segments_BT, order(name, length, shards), shards, tile, windows, every_hop)
        for name in get_args(Layout)
    }
    best = max(found, key=found.get)
    if found[best] < MARGIN * found["contiguous"]:
        best = "contiguous"
    figures = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    log.info(
        "mesh.layout=auto: %s; balance over %d shards, in tiles of %d tokens: %s",
        best, shards, tile, figures,
    )  # fmt: skip
    return best


def _reach(segments_T: np.ndarray, window: int) -> np.ndarray:
    """The first place that each place sees: where its document or its window begins."""
    place = np.arange(len(segments_T))
    begins = np.maximum.accumulate(place * (np.diff(segments_T, prepend=-1) != 0))
    return np.maximum(begins, place - window + 1) if window else begins


def _visits(segments_T: np.ndarray, reach_T: np.ndarray, places_PnC: np.ndarray) -> np.ndarray:
    """Pairs of tiles that [query shard, key shard] visit, int [P, P]; n tiles of C in a shard.

    A tile of queries meets a tile of keys unless all of that is after it, or before its reach.
    """
    never = len(segments_T)
    real_PnC = segments_T[places_PnC] > 0
    low_Pn = np.where(real_PnC, places_PnC, never).min(-1)
    high_Pn = np.where(real_PnC, places_PnC, -1).max(-1)
    reach_Pn = np.append(reach_T, 0)[low_Pn]
    # Tiles of padding alone are after every query, and not before any.
    k_high_Pn = np.where(high_Pn < 0, never, high_Pn)
    visits = [
        np.searchsorted(np.sort(low_n), high_Pn, "right")
        - np.searchsorted(np.sort(k_high_n), reach_Pn, "left")
        for low_n, k_high_n in zip(low_Pn, k_high_Pn, strict=True)
    ]
    return np.stack([v.sum(1) for v in visits], axis=1)
