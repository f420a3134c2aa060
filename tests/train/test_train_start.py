"""A run that starts from a bundle: its weights, a new optimizer, the data from the beginning."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import train_cases
from conftest import make_mesh
from test_train_mistakes import snapshot
from train_cases import bundle_steps, command, copy, cut_back, experiment, rows

from core import sharding, tree
from core.checkpoint import Bundle
from data.loader import train_batches, validation_batches
from data.store import TokenStore
from model import transformer
from model.attention.spec import full, sliding
from model.ops.rope import Rope
from train import initial, pretrain
from train.loop import run
from train.loop.evaluate import evaluate
from train.loop.feed import BatchSharder
from train.step import eval_step

STEPS = dict(steps=6, save_every=3, learning_rate=1e-4)


@pytest.fixture(scope="module")
def tuned(finished, prepared, tmp_path_factory):
    """A workdir in which the finished run's weights were trained on, and the bundle is gone."""
    folder = tmp_path_factory.mktemp("tuned")
    source = copy(finished, folder / "source")
    workdir = copy(prepared, folder / "run")
    pretrain.main(experiment(workdir, start=str(source), **STEPS))
    shutil.rmtree(source)
    return workdir


@contextlib.contextmanager
def begun(described):
    """(what run.start gives, store) on 8 devices."""
    with jax.set_mesh(make_mesh((8, 1, 1))):
        store = TokenStore(Path(described.workdir, "data"), "train")
        found = run.start(described, store, TokenStore(store.directory, "validation"))
        try:
            yield found, store
        finally:
            found.bundle.close()


def test_it_evaluates_as_the_bundle_does(tmp_path, prepared, finished):
    described = experiment(copy(prepared, tmp_path / "run"), start=str(finished))
    with begun(described) as (found, store):
        config = described.train
        validation = TokenStore(store.directory, "validation")
        batches = validation_batches(validation, config.batch_size, config.length)
        feed = BatchSharder(config, found.rules)
        text_bytes = batches.text_bytes(config.eval_batches)
        row = evaluate(found.state.model, batches, feed, text_bytes, config.eval_batches)
        assert row["eval_loss"] == rows(finished, "eval_loss")[12]
        assert found.state.step == 0 and found.data is None
        moments = tree.named_leaves(found.state.opt_state)
        assert moments and not any(np.any(x) for x in moments.values())


def test_its_first_loss_is_the_bundles_on_the_first_batch(tuned, finished):
    described = experiment(finished)
    with begun(described) as (found, store):  # has nothing to do: it is the bundle's last step
        config, feed = described.train, BatchSharder(described.train, found.rules)
        batch = next(train_batches(store, config.batch_size, config.length, config.seed))
        nll, tokens = eval_step(found.state.model, feed(batch))
    losses = rows(tuned)
    assert losses[1] == pytest.approx(float(nll / tokens), rel=1e-6)
    assert losses[1] < 0.9 * rows(finished)[1], "random weights would say so too"
    assert list(losses) == [1, 2, 3, 4, 5, 6]


def test_it_resumes_without_the_bundle(tmp_path, tuned):
    """The source is gone, and its path belongs to the run."""
    start = json.loads((tuned / "config.json").read_text())["train"]["start"]
    assert not Path(start).exists()
    workdir = cut_back(tuned, tmp_path / "run", 3)
    pretrain.main(experiment(workdir, start=start, **STEPS))
    assert rows(workdir) == rows(tuned) and bundle_steps(workdir) == [3, 6]


def test_the_start_may_not_change_on_resume(tmp_path, monkeypatch, capsys, tuned):
    workdir = cut_back(tuned, tmp_path / "run", 3)
    status, err = command(capsys, monkeypatch, experiment(workdir, **STEPS))
    assert status == 2 and "holds another run" in err and "train.start: " in err


def test_a_field_newer_than_the_run_is_no_difference(tmp_path, finished):
    workdir = copy(finished, tmp_path / "run")
    path = workdir / "config.json"
    there = json.loads(path.read_text())
    del there["train"]["start"], there["train"]["start_step"], there["model"]["qk_norm"]
    del there["model"]["pattern"][0]["softcap"]
    path.write_text(json.dumps(there))
    run.check_same(experiment(workdir), workdir)


def test_an_older_step_in_another_dtype_on_another_mesh(tmp_path, prepared, finished):
    workdir = copy(prepared, tmp_path / "run")
    half = dict(param_dtype="bfloat16")
    described = experiment(workdir, model=half, start=str(finished), start_step=4)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        store = TokenStore(workdir / "data", "train")
        model = initial.restore(described, store, sharding.training())
        bundle = Bundle(finished)
        abstract = transformer.abstract(train_cases.MODEL, sharding.training())
        expected = tree.named_leaves(bundle.restore(4, model=abstract)["model"])
        bundle.close()
        found = tree.named_leaves(model)
        placed = tree.named_leaves(transformer.abstract(described.model, sharding.training()))
        for name, x in found.items():
            assert x.dtype == "bfloat16" and x.sharding.spec == placed[name].sharding.spec
            np.testing.assert_array_equal(x, expected[name].astype("bfloat16"))


@pytest.mark.slow
def test_what_differs_in_meaning_is_told(tmp_path, monkeypatch, capsys, prepared, finished):
    longer = dict(
        context=128,
        pattern=(sliding(16), full(rope=Rope(1e6))),
        norm_eps=1e-5,
        activation="gelu",
        attention_kernel="chunked",
    )
    described = experiment(
        copy(prepared, tmp_path / "run"), model=longer, start=str(finished), steps=3
    )
    status, err = command(capsys, monkeypatch, described)
    assert status == 0, err
    assert f"starting from step 12 of {finished}" in err
    for line in (
        "model.context: 64 there, 128 here",
        "model.pattern.0.window: 8 there, 16 here",
        "model.pattern.1.rope.base: 10000.0 there, 1000000.0 here",
        "model.norm_eps: 1e-06 there, 1e-05 here",
        "model.activation: 'silu' there, 'gelu' here",
    ):
        assert f"its model differs in {line}\n" in err
    assert err.count("differs in") == 5, "which kernel computes it is no difference"


WRONG = {  # model, train, what the message says
    "shape": (
        dict(mlp_dim=128),
        {},
        ["mlp.down_FD of (2, 128, 32) is (2, 64, 32)", "model.mlp_dim: 64 there, 128"],
    ),
    "missing": (dict(qk_norm=True), {}, ["k_norm.scale_D", "is not there"]),
    "beyond": (dict(mlp="plain"), {}, ["mlp.gate_DF", "has no place", "configs/finetune.py"]),
    "pattern": (
        dict(pattern=(full(),)),
        {},
        ["stages.0.0", "model.pattern: 2 slots there, 1 here"],
    ),
    "step": ({}, dict(start_step=5), ["step=5 is not in", "4, 8, 12"]),
    "no bundle": ({}, dict(start="nowhere"), ["train.start=nowhere", "config.json"]),
    "no start": ({}, dict(start="", start_step=4), ["start_step=4 with start=''"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bundle_that_does_not_fit(tmp_path, monkeypatch, capsys, prepared, finished, name):
    model, train, said = WRONG[name]
    workdir = copy(prepared, tmp_path / "run")
    before = snapshot(workdir)
    described = experiment(workdir, model=model)
    train = dict(start=str(finished)) | train
    for field, value in train.items():  # as the command line does: checked there
        object.__setattr__(described.train, field, value)
    status, err = command(capsys, monkeypatch, described)
    assert status == 2 and err.count("error: ") == 1 and "Traceback" not in err
    for part in said:
        assert part in err, err
    assert snapshot(workdir) == before, "nothing was written"


def test_data_in_other_tokens(tmp_path, monkeypatch, capsys, prepared, finished):
    workdir = copy(prepared, tmp_path / "run")
    manifest = json.loads((workdir / "data" / "manifest.json").read_text())
    (workdir / "data" / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "f" * 64}))
    before = snapshot(workdir)
    status, err = command(capsys, monkeypatch, experiment(workdir, start=str(finished)))
    assert status == 2 and err.count("error: ") == 1 and snapshot(workdir) == before
    for part in (manifest["tokenizer"][:12], "f" * 12, f"data.tokenizer={finished}/tokenizer"):
        assert part in err


def test_a_bundle_that_speaks_ids_alone(tmp_path, prepared, finished):
    source = copy(finished, tmp_path / "source")
    shutil.rmtree(source / "tokenizer")
    with begun(experiment(copy(prepared, tmp_path / "run"), start=str(source))) as (found, _):
        assert found.state.step == 0


def test_overwriting_the_start_itself(tmp_path, monkeypatch, capsys, finished):
    workdir = copy(finished, tmp_path / "run")
    described = experiment(workdir, start=f"{workdir}/../run", overwrite=True)
    status, err = command(capsys, monkeypatch, described)
    assert status == 2 and "is the workdir of this run" in err
    assert bundle_steps(workdir) == [4, 8, 12]
