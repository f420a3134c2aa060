"""A run and the files of others in its workdir: none is removed or replaced, and each is named."""

import dataclasses
import json
import os
import shutil

import pytest
from train_cases import bundle_steps, command, copy, cut_back, experiment, rows

from core.checkpoint import Bundle
from core.config import UserError
from core.storage import lock
from core.storage.files import LISTING
from data import prepare
from train import pretrain


def users(workdir):
    """What a user may have in a folder: names that this program uses too."""
    kept = {}
    for name in ("1984/novel.txt", "2024/photos/1.jpg", "007/bond.txt", "tensorboard/note.md"):
        path = workdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the only copy of {name}")
        kept[path] = path.read_bytes()
    # Listings of another program, one of them in the form of ours.
    (workdir / "2024" / LISTING).write_text('["photos/1.jpg"]')
    (workdir / "1984" / LISTING).write_text('{"novel.txt": 30}')
    return kept


def test_folders_that_are_called_like_steps_stay(tmp_path, finished):
    """Whether `keep`, `overwrite` or the start of a run removes steps."""
    workdir = copy(finished, tmp_path / "run")
    kept = users(workdir)
    pretrain.main(experiment(workdir, keep=1, overwrite=True))
    assert {path: path.read_bytes() for path in kept} == kept
    assert Bundle(workdir).steps() == [12] and Bundle(workdir).choose() == 12


def in_the_way(name, content="mine", **more):
    """Writes a file into a workdir, and others of its folder."""

    def make(workdir):
        path = workdir / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        for other, text in more.items():
            (path.parent / other).write_text(text)

    return make


HF = json.dumps({"model_type": "llama", "hidden_size": 64})
FOREIGN = {
    "step": (in_the_way("4/notes.txt"), "holds notes.txt, which this program did not write"),
    "step with a listing": (
        lambda workdir: (
            in_the_way("4/a")(workdir),
            in_the_way(f"4/{LISTING}", '{"a": 4}')(workdir),
        ),
        "holds a, which this program did not write",
    ),
    "step that is a file": (in_the_way("4"), "4 is in the way"),
    "tokenizer": (in_the_way("tokenizer/mine.json"), "tokenizer holds mine.json"),
    "saving": (in_the_way("saving/mine.txt"), "saving holds mine.txt"),
    "config of a checkpoint": (in_the_way("config.json", HF), "config.json is not the config of"),
    "config cut off": (in_the_way("config.json", '{"name": "ti'), "config.json is damaged"),
    "saving with a listing": (in_the_way(f"saving/{LISTING}", "[]"), "files.json is damaged"),
    "metrics": (in_the_way("metrics.jsonl", "{}\n"), "metrics.jsonl is there, but no run of"),
    "tensorboard": (in_the_way("tensorboard"), "tensorboard is no folder"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_in_the_way_is_named(tmp_path, prepared, name, overwrite):
    make, message = FOREIGN[name]
    workdir = copy(prepared, tmp_path / "run")
    make(workdir)
    before = everything(workdir)
    with pytest.raises(UserError, match=message):
        pretrain.main(experiment(workdir, overwrite=overwrite))
    assert everything(workdir) == before


def everything(workdir):
    paths = (p for p in workdir.rglob("*") if p.is_file() and p.name != ".lock")
    return {path: path.read_bytes() for path in paths if "programs" not in path.parts}


def test_steps_without_their_config_are_not_begun_again(tmp_path, finished):
    workdir = copy(finished, tmp_path / "run")
    (workdir / "config.json").unlink()
    before = everything(workdir)
    with pytest.raises(UserError, match="config.json"):
        pretrain.main(experiment(workdir))
    assert everything(workdir) == before


@pytest.mark.parametrize("listing", ["", '{"model/d/x": ', None, "here too"])
def test_damage_of_the_newest_step(tmp_path, finished, listing):
    """Nothing is trained that could not be saved: what is not proven ours must be moved first."""
    workdir = copy(finished, tmp_path / "run")
    path = workdir / "12" / LISTING
    if listing is None:
        path.unlink()
    elif listing == "here too":
        (workdir / "12" / "notes.txt").write_text("mine")
        os.truncate(workdir / "12" / "_CHECKPOINT_METADATA", 1)
    else:
        path.write_text(listing)
    before = everything(workdir)
    with pytest.raises(UserError, match=r"12.*move it away") as error:
        pretrain.main(experiment(workdir))
    if listing not in (None, "here too"):
        assert f"{path} is damaged" in str(error.value)
        with pytest.raises(UserError, match=r"files.json is damaged.*; step=8 is complete"):
            Bundle(workdir).choose(12)
    assert everything(workdir) == before
    assert Bundle(workdir).choose() == 8


def test_one_run_at_a_time(tmp_path, prepared):
    workdir = copy(prepared, tmp_path / "run")
    before = everything(workdir)
    for folder in (workdir, workdir / "data"):
        named = rf"{folder} is in use by process {os.getpid()} on .* since"
        with lock.hold(folder, ""), pytest.raises(UserError, match=named):
            pretrain.main(experiment(workdir))
    assert everything(workdir) == before


def test_data_that_was_prepared_again(tmp_path, monkeypatch, capsys, prepared, finished):
    """More texts, the same config and tokenizer: refused, or said and gone on with."""
    workdir = cut_back(finished, tmp_path / "run", 8)
    shutil.copytree(prepared.parent / "texts", tmp_path / "texts")
    for number in range(5):
        (tmp_path / "texts" / f"new{number}.txt").write_text(f"the ship sails {number}\n" * 20)
    given = experiment(workdir)
    monkeypatch.chdir(tmp_path)
    data = dataclasses.replace(given.data, tokenizer=str(workdir / "tokenizer"))
    prepare.main(dataclasses.replace(given, data=data, workdir=str(tmp_path / "again")))
    shutil.rmtree(workdir / "data")
    copy(tmp_path / "again/data", workdir / "data")
    before = everything(workdir)
    status, err = command(capsys, monkeypatch, given)
    assert status == 2 and "the train data is not what step 8 was trained on" in err
    assert everything(workdir) == before
    status, err = command(capsys, monkeypatch, experiment(workdir, data_changed=True))
    assert status == 0 and "is not what step 8 was trained on: it goes on" in err
    assert bundle_steps(workdir) == [4, 8, 12] and list(rows(workdir)) == list(range(1, 13))
    status, err = command(capsys, monkeypatch, given)
    assert status == 0 and "step 12 is the last one" in err, "step 12 is of the new data"
