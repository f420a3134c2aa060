"""Bits per byte are those of the text itself; each process reads the rows of its devices."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import MESHES, make_mesh, quick
from train_cases import MODEL, TRAIN

from core import sharding
from core.config import UserError
from data import store
from data.loader import validation_batches
from model import transformer
from model.attention.spec import full
from train.loop import feed
from train.loop.evaluate import evaluate
from train.loop.feed import BatchSharder

LENGTH, NUM_DOCUMENTS, NUM_BYTES = 16, 13, 41


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """13 documents as long as a row; two batches of 8 hold them, and three rows of padding."""
    return make_store(tmp_path_factory.mktemp("store"), [LENGTH] * NUM_DOCUMENTS)


def make_store(directory, sizes, num_bytes=(NUM_BYTES,)):
    draw = np.random.default_rng(0)
    writer = store.ShardWriter(directory, "validation", np.dtype("<u2"), 10**6)
    for number, size in enumerate(sizes):
        tokens = np.concatenate([[1], draw.integers(5, 300, size - 2), [2]])
        writer.add(f"document {number}", tokens, num_bytes[number % len(num_bytes)])
    splits = {"validation": writer.close()}
    store.write_manifest(directory, dict(vocab_size=300, dtype="uint16", splits=splits))
    return store.TokenStore(directory, "validation")


def bits(model, documents):
    """[documents, tokens after the first] -log2 p, each document for itself, in float64."""
    rules = sharding.training()
    spans = zip(documents.starts[:-1], documents.starts[1:], strict=True)
    forward = jax.jit(lambda *arrays: model.logits(model(*arrays)[0]))
    found = []
    for first, last in spans:
        tokens = documents[first:last].astype(np.int32)
        row = tokens[None, :-1]
        arrays = row, np.arange(row.shape[1], dtype=np.int32)[None], np.ones_like(row)
        placed = [jax.device_put(x, rules("batch", "length")) for x in arrays]
        logits_TV = np.asarray(forward(*placed), np.float64)[0]
        p_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(axis=1, keepdims=True)
        found.append(-np.log2(p_TV[np.arange(len(tokens) - 1), tokens[1:]]))
    return np.stack(found)


@pytest.fixture(scope="module")
def expected(documents):
    with jax.set_mesh(make_mesh((1, 1, 1))):
        found = bits(create(), documents)
    assert found.shape == (NUM_DOCUMENTS, LENGTH - 1), "bos is given, the end is told"
    assert found.std() > 1, "a case in which tokens differ"
    return found


def create():
    # Larger weights, so that the probabilities are far from equal.
    config = dataclasses.replace(MODEL, num_layers=1, pattern=(full(),), init_scale=0.3)
    return transformer.create(config, sharding.training(), jax.random.key(0))


def run(documents, sizes, limit=0):
    config = dataclasses.replace(TRAIN, length=LENGTH)
    with jax.set_mesh(make_mesh(sizes)):
        batches = validation_batches(documents, config.batch_size, LENGTH)
        text_bytes = batches.text_bytes(limit)
        return evaluate(
            create(), batches, BatchSharder(config, sharding.training()), text_bytes, limit
        )


@pytest.mark.parametrize("sizes", quick(MESHES, 2))
def test_bits_per_byte_are_those_of_the_text(documents, expected, sizes):
    found = run(documents, sizes)
    per_byte = expected.sum() / (NUM_DOCUMENTS * NUM_BYTES)
    assert found["bits_per_byte"] == pytest.approx(per_byte, rel=1e-5)
    assert found["eval_loss"] == pytest.approx(expected.mean() * np.log(2), rel=1e-5)


def test_a_limit_counts_the_bytes_of_the_same_documents(documents, expected):
    found = run(documents, (1, 1, 1), limit=1)
    assert found["bits_per_byte"] == pytest.approx(expected[:8].sum() / (8 * NUM_BYTES), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(expected[:8].mean() * np.log(2), rel=1e-5)


def test_bytes_of_the_first_batches_are_those_of_their_tokens(tmp_path):
    """A batch ends within a document: its bytes count by the share of its targets."""
    documents = make_store(tmp_path, [10, 5, 21, 5], num_bytes=(100, 7, 60, 1000))
    batches = validation_batches(documents, 1, LENGTH)
    assert [batches.text_bytes(limit) for limit in (1, 2, 3, 0, 9)] == [
        107 + 60 * 1 / 20,
        107 + 60 * 17 / 20,
        1167,
        1167,
        1167,
    ]


@pytest.mark.parametrize("sizes", [[16] * 13, [40, 3, 2, 17, 90, 2, 128, 5]])
def test_every_token_counts_once(tmp_path, sizes):
    """However documents fall into rows: each is counted as a target once, but for its bos."""
    documents = make_store(tmp_path, sizes)
    batches = list(validation_batches(documents, 8, LENGTH))
    counted = np.concatenate([b.targets[b.weights > 0] for b in batches])
    stream = documents[:]
    wanted = np.delete(stream, documents.starts[:-1])
    assert set(np.unique([b.weights for b in batches])) == {0.0, 1.0}
    np.testing.assert_array_equal(counted, wanted)


def test_feed_places_the_rows():
    """The global batch holds the rows as they came, split over data and seq."""
    rules = sharding.training()
    numbers = np.arange(8 * 32, dtype=np.int32).reshape(8, 32)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        feeding = BatchSharder(TRAIN, rules)
        assert (feeding.index, feeding.count) == (0, 1)
        placed = feeding(numbers)
        np.testing.assert_array_equal(placed, numbers)
        assert placed.sharding.spec == jax.P("data", "seq")
        assert placed.addressable_shards[0].data.shape == (4, 16)


class TwoProcesses:
    """The sharding of (data, seq) over devices of which each process has some."""

    def __init__(self, owners, data, seq):
        self.owners, self.data, self.seq = owners, data, seq

    def devices_indices_map(self, shape):
        rows, length = shape[0] // self.data, shape[1] // self.seq
        found = {}
        for number, owner in enumerate(self.owners):
            i, j = divmod(number, self.seq)
            device = type("Device", (), dict(process_index=owner))()
            found[device] = (
                slice(i * rows, i * rows + rows) if self.data > 1 else slice(None),
                slice(j * length, j * length + length),
            )
        return found


@pytest.mark.parametrize(
    "owners, data, seq, groups",
    [
        ([0, 0, 1, 1], 4, 1, [(0, 2), (1, 2)]),  # each process has its own rows
        ([0, 0, 1, 1], 2, 2, [(0, 2), (1, 2)]),
        ([0, 0, 1, 1], 1, 4, [(0, 1), (0, 1)]),  # a row spans both: they read the same
        ([0, 1, 0, 1], 2, 2, [(0, 1), (0, 1)]),
        ([0, 0, 1, 1, 2, 2, 3, 3], 2, 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([1, 1, 0, 0], 4, 1, [(1, 2), (0, 2)]),  # device order is not process order
    ],
)
def test_processes_that_share_rows_read_alike(one_device, monkeypatch, owners, data, seq, groups):
    feeding = BatchSharder(TRAIN, sharding.training())
    monkeypatch.setattr(feeding, "_sharding", TwoProcesses(owners, data, seq))
    for process, group in enumerate(groups):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert feeding._group() == group


def test_feed_checks_the_mesh():
    rules = sharding.training()
    with jax.set_mesh(make_mesh((2, 2, 2))):
        feed.check(dataclasses.replace(TRAIN, batch_size=6, length=30), rules)
        with pytest.raises(UserError, match=r"train\.batch_size=7 .* mesh\.data=2"):
            feed.check(dataclasses.replace(TRAIN, batch_size=7), rules)
        with pytest.raises(UserError, match=r"train\.length=31 .* mesh\.seq=2"):
            feed.check(dataclasses.replace(TRAIN, length=31), rules)
