"""The steps of a sweep: which rows there are, what of them is measured already, and the rest.

Speeds come first, the row of the least memory first, so that the highest mark of a device is of
the row that just ran.
"""

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from core.config import UserError, to_dict
from evals.config import BenchConfig
from evals.report import rows
from evals.report.cases import Case
from evals.report.measuring import measure, peaks
from evals.report.measuring.measure import Measured
from evals.report.measuring.peaks import Peaks
from evals.report.progress import Bar, ProgressStep
from evals.report.rows import ReportRow
from evals.report.store import Store
from model.config import ModelConfig

LONGEST = 2**20  # of the contexts by default
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


class SweepTask(NamedTuple):
    """One step of the sweep, and where its result goes."""

    step: ProgressStep
    of: Mapping[str, Any]  # the key in the store, and what it depends on
    run: Callable[[], Any]


def contexts(config: BenchConfig, model: ModelConfig) -> list[int]:
    """Returns the contexts asked for, or powers of 2 from 1024 up to that of the model."""
    if config.contexts:
        return sorted(config.contexts)
    longest = LONGEST if config.beyond and not model.learned_positions else model.context
    found = [2**n for n in range(10, longest.bit_length()) if 2**n <= longest]
    return found or [longest]


def plan(cases: Sequence[Case], config: BenchConfig, available: int | None) -> list[ReportRow]:
    """All rows, case by case; UserError if none can be measured.

    By default a case ends with the first that does not fit.
    """
    found = []
    for case in cases:
        for context in contexts(config, case.model.config):
            row = rows.plan(case, context, config, available)
            found.append(row)
            if row.reason and not config.contexts:
                break
    if all(row.reason for row in found):
        first = found[0]
        raise UserError(f"bench.contexts: no row can be measured; {first.name}: {first.reason}")
    return found


def speeds(planned: Sequence[ReportRow], config: BenchConfig, best: Peaks) -> list[SweepTask]:
    """The steps that time the rows."""
    fields = ("batch_size", "prefill_chunk", "repeats", "decode_samples")
    how = {name: getattr(config, name) for name in fields}
    found = []
    for row in sorted(planned, key=lambda row: row.need.total):
        if row.reason is None:
            of = {"what": "speed", "context": row.context, **case_of(row.case), **how}
            step = ProgressStep(f"speed: {row.name}", "speed", seconds(row, config, best))
            found.append(SweepTask(step, of, lambda row=row: speed(row, config, best)))
    return found


def case_of(case: Case) -> dict[str, Any]:
    """Returns the properties of a case that its results depend on."""
    return {"attention": case.attention, "kv": case.kv, "model": to_dict(case.model.config)}


def seconds(row: ReportRow, config: BenchConfig, best: Peaks) -> float:
    """A guess: a third of the peak, and what compiling takes."""
    known = rows.planned(row, config)
    reading = known["prefill_flops"] / (best.flops * peaks.num_devices())
    step = rows.roofline_seconds(known["decode_flops"], known["decode_bytes"], best)
    return 5.0 + 3 * (reading + measure.room(config) * step)


def speed(row: ReportRow, config: BenchConfig, best: Peaks) -> dict[str, Any]:
    """Measures a row, or tells why it could not be measured."""
    try:
        found = measure.measure(row.case, row.context, config)
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_MEMORY not in str(error):
            raise
        first = str(error).splitlines()[0]
        return {"reason": f"{rows.shown(row.need.total)} were predicted to fit, but: {first}"}
    finally:
        gc.collect()
    return {"measured": found._asdict(), "peaks": best._asdict()}


def run(tasks: Sequence[SweepTask], store: Store) -> list[Any]:
    """The results of all tasks; those in the store are not run again."""
    left = [task for task in tasks if store.get(task.of) is None]
    with Bar([task.step for task in left]) as bar:
        for task in left:
            with bar.step(task.step):
                store.put(task.of, task.run())
    return [store.get(task.of) for task in tasks]


def result(row: ReportRow, config: BenchConfig, found: dict[str, Any] | None) -> dict[str, Any]:
    """The row of the report, from what its step gave."""
    known = rows.planned(row, config)
    if found is None:
        return known
    if "reason" in found:
        return {**known, "fits": False, "reason": found["reason"]}
    taken, best = Measured(**found["measured"]), Peaks(**found["peaks"])
    return {**known, **rows.measured(row, config, taken, best, peaks.num_devices())}


def depends(experiment, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the properties that all results depend on."""
    device = jax.devices()[0]
    return {
        "format": 1,
        "jax": jax.__version__,
        "device": [device.platform, device.device_kind, peaks.num_devices()],
        "mesh": to_dict(experiment.mesh),
        "weights": dict(weights),
    }


def with_model(planned: Sequence[ReportRow], cases: Sequence[Case]) -> list[ReportRow]:
    """The rows with weights in the place of shapes."""
    by_name = {case.name: case for case in cases}
    return [dataclasses.replace(row, case=by_name[row.case.name]) for row in planned]


def assemble(
    planned: Sequence[ReportRow],
    config: BenchConfig,
    tasks: Sequence[SweepTask],
    results: Sequence[Any],
) -> list[dict[str, Any]]:
    """The rows of the report; results beyond those of `tasks` are of others."""
    found = {
        (task.of["context"], task.of["attention"], task.of["kv"]): given
        for task, given in zip(tasks, results, strict=False)
    }
    return [
        result(row, config, found.get((row.context, row.case.attention, row.case.kv)))
        for row in planned
    ]
