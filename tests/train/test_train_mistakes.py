"""What a user or a disk can do wrong to a run: one message, and nothing is lost."""

import errno
import json
from pathlib import Path

import jax
import pytest
import train_cases
from conftest import make_mesh
from train_cases import (
    TRAIN,
    bundle_steps,
    command,
    config_file,
    copy,
    cut_back,
    experiment,
    finish,
    process,
    rows,
)

from core import sharding, tree
from core.checkpoint import Bundle
from core.storage.files import damaged
from model import transformer
from train import optimizer, pretrain, state


def snapshot(workdir):
    """Every file below and what it holds, but for its lock."""
    found = (p for p in sorted(workdir.rglob("*")) if p.is_file() and p.name != ".lock")
    return {path: path.read_bytes() for path in found}


def test_another_run_is_refused(tmp_path, monkeypatch, capsys, finished):
    workdir = copy(finished, tmp_path / "run")
    before = snapshot(workdir)
    other = experiment(workdir, model=dict(mlp_dim=128), seed=7, save_every=1)
    status, err = command(capsys, monkeypatch, other)
    assert status == 2 and "Traceback" not in err
    assert f"workdir={workdir} holds another run" in err
    assert "model.mlp_dim: 64 there, 128 here" in err
    assert "train.seed: 0 there, 7 here" in err
    assert "--config.train.overwrite=True" in err
    assert "save_every" not in err, "how often to save is no other run"
    assert snapshot(workdir) == before


def test_an_imported_model_is_no_run(tmp_path, monkeypatch, capsys, finished):
    workdir = copy(finished, tmp_path / "run")
    told = json.loads((workdir / "config.json").read_text())
    imported = {"name": told["name"], "model": told["model"]}  # all that model.convert writes
    (workdir / "config.json").write_text(json.dumps(imported))
    before = snapshot(workdir)
    status, err = command(capsys, monkeypatch, experiment(workdir))
    assert status == 2
    assert err.splitlines()[-1].startswith(f"error: workdir={workdir} holds a model that no run")
    assert snapshot(workdir) == before


def test_overwrite_starts_again_on_the_same_data(tmp_path, finished):
    workdir = copy(finished, tmp_path / "run")
    data = snapshot(workdir / "data")
    (workdir / "12").rename(workdir / "99")
    first = experiment(workdir, seed=7, overwrite=True)
    pretrain.main(first)
    assert snapshot(workdir / "data") == data
    assert bundle_steps(workdir) == [4, 8, 12], "99 was of the run before"
    assert list(rows(workdir)) == list(range(1, 13))
    assert rows(workdir)[1] != rows(finished)[1]
    assert Bundle(workdir).config(**train_cases.SECTIONS) == first


def test_operational_fields_may_differ(tmp_path, finished):
    workdir = cut_back(finished, tmp_path / "run", 8)
    pretrain.main(experiment(workdir, log_every=2, eval_every=2, save_every=1, keep=2))
    assert bundle_steps(workdir) == [11, 12]
    expected = rows(finished)
    assert rows(workdir) == {step: expected[step] for step in [*range(1, 9), 10, 12]}
    assert list(rows(workdir, "eval_loss")) == [10, 12]


def test_a_run_from_before_data_had_a_tokenizer_goes_on(tmp_path, monkeypatch, capsys, finished):
    workdir = copy(finished, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    assert config["data"].pop("tokenizer") == ""
    (workdir / "config.json").write_text(json.dumps(config))
    status, err = command(capsys, monkeypatch, experiment(workdir))
    assert status == 0 and "step 12 is the last one: nothing to do" in err


def test_finished_run_has_nothing_to_do(tmp_path, monkeypatch, capsys, finished):
    workdir = copy(finished, tmp_path / "run")
    steps = {p: t for p, t in snapshot(workdir).items() if "tensorboard" not in str(p)}
    status, err = command(capsys, monkeypatch, experiment(workdir))
    assert status == 0 and "step 12 is the last one: nothing to do" in err
    assert {p: t for p, t in snapshot(workdir).items() if "tensorboard" not in str(p)} == steps


def test_mistake_before_the_first_checkpoint_is_forgiven(tmp_path, monkeypatch, capsys, prepared):
    """What failed at its start left nothing to protect: the corrected command simply runs."""
    workdir = copy(prepared, tmp_path / "run")
    status, _ = command(capsys, monkeypatch, experiment(workdir, batch_size=12))
    assert status == 2
    pretrain.main(experiment(workdir))
    assert bundle_steps(workdir) == [4, 8, 12]
    assert Bundle(workdir).config(**train_cases.SECTIONS) == experiment(workdir)


def test_data_of_another_tokenizer(tmp_path, monkeypatch, capsys, finished):
    workdir = copy(finished, tmp_path / "run")
    manifest = json.loads((workdir / "data" / "manifest.json").read_text())
    (workdir / "data" / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "f" * 64}))
    status, err = command(capsys, monkeypatch, experiment(workdir))
    assert status == 2 and "Traceback" not in err
    assert manifest["tokenizer"][:12] in err and "f" * 12 in err and "prepared again" in err


MISTAKES = {
    "batch": (dict(batch_size=12), {}, {}, ["train.batch_size=12", "mesh.data=8"]),
    "microbatch": (dict(accumulation=2), {}, {}, ["batch_size=8", "4 rows", "mesh.data=8"]),
    "length": (dict(length=30), dict(data=1, seq=4, model=2), {}, ["length=30", "mesh.seq=4"]),
    "heads": ({}, dict(data=1, model=8), {}, ["model.num_heads=4", "mesh.model=8"]),
    "kv heads": (
        {},
        dict(model=4),
        dict(num_heads=12, num_kv_heads=3),
        ["model.num_kv_heads=3", "mesh.model=4"],
    ),
    "mlp": ({}, dict(model=4), dict(mlp_dim=66), ["model.mlp_dim=66", "mesh.model=4"]),
    "vocabulary": (
        {},
        dict(model=4),
        dict(vocab_size=302),
        ["model.vocab_size=302", "mesh.model=4"],
    ),
    "width": ({}, {}, dict(embed_dim=36), ["model.embed_dim=36", "8"]),
    "devices": ({}, dict(data=3), {}, ["(3, 1, 1)", "8 devices"]),
    "small vocabulary": ({}, {}, dict(vocab_size=296), ["model.vocab_size=296", "300"]),
    "positions": (
        {},
        {},
        dict(learned_positions=True, context=16),
        ["train.length=32", "model.context=16"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_message_with_both_numbers(tmp_path, monkeypatch, capsys, prepared, name):
    train, mesh, model, numbers = MISTAKES[name]
    workdir = copy(prepared, tmp_path / "run")
    status, err = command(capsys, monkeypatch, experiment(workdir, mesh, model, **train))
    assert status == 2, err
    assert err.startswith("error: ") and err.count("error:") == 1 and "Traceback" not in err
    for number in numbers:
        assert number in err, err


def test_strategy_that_cannot_deal_the_heads(tmp_path, monkeypatch, capsys, prepared):
    """Known when the step is traced, after the title."""
    workdir = copy(prepared, tmp_path / "run")
    mesh = dict(data=1, seq=8, strategy="ulysses")
    status, err = command(capsys, monkeypatch, experiment(workdir, mesh))
    assert status == 2 and err.count("error:") == 1 and "Traceback" not in err
    for part in ("mesh.strategy='ulysses'", "8 devices", "4 query heads", "'allgather'"):
        assert part in err


def test_no_prepared_data(tmp_path, monkeypatch, capsys):
    status, err = command(capsys, monkeypatch, experiment(tmp_path / "run"))
    assert status == 2 and "Traceback" not in err
    assert str(tmp_path / "run" / "data") in err and "python -m data.prepare" in err
    assert not (tmp_path / "run").exists()


def test_workdir_that_cannot_be_written(tmp_path, monkeypatch, capsys, prepared):
    """Root may write anywhere, so the file system itself says no here."""
    workdir = copy(prepared, tmp_path / "run")

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(workdir))

    monkeypatch.setattr("shutil.copytree", refuse)
    status, err = command(capsys, monkeypatch, experiment(workdir))
    assert status == 2 and "Traceback" not in err
    assert f"workdir={workdir} cannot be written: Permission denied" in err


def test_workdir_that_became_read_only(tmp_path, monkeypatch, capsys, finished):
    workdir = copy(finished, tmp_path / "run")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != workdir)
    status, err = command(capsys, monkeypatch, experiment(workdir, steps=14))
    assert status == 2 and "Traceback" not in err
    assert f"workdir={workdir} cannot be written" in err


def test_disk_that_fills_up(tmp_path, prepared):
    """A real process may write no file beyond 16 KB after its first save, checkpoints need more."""
    workdir = copy(prepared, tmp_path / "run")
    config = config_file(experiment(workdir, mesh=dict(simulate=8)), tmp_path)
    full = "step == 7 and (loop.run.bundle.wait(), "
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384)))"
    status, err = finish(process(config, full))
    assert status == 1, err
    (message,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert "saving near step" in message and f"step 4 is complete in {workdir}" in message
    good = Bundle(workdir)
    assert good.choose() == 4
    with jax.set_mesh(make_mesh((8, 1, 1))):
        rules = sharding.training()
        names = tree.named_leaves(transformer.abstract(train_cases.MODEL, rules))
        abstract = state.abstract(train_cases.MODEL, rules, optimizer.make(TRAIN, names))
        good.restore(4, model=abstract.model, optimizer=abstract.opt_state)
    pretrain.main(experiment(workdir))
    assert bundle_steps(workdir) == [4, 8, 12]
    left = {p.name for p in workdir.iterdir() if not p.name.isdecimal()}
    assert left == {".lock", "config.json", "tokenizer", "data", "metrics.jsonl", "tensorboard"}


def test_failed_save_keeps_the_good_one(tmp_path, monkeypatch, capsys, prepared):
    """The error comes while step 8 is handed over."""
    workdir = copy(prepared, tmp_path / "run")
    save = Bundle.save

    def full(self, step, items, data):
        if step == 8:
            self.wait()
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, step, items, data)

    monkeypatch.setattr(Bundle, "save", full)
    status, err = command(capsys, monkeypatch, experiment(workdir))
    assert status == 1 and "Traceback" not in err
    assert "saving near step 8 failed; step 4 is complete" in err
    assert "No space left on device" in err
    assert bundle_steps(workdir) == [4] and damaged(workdir / "4") is None
