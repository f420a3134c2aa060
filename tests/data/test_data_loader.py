"""Rows say what they should, every row comes once an epoch, and resuming is exact."""

import itertools
import json

import jax
import numpy as np
import pytest

from core.config import UserError
from data import batch, loader, store

FIELDS = ("tokens", "targets", "weights", "positions", "segments")


def make(directory, sizes, shard_tokens=40):
    draw = np.random.default_rng(0)
    directory.mkdir(exist_ok=True)
    writer = store.ShardWriter(directory, "train", np.dtype("<u2"), shard_tokens)
    for number, size in enumerate(sizes):
        tokens = np.concatenate([[1], draw.integers(5, 300, size - 2), [2]])
        writer.add(f"doc{number}", tokens, size)
    manifest = dict(vocab_size=300, dtype="uint16", splits={"train": writer.close()})
    store.write_manifest(directory, manifest)
    return store.TokenStore(directory, "train")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Documents of two tokens up to several rows; 8, 16 end on an edge of rows of 8."""
    sizes = [8, 8, 2, 2, 4, 30, 3, 17, 2, 60, 5, 2, 2, 2, 9, 21, 40, 11, 6, 7]
    return make(tmp_path_factory.mktemp("store"), sizes)


def slow_row(tokens, row, length, restart):
    """What a row must be, one token at a time."""
    flat, ends = tokens[:].tolist(), tokens.starts[1:].tolist()
    document = [sum(end <= i for end in ends) for i in range(len(flat))]
    rows = {name: [] for name in FIELDS}
    first = document[row * length] if row * length < len(flat) else 0
    for i in range(row * length, row * length + length):
        real, follows = i < len(flat), i + 1 < len(flat)
        rows["tokens"].append(flat[i] if real else 0)
        rows["targets"].append(flat[i + 1] if follows else 0)
        rows["weights"].append(float(follows and document[i] == document[i + 1]))
        start = tokens.starts[document[i]] if real else i
        start = max(start, row * length) if restart else start
        rows["positions"].append(i - start)
        rows["segments"].append(document[i] - first + 1 if real else 0)
    return rows


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 30, 200, 241, 242, 500])
def test_rows_equal_the_slow_restatement(tokens, length, restart):
    assert len(tokens) == 241
    for row in range(-(-len(tokens) // length) + 2):
        found = batch.cut(tokens, row, length, restart=restart)
        expected = slow_row(tokens, row, length, restart)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(found, name), expected[name], err_msg=name)
        assert not restart or found.positions.max() < length


def test_learned_positions_stay_within_their_table(tokens):
    """Documents of 60 tokens, rows of 8: in training, and where the loss is told."""
    for batches in (loader.train_batches, loader.validation_batches):
        how = (tokens, 4, 8) + (0,) * (batches is loader.train_batches)
        for restart, most in ((False, 59), (True, 7)):
            found = take(batches(*how, restart=restart), 8)
            assert max(b.positions.max() for b in found) == most


def test_a_row_reads_as_its_documents(tmp_path):
    writer = store.ShardWriter(tmp_path, "train", np.dtype("<u2"), 100)
    writer.add("a", np.array([1, 10, 11, 2]), 2)
    writer.add("b", np.array([1, 20, 21, 22, 2]), 3)
    manifest = dict(vocab_size=300, dtype="uint16", splits={"train": writer.close()})
    store.write_manifest(tmp_path, manifest)
    tokens = store.TokenStore(tmp_path, "train")
    row = batch.cut(tokens, 0, 6)
    assert row.tokens.tolist() == [1, 10, 11, 2, 1, 20]
    assert row.targets.tolist() == [10, 11, 2, 1, 20, 21]
    assert row.weights.tolist() == [1, 1, 1, 0, 1, 1]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1]
    assert row.segments.tolist() == [1, 1, 1, 1, 2, 2]
    row = batch.cut(tokens, 1, 6)  # goes on at position 2 of the second document
    assert row.positions.tolist() == [2, 3, 4, 0, 0, 0]
    assert row.segments.tolist() == [1, 1, 1, 0, 0, 0]
    assert row.weights.tolist() == [1, 1, 0, 0, 0, 0]


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(found, expected):
    assert len(found) == len(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_batches_are_pytrees_of_the_right_types(tokens):
    found = next(loader.train_batches(tokens, 4, 8, seed=0))
    assert isinstance(found, batch.Batch)
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [(4, 8)] * 5
    kinds = {name: getattr(found, name).dtype.name for name in FIELDS}
    assert kinds == {name: "float32" if name == "weights" else "int32" for name in FIELDS}
    doubled = jax.jit(lambda b: jax.tree.map(lambda x: 2 * x, b))(found)
    np.testing.assert_array_equal(doubled.targets, 2 * found.targets)


def test_every_row_comes_once_an_epoch_in_a_new_order(tokens):
    rows = len(loader.RowDataset(tokens, 8))
    assert rows == 30
    batches = loader.train_batches(tokens, 5, 8, seed=3)
    flat = [row.tobytes() for b in take(batches, 12) for row in b.tokens]
    every = sorted(batch.cut(tokens, i, 8).tokens.tobytes() for i in range(rows))
    assert sorted(flat[:rows]) == every and sorted(flat[rows:]) == every
    assert flat[:rows] != flat[rows:]
    other = next(loader.train_batches(tokens, 5, 8, seed=4))
    assert [row.tobytes() for row in other.tokens] != flat[:5]


@pytest.mark.parametrize("done", [0, 1, 5, 9])
def test_resume_gives_the_very_next_batches(tokens, done):
    expected = take(loader.train_batches(tokens, 4, 8, seed=0), 14)
    batches = loader.train_batches(tokens, 4, 8, seed=0)
    take(batches, done)
    state = json.loads(json.dumps(batches.get_state()))
    assert state == {"global_next_index": 4 * done}
    resumed = loader.train_batches(tokens, 4, 8, seed=0)
    resumed.set_state(state)
    assert_equal(take(resumed, 14 - done), expected[done:])
    assert_equal(take(batches, 14 - done), expected[done:])  # get_state took nothing away
    batches.set_state({"global_next_index": 0})
    assert_equal(take(batches, 3), expected[:3])


def test_any_number_of_processes_sees_the_same_batches(tokens):
    expected = take(loader.train_batches(tokens, 4, 8, seed=0), 10)
    for count in (1, 2, 4):
        parts = [loader.train_batches(tokens, 4, 8, 0, index, count) for index in range(count)]
        for step in range(10):
            found = [next(part) for part in parts]
            for index, part in enumerate(found):
                mine = jax.tree.map(lambda x, i=index, n=count: x[i::n], expected[step])
                assert_equal([part], [mine])
        states = [part.get_state() for part in parts]
        assert states == [{"global_next_index": 40}] * count
    half = [loader.train_batches(tokens, 4, 8, 0, index, 2) for index in range(2)]
    for part in half:  # four processes stop after 5 steps, two go on
        part.set_state({"global_next_index": 20})
    found = [next(part) for part in half]
    joined = np.stack([part.tokens for part in found], axis=1).reshape(4, 8)
    np.testing.assert_array_equal(joined, expected[5].tokens)


@pytest.mark.parametrize(
    ("rows", "length"), [(1, 8), (4, 8), (4, 30), (3, 241), (2, 240), (2, 999)]
)
def test_validation_covers_every_token_once(tokens, rows, length):
    batches = list(loader.validation_batches(tokens, rows, length))
    assert len(batches) == len(loader.validation_batches(tokens, rows, length))
    assert all(b.tokens.shape == (rows, length) for b in batches)
    real = np.concatenate([b.tokens[b.segments > 0] for b in batches])
    np.testing.assert_array_equal(real, tokens[:])
    counted = np.concatenate([b.targets[b.weights > 0] for b in batches])
    is_first = np.isin(np.arange(len(tokens)), tokens.starts)
    np.testing.assert_array_equal(counted, tokens[:][~is_first])  # all but bos are predicted once
    assert batches[-1].segments.any()


def test_validation_on_two_processes_is_the_same_rows(tokens):
    whole = list(loader.validation_batches(tokens, 4, 8))
    for index in range(2):
        part = list(loader.validation_batches(tokens, 4, 8, index, 2))
        assert_equal(part, [jax.tree.map(lambda x, i=index: x[i::2], b) for b in whole])


def test_the_documents_of_a_batch_can_be_named(tokens):
    batches = loader.train_batches(tokens, 3, 8, seed=7)
    for _ in range(25):  # past the end of an epoch
        found = next(batches)
        rows = loader.rows_before(batches.get_state(), tokens, 3, 8, seed=7)
        assert_equal([found], [batch.stack([batch.cut(tokens, row, 8) for row in rows])])
        for i, names in enumerate(loader.documents_of(tokens, rows, 8)):
            assert len(names) == found.segments[i].max()
            numbers = [int(name.removeprefix("doc")) for name in names]
            place = rows[i] * 8 - tokens.starts[numbers[0]]
            assert place == found.positions[i, 0]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize(("length", "rows"), [(512, 1), (241, 1), (240, 1), (239, 2), (7, 35)])
def test_an_epoch_trains_on_every_token(tokens, length, rows):
    """The tail too: its row is filled up with padding, which has no weight."""
    batches = loader.train_batches(tokens, 1, length, seed=0)
    for _ in range(2):
        epoch = take(batches, rows)
        counted = np.concatenate([b.targets[b.weights > 0] for b in epoch])
        is_first = np.isin(np.arange(len(tokens)), tokens.starts)
        assert sorted(counted) == sorted(tokens[:][~is_first])
        assert sum((b.segments > 0).sum() for b in epoch) in (240, 241)
    padding = max(0, rows * length - 241)
    told = loader.RowDataset(tokens, length).summary()
    assert told.startswith(f"an epoch is 241 tokens in {rows} row")
    assert (f"{padding} of padding" in told) == (padding > 0)


def test_too_little_text_and_rows_that_do_not_divide(tmp_path):
    writer = store.ShardWriter(tmp_path, "train", np.dtype("<u2"), 40)
    store.write_manifest(
        tmp_path, dict(vocab_size=300, dtype="uint16", splits={"train": writer.close()})
    )
    with pytest.raises(UserError, match="has 0 train tokens, .* prepare more text"):
        loader.train_batches(store.TokenStore(tmp_path, "train"), 1, 11, seed=0)
    tokens = make(tmp_path, [9, 2])
    with pytest.raises(UserError, match="batch_size=3 does not divide into 2 processes"):
        loader.train_batches(tokens, 3, 4, 0, 0, 2)
    with pytest.raises(UserError, match="batch_size=3 does not divide into 2 processes"):
        loader.validation_batches(tokens, 3, 4, 0, 2)
