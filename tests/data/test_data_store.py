"""The token store reads shards as one array and notices when they were changed."""

import json

import numpy as np
import pytest

from core.config import UserError
from data import store


def make(directory, documents, shard_tokens=20, vocab_size=300):
    dtype = store.token_dtype(vocab_size)
    writer = store.ShardWriter(directory, "train", dtype, shard_tokens)
    for number, tokens in enumerate(documents):
        writer.add(f"doc \u00e9 {number}", np.asarray(tokens), num_bytes=len(tokens) * 3)
    splits = {"train": writer.close()}
    manifest = dict(vocab_size=vocab_size, dtype=dtype.name, splits=splits)
    store.write_manifest(directory, manifest)
    return store.TokenStore(directory, "train")


@pytest.fixture
def documents():
    draw = np.random.default_rng(0)
    sizes = [5, 9, 7, 50, 1, 3, 20, 20, 2, 18]  # 50 is longer than a shard, 20 and 2 + 18 fill one
    return [draw.integers(0, 300, size) for size in sizes]


def test_any_span_equals_the_concatenation(tmp_path, documents):
    tokens = make(tmp_path, documents)
    flat = np.concatenate(documents)
    assert len(tokens) == len(flat) and tokens.num_documents == len(documents)
    assert tokens.num_bytes == 3 * len(flat)
    np.testing.assert_array_equal(tokens.starts, np.cumsum([0] + [len(d) for d in documents]))
    assert len(list(tmp_path.glob("*.bin"))) > 3
    for start in range(len(flat) + 2):
        for stop in range(len(flat) + 2):
            np.testing.assert_array_equal(tokens[start:stop], flat[start:stop])
    np.testing.assert_array_equal(tokens[:], flat)
    assert tokens.names() == [f"doc \u00e9 {i}" for i in range(len(documents))]
    assert tokens.document_bytes().tolist() == [3 * len(d) for d in documents]
    tokens.verify()


def test_a_shard_holds_whole_documents_up_to_its_size(tmp_path, documents):
    make(tmp_path, documents)
    shards = store.read_manifest(tmp_path)["splits"]["train"]["shards"]
    assert [s["tokens"] for s in shards] == [14, 7, 50, 4, 20, 20, 20]
    assert [s["documents"] for s in shards] == [2, 1, 1, 2, 1, 1, 2]


@pytest.mark.parametrize(("vocab_size", "size"), [(300, 2), (65536, 2), (65537, 4)])
def test_tokens_take_as_few_bytes_as_the_vocabulary_allows(tmp_path, vocab_size, size):
    tokens = make(tmp_path, [[0, vocab_size - 1, 7]], vocab_size=vocab_size)
    assert tokens[0:3].tolist() == [0, vocab_size - 1, 7]
    assert (tmp_path / "train-00000.bin").stat().st_size == 3 * size


@pytest.mark.parametrize("suffix", ["bin", "idx", "names"])
def test_tampering_is_found(tmp_path, documents, suffix):
    tokens = make(tmp_path, documents)
    path = tmp_path / f"train-00001.{suffix}"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"train-00001.{suffix} was changed"):
        tokens.verify()


def test_truncation_is_found_at_open_with_both_sizes(tmp_path, documents):
    make(tmp_path, documents)
    path = tmp_path / "train-00002.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00002.bin has 98 bytes.*says 100 bytes"):
        store.TokenStore(tmp_path, "train")
    path.unlink()
    with pytest.raises(UserError, match=r"train-00002.bin is missing"):
        store.TokenStore(tmp_path, "train")


def test_errors_of_the_user(tmp_path, documents):
    with pytest.raises(UserError, match=r"no prepared data.*python -m data.prepare"):
        store.TokenStore(tmp_path / "nothing", "train")
    make(tmp_path, documents)
    with pytest.raises(UserError, match="has train, not 'test'"):
        store.TokenStore(tmp_path, "test")
    path = tmp_path / store.MANIFEST
    manifest = json.loads(path.read_text())
    for other in (1, 99):
        path.write_text(json.dumps(manifest | {"format": other}))
        with pytest.raises(
            UserError, match=f"has format {other}, but this code reads 2: run .*ain"
        ):
            store.TokenStore(tmp_path, "train")
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="manifest.json is damaged"):
        store.TokenStore(tmp_path, "train")


def test_an_unfinished_shard_has_no_name(tmp_path):
    writer = store.ShardWriter(tmp_path, "train", np.dtype("<u2"), 100)
    writer.add("a", np.arange(10), 10)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.bin.partial"]
    writer.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["train-00000.bin", "train-00000.idx", "train-00000.names"]


def test_tokens_and_documents_that_cannot_be_are_refused_by_name(tmp_path, documents):
    """No embedding has a row for such a token, and JAX would take the last one."""
    tokens = make(tmp_path, documents)
    path = tmp_path / "train-00001.bin"
    path.write_bytes(b"\xff\xff" + path.read_bytes()[2:])
    assert len(tokens[:14]) == 14
    with pytest.raises(UserError, match=r"train tokens 10 to 20 hold 65535.*vocab_size=300: run"):
        tokens[10:20]
    path = tmp_path / "train-00002.idx"
    good = path.read_bytes()
    for end in (0, 49, 2**40):
        path.write_bytes(np.array([end], "<u8").tobytes() + good[8:])
        with pytest.raises(UserError, match="train-00002.idx does not cut the 50 tokens"):
            store.TokenStore(tmp_path, "train")
