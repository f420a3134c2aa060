"""The picture of the context-window report: three panels, one line for each attention."""

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

# Blue and vermilion of Okabe and Ito's palette: told apart by every eye, and in print by marker.
FULL, OTHER = ("#D55E00", "s"), ("#0072B2", "o")
PANELS = (
    ("prefill_seconds", 1.0, "Time to read the context", "seconds"),
    ("decode_ms_per_token", 1.0, "Time for each new token", "milliseconds"),
    ("kv_bytes_live", 1e6, "KV cache", "megabytes"),
)


def context(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Writes a PNG of the rows of report.json, on logarithmic axes."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axes, (field, unit, name, label) in zip(figure.subplots(1, 3), PANELS, strict=True):
        _panel(axes, rows, field, unit)
        axes.set_title(name, fontsize=11)
        axes.set_ylabel(label)
        axes.set_xlabel("context, tokens")
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=150)
    os.replace(temporary, path)


def _panel(axes, rows: list[dict[str, Any]], field: str, unit: float) -> None:
    top = max(row[field] for row in rows) / unit
    for attention in dict.fromkeys(row["attention"] for row in rows):
        mine = [row for row in rows if row["attention"] == attention]
        contexts = [row["context"] for row in mine]
        values = [row[field] / unit for row in mine]
        colour, marker = FULL if attention == "full" else OTHER
        axes.loglog(contexts, values, color=colour, marker=marker, markersize=5, linewidth=2)
        axes.annotate(
            f"{attention}\n{values[-1]:.3g}",
            (contexts[-1], values[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="bottom" if values[-1] == top else "top",  # labels keep apart where lines meet
            annotation_clip=False,
        )
    ticks = sorted({row["context"] for row in rows})
    axes.set_xticks(ticks, [_tokens(n) for n in ticks], rotation=45)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.05)


def _tokens(n: int) -> str:
    return f"{n // 1024}K" if n >= 1024 and n % 1024 == 0 else str(n)
