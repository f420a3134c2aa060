"""The times and bytes of one row, measured: a text is read in chunks, then tokens are made.

found = measure(case, 4096, config)
found.prefill_seconds, found.first_token_seconds, found.step_seconds
"""

import dataclasses
import gc
import math
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from evals.config import BenchConfig
from evals.report import predict
from evals.report.cases import Case
from infer.engine import Engine, Plan
from infer.sampling.params import Sampling, pack
from infer.steps import STEPS, State

POINTS = 64  # of the curve of prefill, at most
PERCENTILE, LEAST = 99, 100  # told from so many single tokens on


class Measured(NamedTuple):
    """Seconds without compilation, bytes; a step makes a token of every row."""

    prefill_seconds: float
    curve: list[tuple[int, float]]  # (tokens read, seconds since the start)
    first_token_seconds: float  # from the prompt to the first token on the host
    token_seconds: float  # median of calls of STEPS tokens, as text is streamed
    step_seconds: list[float]  # of single tokens, each a call of its own
    kv_allocated: int  # over all devices
    kv_live: int
    temporary_bytes: int  # of XLA, on one device
    peak_bytes: int | None  # of one device; None where it was no higher than before the row
    compile_seconds: float


def room(config: BenchConfig) -> int:
    """Tokens that a row makes."""
    return STEPS * (2 + config.repeats) + config.decode_samples


def plan(config: BenchConfig, context: int) -> Plan:
    """The shapes of a row."""
    return Plan.of(config.batch_size, context, room(config), config.prefill_chunk)


def measure(case: Case, context: int, config: BenchConfig) -> Measured:
    """Measures one row with an engine of its own, whose cache is of its size."""
    engine = Engine(case.model, plan(config, context), form=case.form)
    shape = engine.plan.batch, context
    tokens_BT = np.random.default_rng(0).integers(0, case.model.config.vocab_size, shape, np.int32)
    _warm_up(engine, tokens_BT)
    peak = PeakMemory(predict.device_bytes(case.model))
    began = engine.clock()
    now, curve = engine.empty(), []
    chunks = math.ceil(context / engine.plan.chunk)
    stride = math.ceil(chunks / POINTS) * engine.plan.chunk
    for first in range(0, context, stride):
        end = min(context, first + stride)
        now = jax.block_until_ready(engine.prefill(tokens_BT[:, :end], now, first))
        curve.append((end, engine.clock() - began))
    allocated, live = predict.kv_bytes(now.cache.slots), predict.live_bytes(now.cache)
    resumed = engine.clock()
    state, _ = _advance(engine, _start(engine, now, tokens_BT, room(config)))
    first_token = curve[-1][1] + engine.clock() - resumed
    seconds = []
    for _ in range(config.repeats + 1):
        state, elapsed = _advance(engine, state)
        seconds.append(elapsed / STEPS)
    single = []
    for made in range(STEPS * (config.repeats + 2), room(config)):
        state, elapsed = _advance(engine, _one_more(engine, state, made))
        single.append(elapsed)
    return Measured(
        prefill_seconds=curve[-1][1],
        curve=curve,
        first_token_seconds=first_token,
        token_seconds=statistics.median(seconds[1:]),
        step_seconds=single,
        kv_allocated=allocated,
        kv_live=live,
        temporary_bytes=engine.temporary_bytes(),
        peak_bytes=peak.bytes(),
        compile_seconds=engine.programs.seconds,
    )


def percentile(seconds: list[float]) -> float | None:
    """The 99th of single tokens; None when they are too few to have one."""
    return float(np.percentile(seconds, PERCENTILE)) if len(seconds) >= LEAST else None


def _warm_up(engine: Engine, tokens_BT: np.ndarray) -> None:
    """Compiles all programs, and runs each once."""
    tokens_BT = tokens_BT[:, : engine.plan.chunk]
    now = engine.prefill(tokens_BT)
    _advance(engine, _start(engine, now, tokens_BT, STEPS))
    gc.collect()


def _start(engine: Engine, now, tokens_BT: np.ndarray, new: int) -> State:
    hows = [Sampling(temperature=0, max_tokens=new)] * len(tokens_BT)
    return engine.start(now, tokens_BT, [0] * len(hows), pack(hows))


def _advance(engine: Engine, state: State) -> tuple[State, float]:
    """(state, seconds) of one call, its tokens on the host."""
    began = time.perf_counter()
    state, (_, made) = engine.advance(state, np.zeros(engine.plan.batch, bool))
    jax.device_get(made.tokens_BC)
    jax.block_until_ready(state)
    return state, time.perf_counter() - began


def _one_more(engine: Engine, state: State, made: int) -> State:
    """The state with room for a single token: the next call ends after it."""
    B = engine.plan.batch
    packed = state.packed._replace(max_tokens_B=engine.place(np.full(B, made + 1, np.int32)))
    return dataclasses.replace(state, packed=packed, done_B=engine.place(np.zeros(B, bool)))


class PeakMemory:
    """Tracks peak memory from here on: of one accelerator, or of this process on a CPU.

    A device tells its highest mark since it started, so a row that needs no more than one before
    it has none of its own; with some allocators it tells nothing, so no row has. Linux lets a
    process reset the mark of its resident memory.
    """

    def __init__(self, held: int):
        """`held`: bytes that are in use already, and are part of the row."""
        self._held = held
        self._device = jax.local_devices()[0]
        self._before = self._reset() if self._device.platform == "cpu" else self._device_mark()

    def bytes(self) -> int | None:
        """Returns the mark, None if it is not known."""
        if self._device.platform != "cpu":
            mark = self._device_mark()
            return mark if mark > self._before else None
        grown = _host_mark() - self._before
        return self._held + grown // jax.local_device_count() if grown > 0 else None

    def _device_mark(self) -> int:
        """The device's own mark, 0 if its allocator keeps none."""
        return (self._device.memory_stats() or {}).get("peak_bytes_in_use", 0)

    def _reset(self) -> int:
        """The mark from which this process grows."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return _host_mark()
        return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _host_mark() -> int:
    if Path("/proc/self/status").is_file():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
