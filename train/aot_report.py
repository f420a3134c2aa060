"""The report of train.aot: its figures, its table, its JSON, and what to change to make it fit."""

import dataclasses
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from core.compile.hardware import Chip
from core.compile.hlo import Collective
from core.config import Experiment
from core.sharding import axis_sizes
from model.sizes.flops import Convention, training_flops_per_token

NOTES = """\
FLOPs and bytes: one step, the busiest device, what rematerialisation redoes included; attention
by formula, one document a row. Time: a lower bound, from peak rates and the collectives that the
compiler does not overlap. MFU: useful FLOPs at that time; keys that are seen, or all keys.
Bytes of a collective: its larger side, of all its executions in a step."""


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled step. Bytes and FLOPs are of one device; None is not known.

    `hbm_bytes_per_device` is the peak, and `temp_bytes` what it has beyond the arguments.
    """

    topology: str
    devices: int
    fits: bool
    hbm_bytes_per_device: int
    hbm_limit_bytes: int | None
    argument_bytes: int
    temp_bytes: int
    compile_seconds: float
    flops_per_device: float | None = None
    bytes_per_device: float | None = None
    optimal_seconds: float | None = None
    estimated_mfu: float | None = None
    estimated_mfu_dense: float | None = None
    collectives: tuple[Collective, ...] = ()


def mfu(
    experiment: Experiment, seconds: float, chip: Chip, devices: int, convention: Convention
) -> float:
    """Share of the peak that a step of `seconds` uses, rematerialisation not counted as use."""
    train = experiment.train
    a_token = training_flops_per_token(experiment.model, train.length, convention)
    return a_token * train.batch_size * train.length / (devices * chip.flops * seconds)


def to_dict(report: Report) -> dict[str, Any]:
    """Contents of the JSON file."""
    values = dataclasses.asdict(report)
    del values["estimated_mfu_dense"]
    values["collectives"] = [
        {"kind": c.kind, "count": c.count, "bytes": c.bytes, "async": c.asynchronous}
        for c in report.collectives
    ]
    return values


def show(experiment: Experiment, report: Report) -> None:
    """Prints the table on stdout, and advice where the step does not fit."""
    console, train = Console(), experiment.train
    title = (
        f"{experiment.name}: {train.batch_size} x {train.length:,} tokens on {report.topology} "
        f"({report.devices} devices)"
    )
    print(title)
    table = Table("a step, one device", "")
    for name, value in rows(report):
        table.add_row(name, value)
    console.print(table)
    if report.collectives:
        table = Table("collective", "count", "bytes", "overlaps")
        for c in report.collectives:
            overlaps = "yes" if c.asynchronous else "no"
            table.add_row(c.kind, f"{c.count:,}", readable(c.bytes), overlaps)
        console.print(table)
    print(NOTES)
    if not report.fits:
        print("\nTo make it fit, the cheapest first:")
        print("\n".join(f"- {line}" for line in advice(experiment, report)))


def rows(report: Report) -> list[tuple[str, str]]:
    """(name, value) of the table."""
    limit = report.hbm_limit_bytes
    of_limit = f" of {readable(limit)}" if limit else ""
    found = [
        ("memory", f"{readable(report.hbm_bytes_per_device)}{of_limit}"),
        ("fits", "yes" if report.fits else "NO"),
        ("  arguments", readable(report.argument_bytes)),
        ("  temporaries", readable(report.temp_bytes)),
    ]
    if report.flops_per_device is not None:
        found += [
            ("FLOPs", f"{report.flops_per_device:.3e}"),
            ("bytes to and from memory", readable(report.bytes_per_device)),
        ]
    if report.optimal_seconds is not None:
        found += [
            ("time at best", f"{report.optimal_seconds:.3f} s"),
            ("MFU at best, keys seen", f"{report.estimated_mfu:.1%}"),
            ("MFU at best, all keys", f"{report.estimated_mfu_dense:.1%}"),
        ]
    return [*found, ("compiled in", f"{report.compile_seconds:.1f} s")]


def readable(num_bytes: float) -> str:
    """Bytes in the unit that keeps them short."""
    power = min(3, int(math.log2(max(num_bytes, 1)) // 10))
    return f"{num_bytes / 2 ** (10 * power):,.2f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def advice(experiment: Experiment, report: Report) -> list[str]:
    """Returns changes that lower the memory of this step, the cheapest first."""
    train, (data, _, model) = experiment.train, axis_sizes(experiment.mesh, report.devices)
    lines = []
    if train.remat in ("none", "dots", "attention"):
        lines.append("--config.train.remat=offload keeps what the backward needs on the host")
    if train.remat != "full":
        lines.append("--config.train.remat=full redoes each layer in the backward pass")
    rows = train.batch_size // train.accumulation // data
    if rows > 1:
        more = 2 * train.accumulation
        lines.append(f"--config.train.accumulation={more} works on half of the {rows} rows at once")
    if model < experiment.model.num_kv_heads:
        lines.append(f"--config.mesh.model={2 * model} splits heads, MLP and vocabulary once more")
    arguments = readable(report.argument_bytes)
    lines.append(
        "a larger aot.topology: mesh.seq cuts each row, and parameters and optimizer state "
        f"({arguments} here) are sharded over all devices"
    )
    lines.append(f"--config.train.length={train.length // 2}, a shorter context")
    return lines
