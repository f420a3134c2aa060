"""Pre-trains a model on prepared data, from the start or from where its run stopped.

    python -m train.pretrain --config=configs/quickstart.py
    python -m train.pretrain --config=configs/quickstart.py:tiny --config.mesh.simulate=8

Writes a bundle into WORKDIR (config.json, tokenizer/, <step>/), metrics.jsonl and TensorBoard
events. SIGTERM and Ctrl-C save and exit with 0; run the same command again to go on.
"""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from core import backend, cli, hardware, layout, tree
from core.config import Experiment
from core.metrics import MetricsWriter
from core.sharding import MeshConfig, make_mesh
from data.config import DataConfig
from data.loader import documents_of, rows_before, train_batches, validation_batches
from data.store import TokenStore
from model.config import ModelConfig
from model.flops import training_flops_per_token
from train import run
from train.config import TrainConfig
from train.evaluate import evaluate
from train.feed import Feed
from train.progress import TrainProgress
from train.run import Run
from train.step import Metrics, make_train_step


def main(experiment: Experiment) -> None:
    """Trains `experiment` to its last step; prints bits per byte beside gzip's."""
    backend.keep_programs(experiment.workdir)
    with jax.set_mesh(make_mesh(experiment.mesh)):
        data = Path(experiment.workdir, "data")
        train, validation = TokenStore(data, "train"), TokenStore(data, "validation")
        begun = run.start(experiment, train)
        try:
            loop = Loop(experiment, begun, train, validation)
            with stop_signals() as asked, loop.progress:
                loop.train(asked)
            loop.metrics.close()
        finally:
            begun.bundle.close()


class Loop:
    """The training loop: one step ahead of its own metrics."""

    def __init__(self, experiment: Experiment, begun: Run, train: TokenStore, val: TokenStore):
        config = self.config = experiment.train
        self.run, self.state, self.store = begun, begun.state, train
        self.feed = Feed(config, begun.rules)
        shard = (self.feed.index, self.feed.count)
        order = layout.order(begun.rules.layout, config.length, begun.rules.ring_size())
        self.batches = train_batches(
            train, config.batch_size, config.length, config.seed, *shard, order
        )
        if begun.data is not None:
            self.batches.set_state(begun.data)
        self.validation = validation_batches(val, config.batch_size, config.length, *shard, order)
        self.manifest = val.manifest
        self.train_step = make_train_step(config, begun.optimizer, begun.rules)
        self.first = int(self.state.step)
        self.metrics = MetricsWriter(begun.bundle.path, self.first)
        self.progress = TrainProgress(config.steps, self.first)
        self.progress.say(self._title(experiment))
        self._flops = {
            name: training_flops_per_token(experiment.model, config.length, convention)
            for name, convention in (("mfu", "seen"), ("mfu_dense", "dense"))
        }
        self._clock, self._clock_step = time.perf_counter(), self.first

    def train(self, asked: list[int]) -> None:
        """Runs to the last step, or to the first signal in `asked`; saves at the end of either."""
        config, pending = self.config, None
        for step in range(self.first + 1, config.steps + 1):
            batch = self.feed(next(self.batches))
            data = self.batches.get_state()
            self.state, metrics = self.train_step(self.state, batch)
            if pending:  # read while this step runs
                self.report(*pending)
            pending = step, data, metrics
            last = step == config.steps or bool(asked)
            saves = last or (config.save_every and step % config.save_every == 0)
            evaluates = step == config.steps or (
                config.eval_every and step % config.eval_every == 0
            )
            if saves or evaluates:
                self.report(*pending)  # nothing is saved before its loss is known to be finite
                pending = None
            if evaluates:
                self.evaluate(step)
            if saves:
                self.save(step, data, wait=last)
            if saves or evaluates:
                self._clock, self._clock_step = time.perf_counter(), step
            if asked:
                name = signal.Signals(asked[0]).name
                self.progress.say(f"{name}: saved step {step}; run the same command to go on")
                return
        if self.first >= config.steps:
            self.progress.say(f"step {self.first} is the last one: nothing to do")

    def report(self, step: int, data: dict[str, int], metrics: Metrics) -> None:
        """Logs a finished step; a loss or gradient that is not finite ends the run."""
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
            self.fail(step, data, values)
        self.progress.step(step, values["loss"])
        if step % self.config.log_every and step != self.config.steps:
            return
        seconds = time.perf_counter() - self._clock
        tokens = (step - self._clock_step) * self.config.batch_size * self.config.length
        rate = tokens / seconds if tokens else None
        self._clock, self._clock_step = time.perf_counter(), step
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

    def evaluate(self, step: int) -> None:
        """Writes eval_loss and bits_per_byte; shows them beside gzip's."""
        split = self.manifest["splits"]["validation"]
        limit = self.config.eval_batches
        row = evaluate(self.state.model, self.validation, self.feed, split, limit)
        gzip = self.manifest["gzip_bits_per_byte"]
        self.metrics.write(step, {**row, "gzip_bits_per_byte": gzip})
        self.progress.say(
            f"step {step}: validation loss {row['eval_loss']:.3f} nats a token = "
            f"{row['bits_per_byte']:.3f} bits per byte | gzip -9 of the same documents {gzip:.3f}"
        )

    def save(self, step: int, data: dict[str, int], wait: bool) -> None:
        """Starts saving, or saves; a failure ends the run and names the step that is still good."""
        bundle = self.run.bundle
        try:
            items = {"model": self.state.model, "optimizer": self.state.opt_state}
            bundle.save(step, items, data)
            if wait:
                bundle.wait()
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


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that the first SIGTERM or Ctrl-C fills; the second one acts as usual."""
    asked: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number, frame):
        asked.append(number)
        for other, handler in usual.items():
            signal.signal(other, handler)

    for number in usual:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    cli.run(main, __doc__, data=DataConfig, model=ModelConfig, mesh=MeshConfig, train=TrainConfig)
