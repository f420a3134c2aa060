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
    writer = store.Writer(directory, "train", np.dtype("<u2"), shard_tokens)
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


def slow_row(tokens, row, length):
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
        rows["positions"].append(i - start)
        rows["segments"].append(document[i] - first + 1 if real else 0)
    return rows


@pytest.mark.parametrize("length", [1, 2, 3, 8, 30, 200, 241, 242, 500])
def test_rows_equal_the_slow_restatement(tokens, length):
    assert len(tokens) == 241
    for row in range(-(-len(tokens) // length) + 2):
        found, expected = batch.cut(tokens, row, length), slow_row(tokens, row, length)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(found, name), expected[name], err_msg=name)


def test_a_row_reads_as_its_documents(tmp_path):
    writer = store.Writer(tmp_path, "train", np.dtype("<u2"), 100)
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
    rows = len(loader.Windows(tokens, 8))
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


def test_too_little_text_for_a_row_says_both_numbers(tmp_path):
    tokens = make(tmp_path, [9, 2])
    message = r"11 train tokens.*train.length=11 needs 12.*at most 10"
    with pytest.raises(UserError, match=message):
        loader.train_batches(tokens, 1, 11, seed=0)
    assert next(loader.train_batches(tokens, 2, 10, seed=0)).tokens.shape == (2, 10)
    with pytest.raises(UserError, match="batch_size=3 does not divide into 2 processes"):
        loader.train_batches(tokens, 3, 4, 0, 0, 2)
    with pytest.raises(UserError, match="batch_size=3 does not divide into 2 processes"):
        loader.validation_batches(tokens, 3, 4, 0, 2)
