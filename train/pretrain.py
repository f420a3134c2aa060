"""Pre-trains a model on prepared data, from the start or from where its run stopped.

    python -m train.pretrain --config=configs/quickstart.py
    python -m train.pretrain --config=configs/quickstart.py:tiny --config.mesh.simulate=8

Writes a bundle into WORKDIR (config.json, tokenizer/, <step>/), metrics.jsonl and TensorBoard
events. SIGTERM and Ctrl-C save and exit with 0; run the same command again to go on.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from core import backend, layout, tree
from core.command import cli
from core.compile import hardware
from core.config import Experiment, UserError
from core.metrics import MetricsWriter
from core.sharding import MeshConfig, make_mesh
from core.storage import files, lock
from data.batch import Batch
from data.config import DataConfig
from data.loader import (
    RowDataset,
    documents_of,
    rows_before,
    train_batches,
    validation_batches,
)
from data.store import TokenStore, read_manifest
from model.config import ModelConfig
from model.sizes.flops import training_flops_per_token
from train.config import TrainConfig
from train.loop import run
from train.loop.evaluate import evaluate
from train.loop.feed import BatchSharder
from train.loop.progress import TrainProgress
from train.loop.run import Run
from train.loop.stop import Stop
from train.step import Metrics, make_train_step


def main(experiment: Experiment) -> None:
    """Trains `experiment` to its last step; prints bits per byte beside gzip's."""
    backend.keep_programs(experiment.workdir)
    with jax.set_mesh(make_mesh(experiment.mesh)), alone(experiment) as data:
        train, validation = TokenStore(data, "train"), TokenStore(data, "validation")
        begun = run.start(experiment, train, validation)
        try:
            with Stop() as stop:
                loop = Loop(experiment, begun, train, validation, stop)
                with loop.progress:
                    loop.train()
                loop.metrics.close()
        finally:
            begun.bundle.close()


@contextlib.contextmanager
def alone(experiment: Experiment) -> Iterator[Path]:
    """Gives the data's folder while no other run writes to the workdir or prepares the data.

    Process 0 holds the locks for all.
    """
    workdir = Path(experiment.workdir)
    data = files.followed(workdir / "data")
    read_manifest(data)  # the workdir is there, then
    with contextlib.ExitStack() as locks:

        def take() -> None:
            locks.enter_context(lock.hold(workdir, "name another workdir"))
            locks.enter_context(lock.hold(data, "try again when it is prepared", shared=True))

        run.in_first_process(take)
        yield data


class Stopped(Exception):
    """A signal asked to stop in the midst of an evaluation."""


class Loop:
    """The training loop: one step ahead of its own metrics."""

    def __init__(
        self, experiment: Experiment, begun: Run, train: TokenStore, val: TokenStore, stop: Stop
    ):
        config = self.config = experiment.train
        self.run, self.state, self.store, self.stop = begun, begun.state, train, stop
        self.feed = BatchSharder(config, begun.rules)
        order = layout.order(begun.rules.layout, config.length, begun.rules.ring_size())
        # A position of the whole document may be beyond the table: JAX would take its last row.
        how = self.feed.index, self.feed.count, order, experiment.model.learned_positions
        self.batches = train_batches(train, config.batch_size, config.length, config.seed, *how)
        if begun.data is not None:
            self.batches.set_state(begun.data)
        self.validation = validation_batches(val, config.batch_size, config.length, *how)
        self.manifest = val.manifest
        self.train_step = make_train_step(config, begun.optimizer, begun.rules)
        self.first = int(self.state.step)
        self.metrics = MetricsWriter(begun.bundle.path, self.first, begun.evaluation_owed)
        self.progress = TrainProgress(config.steps, self.first)
        self.progress.say(self._title(experiment))
        self.progress.say(RowDataset(train, config.length).summary())
        self._flops = {
            name: training_flops_per_token(experiment.model, config.length, convention)
            for name, convention in (("mfu", "seen"), ("mfu_dense", "dense"))
        }
        self._clock, self._tokens = time.perf_counter(), 0.0

    def train(self) -> None:
        """Runs to the last step, or until a signal asks to stop; saves at the end of either."""
        config, pending = self.config, None
        if self.run.evaluation_owed and not self.evaluate(self.first):
            self.progress.say(f"{self.stop.asked()}: step {self.first} is saved already")
            return
        for step in range(self.first + 1, config.steps + 1):
            batch = self.feed(next(self.batches))
            data = self.batches.get_state()
            self.state, metrics = self.train_step(self.state, batch)
            if pending:  # read while this step runs
                self.report(*pending)
            pending = step, data, metrics
            # Read once: what is saved and what is said must come from the same answer.
            stopping = self.stop.asked()
            evaluates = step == config.steps or (
                config.eval_every and step % config.eval_every == 0
            )
            saves = step == config.steps or (config.save_every and step % config.save_every == 0)
            if saves or evaluates or stopping:
                self.report(*pending)  # nothing is saved before its loss is known to be finite
                pending = None
            evaluated = bool(evaluates) and not stopping and self.evaluate(step)
            if evaluates and not evaluated:
                stopping = self.stop.asked()
            if saves or stopping:
                last = step == config.steps or bool(stopping)
                self.save(step, data, evaluates and not evaluated, wait=last)
            if saves or evaluates:
                self._clock, self._tokens = time.perf_counter(), 0.0
            if stopping:
                self.progress.say(f"{stopping}: saved step {step}; run the same command to go on")
                return
        if self.first >= config.steps:
            self.progress.say(f"step {self.first} is the last one: nothing to do")

    def report(self, step: int, data: dict[str, int], metrics: Metrics) -> None:
        """Logs a finished step; a loss or gradient that is not finite ends the run."""
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
            self.fail(step, data, values)
        self.progress.step(step, values["loss"])
        self._tokens += values["tokens_read"]
        if step % self.config.log_every and step != self.config.steps:
            return
        rate = self._tokens / (time.perf_counter() - self._clock)
        self._clock, self._tokens = time.perf_counter(), 0.0
        peak = hardware.peak_flops(jax.devices()[0])
        used = {
            name: flops * rate / (peak * jax.device_count()) if peak and rate else None
            for name, flops in self._flops.items()
        }
        row = {
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens_per_second": rate,
            **used,
        }
        self.metrics.write(step, row)
        self.progress.row(step, row)

    def evaluate(self, step: int) -> bool:
        """Writes eval_loss and bits_per_byte; shows them beside gzip's.

        Returns whether it came to its end: a signal cuts it off, since what sent it may not wait.
        """
        limit = self.config.eval_batches
        text_bytes = self.validation.text_bytes(limit)
        try:
            row = evaluate(self.state.model, self._until_stopped(), self.feed, text_bytes, limit)
        except Stopped:
            return False
        gzip = self.manifest["gzip_bits_per_byte"]
        self.metrics.write(step, {**row, "gzip_bits_per_byte": gzip})
        whole = not 0 < limit < len(self.validation)
        part = "" if whole else f" in the first {limit} of {len(self.validation)} batches"
        self.progress.say(
            f"step {step}: validation loss {row['eval_loss']:.3f} nats a token = "
            f"{row['bits_per_byte']:.3f} bits per byte{part} | gzip -9 of "
            f"{'the same' if whole else 'all'} documents {gzip:.3f}"
        )
        return True

    def _until_stopped(self) -> Iterator[Batch]:
        for batch in self.validation:
            if self.stop.asked():
                raise Stopped
            yield batch

    def save(self, step: int, data: dict[str, int], evaluation_owed: bool, wait: bool) -> None:
        """Starts saving, or saves; a failure ends the run and names the step that is still good.

        A run that resumes here evaluates first if the evaluation is owed.
        """
        bundle = self.run.bundle
        told = {**data, "digests": self.run.digests, "evaluation_owed": evaluation_owed}
        try:
            items = {"model": self.state.model, "optimizer": self.state.opt_state}
            bundle.save(step, items, told)
            if wait:
                bundle.wait()
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds for a full disk
            good = [s for s in bundle.steps() if bundle.is_complete(s)]
            newest = f"step {good[-1]} is complete" if good else "no step is complete"
            sys.exit(f"error: saving near step {step} failed; {newest} in {bundle.path}\n{error}")

    def fail(self, step: int, data: dict[str, int], values: dict[str, float]) -> None:
        """Exits with 1: names the step, the figures and the documents; saves nothing."""
        config = self.config
        rows = rows_before(data, self.store, config.batch_size, config.length, config.seed)
        names = {n for row in documents_of(self.store, rows, config.length) for n in row}
        figures = ", ".join(f"{name} {value}" for name, value in values.items())
        sys.exit(
            f"error: step {step} is not finite: {figures}. Nothing was saved after it. "
            f"Its batch held {', '.join(sorted(names))}. "
            "Lower train.learning_rate, or look at these documents"
        )

    def _title(self, experiment: Experiment) -> str:
        model, config = self.state.model, self.config
        device = jax.devices()[0].device_kind
        return (
            f"{experiment.name}: {tree.num_elements(model) / 1e6:.2f}M parameters, "
            f"{config.steps} steps of {config.batch_size} x {config.length} tokens "
            f"on {jax.device_count()} x {device}"
        )


if __name__ == "__main__":
    cli.run(main, __doc__, data=DataConfig, model=ModelConfig, mesh=MeshConfig, train=TrainConfig)
