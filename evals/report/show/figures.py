"""The report's style of drawing: one palette, one kind of axes, PNG files written whole.

Colours are Okabe and Ito's: told apart by every eye, and in print by their markers.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from core.storage import files

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
DASHES = ("-", (0, (4, 2)), (0, (4, 2, 1, 2)), (0, (1.5, 1.5)))
DPI = 150
SOFTWARE = "Cakrawala"  # in each PNG that is saved
MOST_TICKS = 11


class Look(NamedTuple):
    """The look of a line: a colour and a marker for each case, dashes for each report."""

    case: int
    report: int = 0

    def style(self, floor: bool = False, small: bool = False) -> dict[str, Any]:
        """Returns matplotlib's arguments; a floor is dotted and has no marker."""
        # Beyond the palette, dashes tell cases apart too.
        dashes = DASHES[(self.report + self.case // len(PALETTE)) % len(DASHES)]
        style = dict(color=PALETTE[self.case % len(PALETTE)], linewidth=2, linestyle=dashes)
        if floor:
            return style | dict(linestyle=":", linewidth=1.6)
        style |= dict(marker=MARKERS[self.case % len(MARKERS)], markersize=3 if small else 6)
        return style | (dict(markerfacecolor="white") if self.report else {})


class Series(NamedTuple):
    """The rows of one case of one report, shortest context first."""

    label: str
    rows: Sequence[Mapping[str, Any]]
    look: Look

    def points(self, key: str) -> list[tuple[float, float]]:
        """(context, value) of the rows that have one."""
        return [(row["context"], row[key]) for row in self.rows if row.get(key) is not None]


def one_panel(title: str, unit: str) -> tuple[Figure, Axes]:
    """A figure of a single panel over contexts."""
    figure, (axes,) = panels(1)
    label(axes, title, "context, tokens", unit)
    return figure, axes


def panels(count: int, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """`count` panels side by side."""
    figure = Figure(figsize=(2.0 + 4.8 * count, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, count)))


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=12)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def line(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    look: Look,
    name: str | None,
    floor: bool = False,
    small: bool = False,
) -> None:
    """One line, if it has points."""
    if points:
        axes.plot(*zip(*points, strict=True), label=name, **look.style(floor, small))


def explain(axes: Axes, name: str, **style: Any) -> None:
    """A line of the legend for what many lines have in common."""
    axes.plot([], [], color="#666666", label=name, **style)


def threshold(axes: Axes, value: float, name: str) -> None:
    """A grey line across."""
    axes.axhline(value, color="#666666", linestyle="--", linewidth=1.2, label=name)


def context_axis(axes: Axes, series: Sequence[Series], log: bool = True) -> None:
    """Contexts on a logarithmic x; y too, in plain numbers, if `log`."""
    axes.set_xscale("log")
    ticks = sorted({row["context"] for one in series for row in one.rows})
    every = -(-len(ticks) // MOST_TICKS)
    ticks = ticks[::-1][::every][::-1]
    axes.set_xticks(ticks, [name_of_tokens(n) for n in ticks])
    axes.minorticks_off()
    margin = 1.15
    axes.set_xlim(ticks[0] / margin, ticks[-1] * margin)
    if log:
        axes.set_yscale("log")
        plain_numbers(axes)


def tokens_axis(axes: Axes, longest: float, log: bool = False) -> None:
    """Positions on x: powers of two, or evenly."""
    if log:
        axes.set_xscale("log")
        ticks = [2**n for n in range(3, 40) if 2**n <= longest * 1.5]
        ticks = ticks[::-1][:: -(-len(ticks) // 8)][::-1]
    else:
        step = 2 ** max(0, int(np.ceil(np.log2(max(longest, 1) / 6))))
        ticks = list(range(0, int(longest) + 1, step))
    axes.set_xticks(ticks, [name_of_tokens(n) for n in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def plain_numbers(axes: Axes) -> None:
    """1, 2, 5, 10 on a logarithmic y; powers of ten alone where it spans many."""
    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    if decades < 0.7:  # room around lines that are nearly level
        middle = np.sqrt(low * high)
        axes.set_ylim(middle / 2.3, middle * 2.3)
    subs = (1, 2, 5) if decades < 3.5 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=30))
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if value >= unit:
            unit = 1e3 if letter == "K" else unit
            return f"{value / unit:g}{letter}"
    return f"{value:g}" if value >= 1e-4 else f"{value:.0e}"


def legend(figure: Figure, *axes: Axes) -> Figure:
    """One legend under all panels, in columns that fit."""
    found = {}
    for one in axes:
        for handle, name in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        widest = max(map(len, found))
        inches = figure.get_size_inches()[0]
        columns = max(1, min(len(found), int(inches / (0.075 * widest + 0.6))))
        rows = -(-len(found) // columns)
        figure.set_size_inches(inches, figure.get_size_inches()[1] + 0.22 * rows)
        figure.legend(
            found.values(),
            found.keys(),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
        )
    return figure


def own_legend(axes: Axes) -> None:
    """A legend under one panel, where the same colour means another line in the next."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=9)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG under its name only when it is whole; `is_ours` knows it again."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": SOFTWARE})
    files.replace(path, out.getvalue())


def is_ours(content: bytes) -> bool:
    """Whether a file is a PNG that `save` wrote."""
    return content.startswith(b"\x89PNG") and f"Software\0{SOFTWARE}".encode() in content[:1024]


def name_of_tokens(n: float) -> str:
    """1K, 1.5K, 1M for multiples of 1024; others as they are."""
    n = int(n)
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        if n >= unit and n * 2 % unit == 0:
            return f"{n / unit:g}{letter}"
    return f"{n:,}"
