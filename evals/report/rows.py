"""A row of the report: what was predicted and what was measured, side by side.

Every row has the same keys; what is not known, or was not measured, is None.
"""

import dataclasses
import math
import statistics
from typing import Any

from evals.config import BenchConfig
from evals.report import predict
from evals.report.cases import Case
from evals.report.measuring import measure
from evals.report.measuring.measure import Measured
from evals.report.measuring.peaks import Peaks
from evals.report.predict import Memory


@dataclasses.dataclass(frozen=True)
class ReportRow:
    """One line of the table before it is measured. `reason`: why it will not be."""

    case: Case
    context: int
    need: Memory
    reason: str | None

    @property
    def name(self) -> str:
        return f"{self.case.name}, {self.context:,} tokens"


def plan(case: Case, context: int, config: BenchConfig, available: int | None) -> ReportRow:
    """The row, with what it needs and whether it can be."""
    need = predict.memory(case, measure.plan(config, context))
    return ReportRow(case, context, need, refusal(case, context, config, need, available))


def refusal(
    case: Case, context: int, config: BenchConfig, need: Memory, available: int | None
) -> str | None:
    """Why a row cannot be measured; None if it can."""
    model = case.model.config
    last = context + measure.room(config)
    if model.learned_positions and last > model.context:
        return (
            f"with the {measure.room(config)} tokens made it is {last:,} long, and the model has "
            f"learned positions for model.context={model.context:,}"
        )
    if context > model.context and not config.beyond:
        return f"beyond model.context={model.context:,}: --config.bench.beyond=true measures it"
    if available is not None and need.total > available:
        return (
            f"needs {shown(need.total)} a device (weights {shown(need.weights)}, KV cache "
            f"{shown(need.kv)}, work {shown(need.temporaries)}), and {shown(available)} are "
            "available"
        )
    return None


def planned(row: ReportRow, config: BenchConfig) -> dict[str, Any]:
    """All keys, with what is known beforehand."""
    case, context = row.case, row.context
    model, shapes = case.model.config, measure.plan(config, context)
    batch = shapes.batch
    exact, roomy = (predict.create(case, batch, n) for n in (context, shapes.length))
    return {
        "context": context,
        "attention": case.attention,
        "kv": case.kv,
        "phase": "prefill+decode",
        "batch_size": batch,
        "fits": row.reason is None,
        "reason": row.reason,
        "prefill_seconds": None,
        "prefill_tokens_per_second": None,
        "prefill_curve": None,
        "ttft_seconds": None,
        "decode_ms_per_token": None,
        "decode_single_ms": None,
        "decode_p99_ms": None,
        "decode_samples": 0,
        "kv_bytes_theory": predict.kv_bytes(exact.slots),
        "kv_bytes_allocated": predict.kv_bytes(roomy.slots),
        "kv_bytes_live": None,
        "kv_bytes_per_device": predict.device_bytes(predict.kv_arrays(exact.slots)),
        "weight_bytes": row.need.weights,
        "temporary_bytes_predicted": row.need.temporaries,
        "temporary_bytes": None,
        "peak_bytes_predicted": row.need.total,
        "peak_bytes": None,
        "peak_bytes_measured": None,
        "prefill_flops": predict.prefill_flops(model, batch, context),
        "decode_flops": predict.decode_flops(model, batch, context),
        "decode_bytes": predict.weight_bytes_read(case.model)
        + predict.kv_bytes_read(case, batch, context),
        "mfu": None,
        "mbu_weights": None,
        "mbu_total": None,
        "roofline_ms": None,
        "roofline_fraction": None,
        "prefill_roofline_fraction": None,
        "cost_per_1k_tokens": None,
        "cost_per_1k_prefill_tokens": None,
        "compile_seconds": None,
        "quality": {},
    }


def measured(
    row: ReportRow, config: BenchConfig, found: Measured, peaks: Peaks, devices: int
) -> dict[str, Any]:
    """The keys that measuring fills."""
    known = planned(row, config)
    tokens = known["batch_size"] * row.context
    weights = predict.weight_bytes_read(row.case.model)
    floor = roofline_seconds(known["decode_flops"] / devices, known["decode_bytes"], peaks)
    reading = roofline_seconds(known["prefill_flops"] / devices, 0, peaks)
    step, prefill = found.token_seconds, found.prefill_seconds
    p99 = measure.percentile(found.step_seconds)
    return {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": tokens / prefill,
        "prefill_curve": found.curve,
        "ttft_seconds": found.first_token_seconds,
        "decode_ms_per_token": 1e3 * step,
        "decode_single_ms": 1e3 * statistics.median(found.step_seconds),
        "decode_p99_ms": p99 and 1e3 * p99,
        "decode_samples": len(found.step_seconds),
        "kv_bytes_allocated": found.kv_allocated,
        "kv_bytes_live": found.kv_live,
        "temporary_bytes": found.temporary_bytes,
        "peak_bytes": row.need.weights + row.need.kv + found.temporary_bytes,
        "peak_bytes_measured": found.peak_bytes,
        "mfu": known["prefill_flops"] / (prefill * devices * peaks.mfu_flops),
        "mbu_weights": weights / (step * peaks.mbu_bandwidth),
        "mbu_total": known["decode_bytes"] / (step * peaks.mbu_bandwidth),
        "roofline_ms": 1e3 * floor,
        "roofline_fraction": floor / step,
        "prefill_roofline_fraction": reading / prefill,
        "compile_seconds": found.compile_seconds,
        **costs(config.price_per_hour, known["batch_size"], step, tokens, prefill),
    }


def roofline_seconds(flops: float, num_bytes: float, peaks: Peaks) -> float:
    """The least time for so much work of one device, at the rates measured here."""
    return max(flops / peaks.flops, num_bytes / peaks.bandwidth)


def costs(price: float, batch: int, step: float, tokens: int, prefill: float) -> dict[str, Any]:
    """Costs of 1,000 tokens in the unit of the price an hour of all devices; None without one."""
    if not price:
        return {"cost_per_1k_tokens": None, "cost_per_1k_prefill_tokens": None}
    second = price / 3600
    return {
        "cost_per_1k_tokens": 1000 * second * step / batch,
        "cost_per_1k_prefill_tokens": 1000 * second * prefill / tokens,
    }


def shown(num_bytes: float) -> str:
    """Bytes in the unit that keeps them short."""
    power = min(4, int(math.log2(max(num_bytes, 1)) // 10))
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{num_bytes / 2 ** (10 * power):,.{0 if power == 0 else 2}f} {unit}"
