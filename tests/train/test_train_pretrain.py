"""A run from its first step to its last, stopped, killed, spoiled and moved on the way."""

import json
import math
import os
import signal
import socket
import time

import jax
import numpy as np
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

from core import sharding
from core.checkpoint import Bundle
from core.storage.files import damaged
from data.store import TokenStore
from model import transformer
from model.config import ModelConfig
from train import optimizer, pretrain
from train.loop.stop import Stop

KEYS = {"step", "loss", "tokens_per_second", "mfu", "grad_norm", "learning_rate"}


def at_step(monkeypatch, number, action):
    """Runs `action(loop)` before step `number` is reported."""
    report = pretrain.Loop.report

    def reported(self, step, data, metrics):
        if step == number:
            action(self)
        report(self, step, data, metrics)

    monkeypatch.setattr(pretrain.Loop, "report", reported)


def test_metrics(finished):
    """The rows and keys that COMMANDS.md promises."""
    found = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    *train, last = found
    assert [row["step"] for row in train] == list(range(1, 13))
    assert all(row.keys() >= KEYS for row in train)
    assert last.keys() >= {"step", "eval_loss", "bits_per_byte"} and last["step"] == 12
    losses = [row["loss"] for row in train]
    assert losses[0] == pytest.approx(math.log(304), rel=0.02)
    assert losses[-1] < losses[0] - 0.5, "it learns"
    assert last["eval_loss"] == pytest.approx(losses[-1], rel=0.1)
    rate = optimizer.schedule(TRAIN)
    rates = [float(rate(s)) for s in range(12)]
    assert [row["learning_rate"] for row in train] == pytest.approx(rates, rel=1e-6)
    assert any((finished / "tensorboard").iterdir())


def test_bundle_opens_by_itself(finished):
    bundle = Bundle(finished)
    described = bundle.config(**train_cases.SECTIONS)
    assert described == experiment(finished)
    assert bundle.steps() == [4, 8, 12] and all(map(bundle.is_complete, bundle.steps()))
    assert bundle.tokenizer == finished / "tokenizer"
    with jax.set_mesh(make_mesh((1, 1, 1))):
        abstract = transformer.abstract(bundle.config(model=ModelConfig).model, sharding.whole())
        items = bundle.restore(12, model=abstract)
    assert items["data"].pop("digests").keys() == {"train", "validation"}
    assert items["data"] == {"global_next_index": 12 * 8, "evaluation_owed": False}
    assert np.isfinite(np.asarray(items["model"].embedding_VD[...])).all()


def test_killed_run_goes_on_bit_for_bit(tmp_path, prepared, finished):
    """kill -9 with one complete checkpoint and another under way."""
    workdir = copy(prepared, tmp_path / "run")
    config = config_file(experiment(workdir, mesh=dict(simulate=8)), tmp_path)
    running = process(config, "time.sleep(0.2)")
    until = time.monotonic() + 240
    while damaged(workdir / "4") and running.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    running.kill()
    assert finish(running)[0] == -signal.SIGKILL
    assert damaged(workdir / "4") is None and 4 <= max(rows(workdir)) < 12
    status, err = finish(process(config))
    assert status == 0, err
    assert "resuming from step 4" in err
    assert rows(workdir) == rows(finished)
    assert rows(workdir, "grad_norm") == rows(finished, "grad_norm")
    assert rows(workdir, "eval_loss") == rows(finished, "eval_loss")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_signal_saves_and_the_next_run_goes_on(
    tmp_path, monkeypatch, capsys, prepared, finished, number
):
    workdir = copy(prepared, tmp_path / "run")
    usual = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda loop: os.kill(os.getpid(), number))
        status, err = command(capsys, patch, experiment(workdir))
    assert status == 0
    (stopped,) = (s for s in bundle_steps(workdir) if s != 4)
    assert 5 <= stopped <= 7, "it stops at once"
    assert f"{number.name}: saved step {stopped}; run the same command to go on" in err
    assert damaged(workdir / str(stopped)) is None
    assert signal.getsignal(number) is usual
    pretrain.main(experiment(workdir))
    assert rows(workdir) == rows(finished)


def test_sigterm_of_a_real_process_exits_with_0(tmp_path, prepared):
    workdir = copy(prepared, tmp_path / "run")
    config = config_file(experiment(workdir, mesh=dict(simulate=8)), tmp_path)
    status, err = finish(process(config, "step == 3 and os.kill(os.getpid(), signal.SIGTERM)"))
    assert status == 0, err
    assert "SIGTERM: saved step" in err and "Traceback" not in err
    (step,) = bundle_steps(workdir)
    assert damaged(workdir / str(step)) is None


def test_second_signal_stops_at_once():
    """The first is answered; the second does what it always did."""
    usual = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        assert not stop.asked() and signal.getsignal(signal.SIGINT) is not usual
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked() == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) is usual
    with Stop():
        assert signal.getsignal(signal.SIGINT) is not usual
    assert signal.getsignal(signal.SIGINT) is usual


@pytest.mark.parametrize("step", [6, *(pytest.param(s, marks=pytest.mark.slow) for s in (4, 12))])
def test_signal_in_an_evaluation(tmp_path, monkeypatch, capsys, prepared, finished, step):
    """At a step that is saved anyway, at one that is not, and at the last: it is saved, and the
    next run evaluates there first.
    """
    workdir = copy(prepared, tmp_path / "run")
    given = experiment(workdir, eval_every=2)
    usual = pretrain.evaluate

    def evaluate(model, batches, *args):
        current = max(rows(workdir))

        def signalled():
            for number, batch in enumerate(batches):
                if (current, number) == (step, 1):
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        return usual(model, signalled(), *args)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "evaluate", evaluate)
        status, err = command(capsys, patch, given)
    assert status == 0
    assert f"SIGTERM: saved step {step}; run the same command to go on" in err
    assert bundle_steps(workdir)[-1] == step and damaged(workdir / str(step)) is None
    assert step not in rows(workdir, "eval_loss")
    for _ in range(2):
        pretrain.main(given)
        assert rows(workdir) == rows(finished)
        assert list(rows(workdir, "eval_loss")) == [2, 4, 6, 8, 10, 12]


def documents_in(batch, store):
    """The names of the documents in the rows of `batch`, found by their tokens."""
    stream = store[:].astype(np.int32)
    edges, names = store.starts[1:], store.names()
    found = set()
    for row in np.asarray(batch.tokens):
        windows = np.lib.stride_tricks.sliding_window_view(stream, len(row))
        (start,) = np.flatnonzero((windows == row).all(axis=1))
        found |= {names[np.searchsorted(edges, i, "right")] for i in (start, start + len(row) - 1)}
    return found


def test_loss_that_is_not_finite(tmp_path, monkeypatch, capsys, prepared):
    """At a step that would be saved: it is not, and the message says what was in the batch."""
    workdir = copy(prepared, tmp_path / "run")
    seen = []
    make = pretrain.make_train_step

    def poisoned(*args):
        good = make(*args)

        def step(current, batch):
            seen.append(jax.tree.map(np.asarray, batch))
            current, metrics = good(current, batch)
            return current, metrics | {"loss": metrics["loss"] * (np.nan if len(seen) == 8 else 1)}

        return step

    monkeypatch.setattr(pretrain, "make_train_step", poisoned)
    status, err = command(capsys, monkeypatch, experiment(workdir))
    assert status == 1
    (message,) = (line for line in err.splitlines() if line.startswith("error:"))
    assert "step 8 is not finite: " in message and "loss nan" in message
    held = set(message.partition("Its batch held ")[2].partition(". ")[0].split(", "))
    store = TokenStore(workdir / "data", "train")
    assert held >= documents_in(seen[7], store)
    assert len(held) < store.num_documents, "it names them all"
    assert bundle_steps(workdir) == [4] and damaged(workdir / "4") is None
    assert max(rows(workdir)) == 7, "a figure that is not finite is no row"


@pytest.mark.slow
def test_learning_rate_of_a_real_process_is_too_high(tmp_path, prepared):
    workdir = copy(prepared, tmp_path / "run")
    mesh = dict(simulate=1)
    config = config_file(experiment(workdir, mesh=mesh, learning_rate=1e30), tmp_path)
    status, err = finish(process(config))
    assert status == 1
    assert "Traceback" not in err
    assert err.count("error:") == 1 and "is not finite: " in err and "nan" in err
    assert bundle_steps(workdir) == []


@pytest.mark.parametrize("sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_goes_on_on_another_mesh(tmp_path, monkeypatch, finished, sizes):
    workdir = cut_back(finished, tmp_path / "run", 8)
    monkeypatch.setattr(pretrain, "make_mesh", lambda config: make_mesh(sizes))
    pretrain.main(experiment(workdir))
    found, expected = rows(workdir), rows(finished)
    assert [found[s] for s in range(1, 9)] == [expected[s] for s in range(1, 9)]
    for step in range(9, 13):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step


@pytest.mark.slow
def test_goes_on_around_a_ring_in_another_order(tmp_path, monkeypatch, finished):
    workdir = cut_back(finished, tmp_path / "run", 8)
    orders = []

    def look(loop):
        batches = next(loop.batches), loop.validation[0]
        orders.extend(np.diff(batch.positions * (batch.segments == 1)) for batch in batches)

    at_step(monkeypatch, TRAIN.steps, look)
    mesh = dict(data=2, seq=2, model=2, strategy="ring", layout="zigzag")
    pretrain.main(experiment(workdir, mesh=mesh))
    for name in ("loss", "eval_loss"):
        assert rows(workdir, name) == pytest.approx(rows(finished, name), rel=1e-4), name
    assert all((steps > 1).any() for steps in orders), "the rows were not permuted"


@pytest.mark.parametrize("spoil", ["truncate", pytest.param("remove", marks=pytest.mark.slow)])
def test_incomplete_newest_step(tmp_path, monkeypatch, capsys, finished, spoil):
    workdir = copy(finished, tmp_path / "run")
    largest = max((workdir / "12").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    if spoil == "truncate":
        os.truncate(largest, largest.stat().st_size - 1)
    else:
        largest.unlink()
    status, err = command(capsys, monkeypatch, experiment(workdir))
    assert status == 0
    assert f"step 12 is skipped: {largest}" in err and "using step 8" in err
    assert "resuming from step 8" in err
    assert rows(workdir) == rows(finished)
    assert damaged(workdir / "12") is None


def together(config, at_step):
    """Two processes of one run, which do `at_step` before they report a step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    return [
        process(config, at_step, **dict(zip(names, (address, "2", str(index)), strict=True)))
        for index in range(2)
    ]


@pytest.mark.slow
def test_two_processes(tmp_path, prepared, finished):
    """Four devices each train as eight of one process do; one process opens what they saved."""
    workdir = copy(prepared, tmp_path / "run")
    config = config_file(experiment(workdir, mesh=dict(simulate=4)), tmp_path)
    both = together(config, "step == 9 and os._exit(9)")
    ends = [finish(running) for running in both]
    assert all(status != 0 for status, _ in ends), ends
    assert bundle_steps(workdir)[0] == 4 and damaged(workdir / "4") is None, ends
    expected, found = rows(finished), rows(workdir)
    for step in range(1, 8):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step
    pretrain.main(experiment(workdir))
    assert bundle_steps(workdir) == [4, 8, 12]
    for step, loss in rows(workdir).items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("who", ["one", "both, 50 ms apart"])
def test_two_processes_stop_at_the_same_step(tmp_path, prepared, finished, number, who):
    """Whichever process the signal comes to, all of them save one step, and say so."""
    workdir = copy(prepared, tmp_path / "run")
    mesh = dict(simulate=4)
    config = config_file(
        experiment(workdir, mesh, steps=2000, save_every=0, log_every=50), tmp_path
    )
    signalled = f"os.kill(os.getpid(), signal.{number.name})"
    both = "jax.process_index() and time.sleep(0.05), " if who != "one" else ""
    only = "jax.process_index() == 1 and " if who == "one" else ""
    running = together(config, f"step == 20 and ({both}{only}{signalled})")
    ends = [finish(one) for one in running]
    assert [status for status, _ in ends] == [0, 0], ends
    (step,) = bundle_steps(workdir)
    assert 20 <= step < 2000 and damaged(workdir / str(step)) is None
    assert f"SIGTERM: saved step {step}; run the same command to go on" in ends[0][1]
