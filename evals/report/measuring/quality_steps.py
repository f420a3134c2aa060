"""The steps of a sweep that tell quality: the loss by position and each task, at each context.

They share one engine a row, as large a batch as fits.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evals.config import BenchConfig
from evals.report import predict, rows
from evals.report.measuring import quality
from evals.report.measuring.peaks import Peaks
from evals.report.measuring.quality import Material
from evals.report.progress import ProgressStep
from evals.report.rows import ReportRow
from evals.report.store import fingerprint
from evals.report.sweep import SweepTask, case_of
from evals.ruler import haystack, tasks
from infer.engine import Engine, Plan

BATCH = 8  # rows at a time, if they fit
Run = Callable[[Engine], Any]


def plan(row: ReportRow, config: BenchConfig, available: int | None) -> Plan:
    """Plans as many rows as fit, each as long as the context, decoded tokens included."""
    size = BATCH
    while True:
        shapes = Plan.of(size, row.context, 0, config.prefill_chunk)
        need = predict.memory(row.case, shapes).total
        if size == 1 or available is None or need <= available:
            return shapes
        size //= 2


class Engines:
    """Makes the engine of a row, and keeps that of the last one."""

    def __init__(self, material: Material, config: BenchConfig, available: int | None):
        self._material, self._config, self._available = material, config, available
        self._name, self._engine = "", None

    def of(self, row: ReportRow) -> Engine:
        """Builds the engine with the end tokens of the tokenizer."""
        if self._name != row.name:
            self._engine = None  # before the next is made
            shapes = plan(row, self._config, self._available)
            tokenizer, form = self._material.tokenizer, row.case.form
            self._engine = Engine(row.case.model, shapes, tokenizer, form=form)
            self._name = row.name
        return self._engine


def steps(
    planned: Sequence[ReportRow],
    material: Material,
    config: BenchConfig,
    best: Peaks,
    available: int | None,
) -> list[tuple[ReportRow, str, SweepTask]]:
    """(row, what is told, the step), context by context, for patterns that the model has."""
    engines = Engines(material, config, available)
    told = [row for row in planned if row.reason is None and row.case.own]
    losses = [row.name for row in _with_loss(told, material, config)]
    found = []
    for row in sorted(told, key=lambda row: row.context):
        base = {"context": row.context, **case_of(row.case)}
        if row.name in losses:
            of = {"what": "loss", **base, "rows": config.loss_rows, **_texts(material, config)}
            guess = _seconds(row, config.loss_rows, 0, config, best)
            step = ProgressStep(f"loss by position: {row.name}", "loss", guess)
            found.append((row, "loss", SweepTask(step, of, _loss(row, engines, material, config))))
        for kind in material.kinds:
            of = {"what": kind, **base, **_task_settings(kind, config)}
            count = config.task_samples
            count *= len(config.depths) if kind in quality.BY_DEPTH else 1
            step = ProgressStep(
                f"{kind}: {row.name}", "task", _seconds(row, count, 64, config, best)
            )
            run = _task(kind, row, engines, material, config)
            found.append((row, kind, SweepTask(step, of, run)))
    return found


def _with_loss(
    told: Sequence[ReportRow], material: Material, config: BenchConfig
) -> list[ReportRow]:
    """The longest row of each case that there is text for: what follows a token does not change
    its loss. Where RoPE goes by the length it does, and each row is one.
    """
    if not config.loss_rows or material.tokens is None:
        return []
    found: dict[tuple[str, int], ReportRow] = {}
    for row in sorted(told, key=lambda row: row.context):
        ropes = [spec.rope for spec in row.case.model.config.pattern if spec.rope]
        each = row.context if any(rope.by_length for rope in ropes) else 0
        if quality.spans(material, 1, row.context):
            found[row.case.name, each] = row
    return list(found.values())


def _loss(row: ReportRow, engines: Engines, material: Material, config: BenchConfig) -> Callable:
    def run() -> dict[str, Any]:
        texts = quality.spans(material, config.loss_rows, row.context)
        score = quality.scores(engines.of(row))
        return {"buckets": quality.by_position(score, texts), "rows": len(texts)}

    return run


def _task(
    kind: str, row: ReportRow, engines: Engines, material: Material, config: BenchConfig
) -> Callable:
    def run() -> dict[str, Any]:
        answer = quality.answers(engines.of(row), material.tokenizer)
        return quality.task(kind, row.context, material, config, answer)

    return run


def _seconds(row: ReportRow, texts: int, new: int, config: BenchConfig, best: Peaks) -> float:
    """A guess, as that of speeds."""
    model, batch = row.case.model, Plan.of(BATCH, row.context, 0, config.prefill_chunk).batch
    reading = predict.prefill_flops(model.config, texts, row.context) / best.flops
    read = predict.weight_bytes_read(model) + predict.kv_bytes_read(row.case, batch, row.context)
    step = rows.roofline_seconds(0, read, best) * -(-texts // batch)
    return 1.0 + 3 * (reading + new * step)


def _texts(material: Material, config: BenchConfig) -> dict[str, Any]:
    files = [fingerprint(path) for path in _paths(config.text, "bench.text")]
    return {"source": material.source, "texts": len(material.tokens), "files": files}


def _task_settings(kind: str, config: BenchConfig) -> dict[str, Any]:
    found = {"samples": config.task_samples}
    found["haystack"] = [fingerprint(path) for path in _paths(config.haystack, "bench.haystack")]
    if kind in quality.BY_DEPTH:
        found["depths"] = list(config.depths)
    if kind in tasks.QUESTIONS:
        found["questions"] = fingerprint(Path(config.questions))
    return found


def _paths(globs: Sequence[str], field: str) -> list[Path]:
    return [path for pattern in globs for path in haystack.matches(pattern, field)]


def gather(
    found: Sequence[tuple[ReportRow, str, SweepTask]], results: Sequence[Any]
) -> dict[str, dict[str, Any]]:
    """The quality of each row, by its name."""
    by_row: dict[str, dict[str, Any]] = {}
    for (row, what, _), result in zip(found, results, strict=True):
        by_row.setdefault(row.name, {})[what] = result
    return {name: quality.summary(parts) for name, parts in by_row.items()}
