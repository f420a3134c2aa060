"""The tables of a report: on the terminal, and report.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from evals.report.rows import shown
from infer.steps import STEPS

Row = Mapping[str, Any]
Column = Callable[[Row], str]


def number(name: str, form: str, unit: float = 1.0) -> Column:
    """Shows a key of a row; nothing where it is not known."""
    return lambda row: "" if row[name] is None else f"{row[name] / unit:{form}}"


def size(name: str) -> Column:
    """Shows bytes."""
    return lambda row: "" if row[name] is None else shown(row[name])


def plain(name: str) -> Column:
    return lambda row: str(row[name])


def of_quality(name: str, form: str) -> Column:
    """Shows a key of a row's quality."""

    def show(row: Row) -> str:
        value = row["quality"].get(name)
        return "" if value is None else f"{value:{form}}"

    return show


RULER = of_quality("ruler", ".1f")
NAMES = {"context": number("context", ",.0f"), "attention": plain("attention"), "KV": plain("kv")}
SPEED = {
    **NAMES,
    "prefill s": number("prefill_seconds", ",.3f"),
    "tokens/s": number("prefill_tokens_per_second", ",.0f"),
    "first token s": number("ttft_seconds", ",.3f"),
    "decode ms/token": number("decode_ms_per_token", ",.2f"),
    "one by one": number("decode_single_ms", ",.2f"),
    "p99": number("decode_p99_ms", ",.2f"),
    "MFU": number("mfu", ".1%"),
    "MBU weights": number("mbu_weights", ".1%"),
    "MBU total": number("mbu_total", ".1%"),
    "of roofline": number("roofline_fraction", ".1%"),
}
MEMORY = {
    **NAMES,
    "KV theory": size("kv_bytes_theory"),
    "KV allocated": size("kv_bytes_allocated"),
    "KV live": size("kv_bytes_live"),
    "work predicted": size("temporary_bytes_predicted"),
    "work compiled": size("temporary_bytes"),
    "peak predicted": size("peak_bytes_predicted"),
    "peak compiled": size("peak_bytes"),
    "peak measured": size("peak_bytes_measured"),
}
WORK = {
    **NAMES,
    "prefill FLOPs": number("prefill_flops", ".3e"),
    "FLOPs a step": number("decode_flops", ".3e"),
    "bytes a step": size("decode_bytes"),
    "roofline ms": number("roofline_ms", ",.3f"),
    "of prefill's roofline": number("prefill_roofline_fraction", ".1%"),
    "cost / 1K prefill": number("cost_per_1k_prefill_tokens", ".3g"),
    "cost / 1K decode": number("cost_per_1k_tokens", ".3g"),
}

SHORT = {  # for a terminal
    **NAMES,
    "prefill s": number("prefill_seconds", ",.2f"),
    "ms/token": number("decode_ms_per_token", ",.2f"),
    "roofline": number("roofline_fraction", ".1%"),
    "KV MiB": number("kv_bytes_allocated", ",.1f", 2**20),
    "peak MiB": number("peak_bytes", ",.1f", 2**20),
    "RULER": RULER,
}

NOTES = f"""\
- Context: tokens that each row holds when decoding is timed. Speeds are of all rows of the batch
  together; a decode step makes a token of each. Compilation is left out of all times.
- Prefill reads the context in chunks and makes no logits. First token: from the prompt to the
  first token on the host, which comes with the first call of the decode loop.
- Decode: the median of calls of {STEPS} tokens, as text is streamed. One by one: the median of
  calls of a single token; p99: the 99th percentile of those, from 100 of them on.
- FLOPs: keys that are seen, causal attention counted once. MFU: of prefill. MBU: bytes that a step
  reads, weights alone or with the keys and values that the token sees, over the time. Both are
  shares of the maker's figures where they are known, else of what was measured.
- Roofline: the larger of bytes over the bandwidth of a copy and FLOPs over the rate of a matrix
  product, both measured on this device before the sweep. What fits a CPU's caches is faster.
- KV: theory is of the context; allocated, with the room for what is decoded; live, what the tokens
  in the cache take; over all devices. A sliding layer keeps its window alone.
- Work: what a step needs beside weights and cache, on one device: predicted from shapes before the
  row is run, and as XLA compiled it. Peak: with weights and cache. Measured: the highest mark of
  the device, or what this process grew by where the host is the device.
"""


def cells(columns: Mapping[str, Column], row: Row) -> list[str]:
    """One line of a table."""
    return [show(row) for show in columns.values()]


def used(columns: Mapping[str, Column], table: Sequence[Row]) -> dict[str, Column]:
    """Returns the columns that have something to show."""
    return {head: show for head, show in columns.items() if any(map(show, table))}


def terminal(report: Mapping[str, Any]) -> Table:
    """Returns the rows as a table for a terminal of 80 columns."""
    table = report["rows"]
    columns = used(SHORT, [row for row in table if row["fits"]])
    if len({row["kv"] for row in table}) == 1:
        columns.pop("KV", None)
    grid = Table(title=title(report), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in columns:
        grid.add_column(head, justify="right")
    previous = None
    for row in table:
        case = row["attention"], row["kv"]
        if previous not in (None, case):
            grid.add_section()
        previous = case
        if row["fits"]:
            grid.add_row(*cells(columns, row))
    return grid


def missing(table: Sequence[Row]) -> list[str]:
    """Why rows were not measured, a line each."""
    return [
        f"{row['attention']}, {row['kv']}, {row['context']:,} tokens: {row['reason']}"
        for row in table
        if not row["fits"]
    ]


def markdown(columns: Mapping[str, Column], table: Sequence[Row]) -> list[str]:
    """The lines of a table."""
    columns = used(columns, table)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    return lines + ["| " + " | ".join(cells(columns, row)) + " |" for row in table]


def title(report: Mapping[str, Any]) -> str:
    """Returns the title: the model and the devices."""
    model = report["model"]
    layers, pattern = model["num_layers"], model["pattern"]
    windows = [pattern[i % len(pattern)]["window"] for i in range(layers)]
    windows = [window for window in windows if window]
    sliding = ""
    if windows:
        seen = " or ".join(f"{window:,}" for window in sorted(set(windows)))
        sliding = f" (sliding: {len(windows)} of them see {seen} tokens)"
    computing = report.get("computing", model["dtype"])  # a report of an older version has none
    return (
        f"{report['config']}: {report['parameters'] / 1e6:.1f} M parameters, "
        f"{layers} layers{sliding}, {computing}, on {report['device']}"
    )


def page(report: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """report.md."""
    table = report["rows"]
    lines = [f"# Context window: {title(report)}", "", f"Weights: {report['weights']}."]
    if report.get("peaks"):
        best = report["peaks"]
        lines += [
            "",
            f"Measured here, one device: a copy moves {best['bandwidth'] / 1e9:,.1f} GB/s, a "
            f"product makes {best['flops'] / 1e9:,.0f} GFLOP/s.",
        ]
    measured = [row for row in table if row["fits"]]
    lines += ["", "## Speed", "", *markdown(SPEED, measured)]
    lines += ["", "## Memory", "", *markdown(MEMORY, table)]
    lines += ["", "## Work", "", *markdown(WORK, table)]
    if missing(table):
        lines += ["", "## Not measured", "", *(f"- {line}" for line in missing(table))]
    told = [row for row in table if row["quality"]]
    if told:
        lines += ["", "## Quality", "", *quality(report, told)]
    lines += ["", *(f"![{name.removesuffix('.png')}]({name})" for name in pictures)]
    return "\n".join([*lines, "", NOTES])


def quality(report: Mapping[str, Any], told: Sequence[Row]) -> list[str]:
    """The tables of quality: tasks by context, the loss by position."""
    kinds = dict.fromkeys(kind for row in told for kind in row["quality"].get("tasks", ()))

    def score(kind: str) -> Column:
        return lambda row: str(row["quality"].get("tasks", {}).get(kind, ""))

    columns: dict[str, Column] = {
        **NAMES,
        "loss": of_quality("loss", ".3f"),
        "RULER": RULER,
        **{kind: score(kind) for kind in kinds},
    }
    lines = markdown(columns, told)
    for name, one in report["effective_length"].items():
        length = f"{one['length']:,} tokens" if one["length"] else "below the first context"
        lines += [
            "",
            f"Effective length of {name}, by RULER's rule (the longest whose mean exceeds 85.6) "
            f"over {one['kinds']} of its 13 kinds: **{length}**.",
        ]
    positions = [row for row in told if "loss_by_position" in row["quality"]]
    if positions:
        lines += ["", f"Loss in nats by position, on {report['quality_text']}:", ""]
        longest = max(positions, key=lambda row: row["context"])
        buckets = longest["quality"]["loss_by_position"]
        heads = [f"{b['first']:,} to {b['last']:,}" for b in buckets]
        lines += ["| context | attention | KV | " + " | ".join(heads) + " |"]
        lines += ["|" + "---:|" * (3 + len(heads))]
        for row in positions:
            cells = [f"{b['loss']:.3f}" for b in row["quality"]["loss_by_position"]]
            cells += [""] * (len(heads) - len(cells))
            name = f"{row['context']:,} | {row['attention']} | {row['kv']}"
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    skipped = [
        f"- {row['context']:,} tokens, {kind}: {reason}"
        for row in told
        for kind, reason in row["quality"].get("skipped", {}).items()
    ]
    return lines + ([""] + skipped if skipped else [])
