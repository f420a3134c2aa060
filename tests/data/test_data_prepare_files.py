"""`data.prepare` and the files of others: none is removed, links are followed, runs do not meet."""

import errno
import os
import shutil

import pytest
from prepare_cases import config, read, run, write_essays

from core.config import UserError
from core.storage import lock
from data import store


@pytest.fixture
def folder(tmp_path):
    return write_essays(tmp_path / "text")


def everything(folder):
    """Each file below, and each link, with what it holds."""
    paths = (p for p in folder.rglob("*") if p.name != ".lock")
    return {p: os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes() for p in paths}


def users_folder(name):
    def make(data, folder):
        shutil.copytree(folder, data / name)
        (data.parent / "data.old").mkdir()
        (data.parent / "data.old/mine.txt").write_text("kept")

    return make


def note_beside_what_was_prepared(data, folder):
    run(data.parents[1], config(folder))
    (data / "note.txt").write_text("mine")


def partial_of_another(data, folder):
    (data / ".partial").mkdir(parents=True)
    (data / ".partial/mine.txt").write_text("mine")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (users_folder("books"), "books/00.txt"),
        (users_folder("."), "00.txt"),
        (note_beside_what_was_prepared, "note.txt"),
        (partial_of_another, "mine.txt"),
        (lambda data, folder: data.write_text("mine"), "data"),
        (lambda data, folder: data.symlink_to(folder), "00.txt"),
        (lambda data, folder: data.symlink_to(data.parent / "gone/data"), "is its disk mounted"),
    ],
    ids=["books", "texts", "note", "partial", "file", "link to texts", "dangling link"],
)
def test_nothing_of_the_users_is_removed(tmp_path, folder, make, named):
    data = tmp_path / "run/data"
    data.parent.mkdir()
    make(data, folder)
    before = everything(tmp_path)
    with pytest.raises(UserError) as error:
        run(tmp_path, config(folder))
    assert named in str(error.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("prepared", [False, True])
def test_texts_inside_the_target_are_refused_first(tmp_path, folder, prepared):
    if prepared:
        run(tmp_path, config(folder))
    inside = tmp_path / "run/data/tokenizer/merges.txt"
    inside.parent.mkdir(parents=True, exist_ok=True)
    inside.write_text("a text\n")
    with pytest.raises(UserError, match=r"data.files: .*merges.txt lies in .*run/data, which"):
        run(tmp_path, config(folder, files=(f"{folder}/*.txt", f"{tmp_path}/run/**/*.txt")))
    assert inside.read_text() == "a text\n"


def test_data_may_be_a_link_to_another_disk(tmp_path, folder):
    """Every run, not only the first, writes to where it leads; the link stays."""
    disk, link = tmp_path / "disk/data", tmp_path / "run/data"
    disk.parent.mkdir()
    link.parent.mkdir()
    link.symlink_to(disk)
    for shard_tokens in (500, 10**6):
        run(tmp_path, config(folder, shard_tokens=shard_tokens))
        assert link.is_symlink() and not disk.is_symlink() and read(tmp_path, "train")
        assert os.listdir(disk.parent) == ["data"] and os.listdir(link.parent) == ["data"]


def test_another_run_that_prepares_or_trains_is_named(tmp_path, folder):
    run(tmp_path, config(folder))
    before = everything(tmp_path)
    for shared in (False, True):
        with (
            lock.hold(tmp_path / "run/data", "", shared),
            pytest.raises(UserError, match=rf"run/data is in use by process {os.getpid()} on"),
        ):
            run(tmp_path, config(folder))
    assert everything(tmp_path) == before


def test_a_full_disk_leaves_the_data_of_the_run_before(tmp_path, folder, monkeypatch):
    run(tmp_path, config(folder))
    before = everything(tmp_path)

    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.ShardWriter, "close", full)
    with pytest.raises(SystemExit, match=r"error: .*run/data could not be written, and what was"):
        run(tmp_path, config(folder))
    assert everything(tmp_path) == before
