"""The picked order of the length keeps every shard of a ring busy, and attention is the same."""

import logging
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_data_loader
from conftest import make_mesh

from core import layout, sharding
from core.sharding import Layout
from data import balance, loader
from model.attention.mask import Full, Positions, Window, bounds

LAYOUTS = get_args(Layout)
LENGTH, SHARDS = 32768, 8


def packed(median: int, rows: int = 64, length: int = LENGTH) -> np.ndarray:
    """Segments of rows cut from a stream of documents of lognormal lengths, sigma 1.2.

    The narrower the lengths, the fewer pairs are in long documents: at sigma 1 and a median of
    S/64 the tiles alone leave 0.83, and the picked order 0.74.
    """
    draw = np.random.default_rng(0)
    sizes = np.maximum(2, median * np.exp(1.2 * draw.standard_normal(100 * length // median)))
    stream = np.repeat(np.arange(len(sizes)), sizes.astype(int))
    segments = stream[: rows * length].reshape(rows, length)
    return segments - segments[:, :1] + 1


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("shards", "tile", "windows"), [(4, 8, (0,)), (3, 4, (9,)), (2, 6, (0, 20))]
)
@pytest.mark.parametrize("every_hop", [True, False])
def test_balance_counts_the_tiles_that_kernels_visit(name, shards, tile, windows, every_hop):
    """Restated with the kernels' own `may_see`, pair by pair of tiles, and with `Mask.pairs`."""
    segments = packed(11, rows=2, length=96)
    segments[1, -13:] = 0
    order = layout.order(name, 96, shards)
    n, seen, paid = 96 // shards // tile, 0, 0
    for row in segments:
        first = np.r_[0, np.flatnonzero(np.diff(row)) + 1]
        positions = np.arange(96) - np.repeat(first, np.diff(first, append=96))
        at = [jnp.asarray(x[order].reshape(-1, 1, tile)) for x in (positions, row)]
        of_tiles = bounds(Positions(*at))
        for window in windows:
            mask = Window(window) if window else Full()
            queries = Positions(positions[:, None], row[:, None])
            seen += int(mask.pairs(queries, Positions(positions[None], row[None])).sum())
            q_bounds, k_bounds = (
                jax.tree.map(lambda x, axis=axis: jnp.expand_dims(x, axis), of_tiles)
                for axis in (1, 0)
            )
            visited = np.asarray(mask.may_see(q_bounds, k_bounds))
            visited = visited.reshape(shards, n, shards, n)
            visits = visited.sum((1, 3)).tolist()
            by_hop = [[visits[i][i - hop] for i in range(shards)] for hop in range(shards)]
            worst = sum(map(max, by_hop)) if every_hop else max(map(sum, visits))
            paid += shards * worst * tile**2
    found = balance.balance(segments, order, shards, tile, windows, every_hop)
    assert found == pytest.approx(seen / paid)


class Stream:
    """As much of a TokenStore as `choose` reads, of documents that are given by their segments."""

    def __init__(self, segments):
        flat = segments.ravel()
        self.starts = np.r_[0, np.flatnonzero(np.diff(flat)) + 1, flat.size]

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, span):
        return np.zeros(len(range(*span.indices(len(self)))), np.uint16)


@pytest.fixture
def ring(monkeypatch):
    """Rules whose length has SHARDS shards."""
    monkeypatch.setattr(sharding.Rules, "size", lambda self, name: SHARDS)
    return sharding.training("ring")


@pytest.mark.parametrize(
    ("segments", "least", "contiguous"),
    [
        (np.ones((1, LENGTH), int), 0.97, 0.54),
        (packed(LENGTH // 8), 0.90, 0.50),
        (packed(LENGTH // 64), 0.75, 0.40),
    ],
    ids=["one document", "S/8", "S/64"],
)
def test_auto_picks_a_balanced_layout(ring, segments, least, contiguous):
    name = balance.choose(balance.sample(Stream(segments), LENGTH), ring, windows=(0,))
    found = {n: balance.balance(segments, layout.order(n, LENGTH, SHARDS), SHARDS) for n in LAYOUTS}
    assert found[name] >= least, found
    assert found["contiguous"] <= contiguous, found


def test_auto_leaves_windows_in_order_and_says_so(ring, caplog):
    """Halos of a short window cost the same everywhere: nothing is won by an exchange."""
    with caplog.at_level(logging.INFO, "cakrawala"):
        stream = Stream(np.ones((2, LENGTH), int))
        assert balance.choose(balance.sample(stream, LENGTH), ring, windows=(1024,)) == "contiguous"
    assert "mesh.layout=auto: contiguous; balance over 8 shards" in caplog.text
    assert "tiles of 128 tokens" in caplog.text


@pytest.mark.parametrize(
    "rules", [sharding.training(), sharding.training("ulysses"), sharding.training("ring", 8)]
)
def test_whole_rows_stay_in_order(rules, caplog):
    sizes = (1, 1, 1) if rules.strategy == "auto" else (1, 8, 1)
    with jax.set_mesh(make_mesh(sizes)), caplog.at_level(logging.INFO, "cakrawala"):
        assert balance.choose(packed(9, rows=1, length=96), rules, (0,)) == "contiguous"
    assert not caplog.text, "there was nothing to choose"


def test_the_loader_permutes_all_five_arrays_alike(tmp_path):
    store = test_data_loader.make(tmp_path, [30, 8, 40, 11, 2, 60])
    order = layout.order("zigzag", 24, 3)
    plain = next(loader.train_batches(store, 4, 24, 0))
    mixed = next(loader.train_batches(store, 4, 24, 0, order=order))
    for name in test_data_loader.FIELDS:
        expected = getattr(plain, name)[:, order]
        np.testing.assert_array_equal(getattr(mixed, name), expected, err_msg=name)
    plain = loader.validation_batches(store, 2, 24)
    mixed = loader.validation_batches(store, 2, 24, order=order)
    assert len(plain) == len(mixed)
    for one, other in zip(plain, mixed, strict=True):
        test_data_loader.assert_equal(
            [other.tokens, other.weights], [one.tokens[:, order], one.weights[:, order]]
        )
