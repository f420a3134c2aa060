"""From raw text to a directory that training opens: sources, curation, split, errors."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from prepare_cases import config, essay, read, run, write_essays

from core.config import UserError
from data import store
from data.config import DataConfig
from data.curate import REMOVED, curate
from data.texts import sources
from data.texts.document import Document
from data.tokenizer import load as tokenizers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    return write_essays(tmp_path / "text")


def test_what_is_prepared_is_the_text(tmp_path, folder):
    manifest = run(tmp_path, config(folder))
    train, validation = read(tmp_path, "train"), read(tmp_path, "validation")
    assert train and validation and not set(train) & set(validation)
    expected = {f"{folder}/{n:02d}.txt": essay(n) for n in range(30)}
    assert train | validation == expected
    assert list(train) == sorted(train)

    counts = manifest["documents"]
    assert counts["removed"] == dict(empty=1, binary=1, undecodable=1, duplicate=1)
    assert counts["in"] == 34 == counts["kept"] + sum(counts["removed"].values())
    splits = manifest["splits"]
    assert splits["train"]["bytes"] == sum(len(t.encode()) for t in train.values())
    assert counts["kept"] == splits["train"]["documents"] + splits["validation"]["documents"]
    size = sum(len(text.encode()) for text in expected.values())
    assert manifest["bytes_per_token"] == size / sum(s["tokens"] for s in splits.values())
    # What gzip writes around each file is no part of a text's bits: 10 bytes before, 8 behind.
    packed = sum(len(gzip.compress(text.encode(), 9)) - 18 for text in validation.values())
    bits = 8 * packed / splits["validation"]["bytes"]
    assert manifest["gzip_bits_per_byte"] == pytest.approx(bits)


def test_running_again_replaces_and_gives_the_same_bytes(tmp_path, folder):
    def files():
        found = (p for p in (tmp_path / "run/data").rglob("*") if p.name != ".lock")
        return {str(p): hashlib.sha256(p.read_bytes()).digest() for p in found if p.is_file()}

    data = config(folder, shard_tokens=500)
    run(tmp_path, data)
    first = files()
    assert len(first) > 9  # several shards
    run(tmp_path, data)
    assert files() == first
    run(tmp_path, config(folder, shard_tokens=10**6))
    assert len(files()) == 9  # nothing of the earlier shards is left
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["data"]


def test_the_split_depends_on_the_text_alone(tmp_path, folder):
    run(tmp_path, config(folder))
    before = set(read(tmp_path, "validation").values())
    (folder / "00.txt").rename(folder / "50.txt")
    for number in range(30, 60):
        (folder / f"new{number}.txt").write_text(essay(number))
    run(tmp_path, config(folder))
    after = set(read(tmp_path, "validation").values())
    assert before < after


def test_the_tokenizer_never_sees_validation_text(tmp_path, folder):
    marked = folder / "marked.txt"
    for number in range(100):  # a document that falls on the validation side
        marked.write_text(f"{number} " + "zyzzyva\n" * 200)
        if hashlib.sha256(marked.read_bytes()).digest()[0] < 0.2 * 256 - 1:
            break
    run(tmp_path, config(folder))
    assert str(marked) in read(tmp_path, "validation")
    model = tokenizers.load(tmp_path / "run/data/tokenizer")
    assert len(model.encode("zyzzyva")) == 7  # z and y are bytes, and no piece joins them


def test_curation_counts_add_up():
    raws = [b"a", b"", b"a", b"\0", b"\xff", b"\n\t ", b"b\0", b"b", b"b", b"\xed\xa0\x80"]
    counts = Counter()
    kept = list(curate([Document(str(i), raw) for i, raw in enumerate(raws)], counts))
    assert [text.id for text in kept] == ["0", "7"]
    assert {kind: counts[kind] for kind in REMOVED} == dict(
        empty=2, binary=2, undecodable=2, duplicate=2
    )
    assert counts["in"] == 10 == counts["kept"] + sum(counts[kind] for kind in REMOVED)


def raws(data):
    return [document.raw for document in sources.documents(data)]


def test_every_kind_of_file_is_read(tmp_path):
    rows = [{"text": "one"}, {"text": None}, {"text": "tw\u00f6"}]
    lines = "\n \n".join(json.dumps(row) for row in rows) + "\n\n"  # blank ones are no documents
    deep = tmp_path / "deep/er"
    deep.mkdir(parents=True)
    (tmp_path / "a.JSONL").write_text(lines)
    (deep / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.MD").write_bytes(b"# four\r\n")
    (deep / "e.TXT.GZ").write_bytes(gzip.compress(b"five"))
    (tmp_path / "f[1].py").write_text("six = 6")
    row_texts = [b"one", b"", "tw\u00f6".encode()]
    data = DataConfig(source="files", files=(f"{tmp_path}/**/*.*", f"{tmp_path}/d.MD"))
    expected = [*row_texts, *row_texts, b"# four\r\n", *row_texts, b"five", b"six = 6"]
    assert raws(data) == expected
    assert raws(DataConfig(source="files", files=(f"{tmp_path}/f[1].py",))) == [b"six = 6"]
    ids = [d.id for d in sources.documents(data)]
    assert ids[2] == f"{tmp_path}/a.JSONL:5" and ids[5] == f"{tmp_path}/c.parquet:3"
    limited = DataConfig(source="files", files=data.files, limit_documents=3)
    assert raws(limited) == row_texts


def test_half_a_surrogate_in_jsonl_is_undecodable_not_a_crash(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d"}\n{"text": "\xff"}\n{"text": "fine"}\n')
    data = DataConfig(source="files", files=(f"{tmp_path}/a.jsonl",))
    counts = Counter()
    assert [text.text for text in curate(sources.documents(data), counts)] == ["fine"]
    assert counts["undecodable"] == 2


def test_the_standard_library_comes_without_its_tests():
    data = DataConfig(limit_documents=400)
    found = list(sources.documents(data))
    assert len(found) == 400 and found == list(sources.documents(data))
    ids = [document.id for document in found]
    assert ids == sorted(ids, key=Path) and "argparse.py" in ids
    assert not any({"test", "tests", "site-packages"} & set(Path(i).parts) for i in ids)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a.jsonl line 2 has no field 'text' \(it "),
        ("a.jsonl", b"[1]\n", r"line 1 has no field 'text' \(it is not an object\)"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl line 1: field 'text' is int, not text"),
        ("a.jsonl", b'\n{"text"\n', r"a.jsonl line 2: it is not JSON"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl line 1: it is nested more than 100 levels"),
        ("long.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "line 1: it holds a number of 5,000 digits"),
        ("a.parquet", b"nonsense", r"a.parquet cannot be read"),
        ("a.txt.gz", b"nonsense", r"a.txt.gz cannot be read"),
        # Part of the test's name, which all workers must find the same: no time in it.
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], r"a.jsonl.gz cannot be read"),
        ("a.png", b"", r"a.png is of no known kind; use .txt .md .py .jsonl .parquet or"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        raws(DataConfig(source="files", files=(f"{tmp_path}/*",)))


def test_a_parquet_without_the_column_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "x"}]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has no column 'text' \(it has body\)"):
        raws(DataConfig(source="files", files=(f"{tmp_path}/*",)))


def test_globs_that_match_nothing_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\*.txt matches no file"):
        raws(DataConfig(source="files", files=(f"{tmp_path}/nothing*.txt",)))
    with pytest.raises(UserError, match=r"is a folder; say which files"):
        raws(DataConfig(source="files", files=(str(tmp_path),)))
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    for name, message in {"pipe": "no file, but a pipe or a device", "gone": "a link that"}.items():
        with pytest.raises(UserError, match=f"{name}.txt is {message}"):
            raws(DataConfig(source="files", files=(f"{tmp_path}/{name[0]}*.txt",)))


def test_strings_of_a_parquet_file_that_are_not_utf8_are_undecodable(tmp_path):
    wrong = pyarrow.array([b"caf\xe9", b"fine"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), tmp_path / "a.parquet")
    assert raws(DataConfig(source="files", files=(f"{tmp_path}/*",))) == [b"caf\xe9", b"fine"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(source="files"), "needs at least one glob"),
        (dict(source="tfds"), "needs tfds_name or tfds_dir"),
        (dict(validation_fraction=1.0), "must be < 1"),
        (dict(validation_fraction=0.0), "must be > 0"),
        (dict(source="web"), "'stdlib', 'files', 'tfds'"),
        (dict(vocab_size=100), "must be >= 262"),
    ],
)
def test_a_bad_config_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


def test_a_tokenizer_that_is_there_may_have_fewer_pieces_than_one_to_train():
    assert DataConfig(tokenizer="bytes", vocab_size=257).vocab_size == 257


def test_too_few_documents_say_what_happened(tmp_path, folder):
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(UserError, match="gave 0 usable documents of 0 read: give at least two"):
        run(tmp_path, config(folder, files=(f"{tmp_path}/e.jsonl",)))
    with pytest.raises(UserError, match=r"gave 1 usable documents of 3 read \(1 empty, 1 dup"):
        data = config(folder, files=(f"{folder}/07.txt", f"{folder}/97*", f"{folder}/99*"))
        run(tmp_path, data)
    assert os.listdir(tmp_path / "run/data") == [".lock"]  # nothing half done is left


@pytest.mark.parametrize(("fraction", "split"), [(1e-6, "validate"), (0.999999, "train")])
def test_an_empty_split_says_which_fraction_fits(tmp_path, folder, fraction, split):
    with pytest.raises(UserError, match=f"of 30 to {split} on: set it to") as error:
        run(tmp_path, config(folder, validation_fraction=fraction))
    fits = float(str(error.value).split("set it to ")[1].split()[0])
    splits = run(tmp_path, config(folder, validation_fraction=fits))["splits"]
    assert min(splits["train"]["documents"], splits["validation"]["documents"]) == 1


def test_a_failed_run_leaves_the_data_of_the_run_before(tmp_path, folder):
    run(tmp_path, config(folder))
    before = read(tmp_path, "train")
    with pytest.raises(UserError, match="vocab_size=50000 is more than the text supports"):
        run(tmp_path, config(folder, vocab_size=50000))
    assert read(tmp_path, "train") == before
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["data"]


SLOW = """
import sys, time
from core.config import Experiment
from data import prepare, store
from data.config import DataConfig
close = store.ShardWriter.close
def stop_here(self):
    entry = close(self)
    print("shard written", flush=True)
    time.sleep(60)
    return entry
store.ShardWriter.close = stop_here
data = DataConfig(source="files", files=(sys.argv[1],), vocab_size=300, validation_fraction=0.2)
prepare.main(Experiment(name="x", workdir=sys.argv[2], data=data))
"""


def test_kill_leaves_nothing_that_opens_and_the_next_run_recovers(tmp_path, folder):
    command = [sys.executable, "-c", SLOW, f"{folder}/*.txt", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"shard written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(os.listdir(tmp_path / "run/data")) == [".lock", ".partial"]
    for name in ("data", "data/.partial"):
        with pytest.raises(UserError, match="no prepared data"):
            store.TokenStore(tmp_path / "run" / name, "train")
    run(tmp_path, config(folder))
    assert ".partial" not in os.listdir(tmp_path / "run/data") and read(tmp_path, "train")


CONFIG = """
from core.config import Experiment, editable
from data.config import DataConfig
def get_config(arg=""):
    return editable(Experiment(name="x", workdir=WORKDIR, data=DataConfig(limit_documents=30)))
"""


def test_the_command_prints_a_summary_on_stderr_and_nothing_else(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace("WORKDIR", repr(str(tmp_path / "run"))))
    command = [sys.executable, "-m", "data.prepare", f"--config={path}"]

    def call(*overrides):
        return subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)

    done = call("--config.data.vocab_size=400")
    assert done.returncode == 0 and done.stdout == ""
    assert "validation" in done.stderr and "30 documents = " in done.stderr
    assert len(done.stderr.splitlines()) < 12
    assert len(store.TokenStore(tmp_path / "run/data", "train")) > 1000
    wrong = call("--config.data.source=files", "--config.data.files=nothing/*.txt")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: data.files: nothing/*.txt matches no file")
    assert len(wrong.stderr.splitlines()) == 1


class TinyText(tfds.core.GeneratorBasedBuilder):
    """Five short texts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"body": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(5):
            yield number, {"body": f"t\u00ebxt {number}"}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    TinyText(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


READ = """
import sys
from data.config import DataConfig
from data.texts.sources import documents
for fields in (dict(tfds_dir=sys.argv[1] + "/tiny_text/1.0.0"),
               dict(tfds_dir=sys.argv[1], tfds_name="tiny_text", tfds_split="train[:40%]")):
    data = DataConfig(source="tfds", text_field="body", **fields)
    print(sorted(document.raw.decode() for document in documents(data)))
assert "tensorflow" not in sys.modules
"""


def test_a_tfds_dataset_is_read_without_tensorflow(datasets):
    command = [sys.executable, "-c", READ, str(datasets)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    every, some = map(json.loads, done.stdout.replace("'", '"').splitlines())
    assert every == [f"t\u00ebxt {n}" for n in range(5)]
    assert len(some) == 2 and set(some) < set(every)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(tfds_name="no_such_set"), "no_such_set is neither prepared in .* nor known"),
        (dict(tfds_name="lm1b"), r"lm1b is not prepared in(.|\n)*download_and_prepare"),
        (dict(tfds_name=""), "holds no dataset_info.json"),
        (dict(tfds_name="no/such/name"), "the dataset no/such/name cannot be opened: Parsing"),
        (dict(tfds_name="tiny_text:9.9.9"), "the dataset tiny_text:9.9.9 cannot be opened"),
        (dict(tfds_name="tiny_text"), r"text_field='text' is not in tiny_text \(it has body\)"),
        (dict(tfds_name="tiny_text", text_field="body", tfds_split="dev"), "'dev'.*has train"),
    ],
)
def test_a_bad_tfds_choice_says_what_to_do(datasets, fields, message):
    with pytest.raises(UserError, match=message):
        raws(DataConfig(source="tfds", tfds_dir=str(datasets), **fields))
