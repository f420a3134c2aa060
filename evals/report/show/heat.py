"""Pictures that are no lines: the stack of memory, the map of needles by depth and length."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evals.report.measuring.quality import BY_DEPTH
from evals.report.show import figures
from evals.report.show.figures import Series, name_of_tokens

PARTS = {"weights": "#999999", "KV cache": "#0072B2", "work": "#E69F00"}
ACROSS = 3  # panels side by side


def memory(series: Sequence[Series]) -> Figure:
    """Weights, cache and work of one device as stacked bars: hatched where only predicted."""
    figure, panels = _grid(len(series))
    unit, name = _unit(max(sum(_parts(row)) for one in series for row in one.rows))
    for axes, one in zip(panels, series, strict=False):
        x = np.arange(len(one.rows))
        stacks = np.array([_parts(row) for row in one.rows]).T / unit
        hatched = [row["peak_bytes"] is None for row in one.rows]
        below = np.zeros(len(x))
        for (part, colour), heights in zip(PARTS.items(), stacks, strict=True):
            bars = axes.bar(x, heights, 0.7, bottom=below, color=colour, label=part)
            for bar, predicted in zip(bars, hatched, strict=True):
                if predicted:
                    bar.set(hatch="///", edgecolor="white", alpha=0.6)
            below += heights
        predicted = [row["peak_bytes_predicted"] / unit for row in one.rows]
        style = dict(linestyle="none", color="black")
        axes.plot(x, predicted, marker="_", markersize=14, label="predicted", **style)
        marks = [(i, row["peak_bytes_measured"]) for i, row in enumerate(one.rows)]
        marks = [(i, mark / unit) for i, mark in marks if mark is not None]
        if marks:
            style |= dict(marker="D", markersize=5, markerfacecolor="none")
            axes.plot(*zip(*marks, strict=True), label="measured", **style)
        _contexts(axes, one.rows)
        figures.label(axes, one.label, "context, tokens", f"memory of a device, {name}")
        axes.grid(visible=False, axis="x")
    return figures.legend(figure, *panels)


def _parts(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """(weights, cache, work) as compiled, or as predicted."""
    known = row["temporary_bytes"]
    work = row["temporary_bytes_predicted"] if known is None else known
    predicted = row["peak_bytes_predicted"]
    kv = predicted - row["weight_bytes"] - row["temporary_bytes_predicted"]
    return row["weight_bytes"], kv, work


def needle(series: Sequence[Series]) -> Figure | None:
    """Scores by depth and length, in colour and in figures."""
    maps = [
        (one, kind, rows)
        for one in series
        for kind in BY_DEPTH
        if (rows := [row for row in one.rows if kind in row["quality"]])
    ]
    if not maps:
        return None
    figure, panels = _grid(len(maps))
    for axes, (one, kind, rows) in zip(panels, maps, strict=False):
        depths = sorted({cell["depth"] for row in rows for cell in row["quality"][kind]})
        scores = np.full((len(depths), len(rows)), np.nan)
        for j, row in enumerate(rows):
            for cell in row["quality"][kind]:
                scores[depths.index(cell["depth"]), j] = cell["score"]
        image = axes.imshow(scores, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for (i, j), score in np.ndenumerate(scores):
            if not math.isnan(score):
                shade = "white" if score < 50 else "black"
                axes.text(j, i, f"{score:.0f}", ha="center", va="center", color=shade, fontsize=9)
        _contexts(axes, rows)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths])
        axes.set_title(f"{one.label}: {kind}", fontsize=12)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels, label="found, percent", shrink=0.9)
    return figure


def _grid(count: int) -> tuple[Figure, list]:
    """Panels in rows of ACROSS, those that are too many hidden."""
    across = 2 if count == 4 else min(count, ACROSS)
    down = -(-count // across)
    figure = Figure(figsize=(2.0 + 4.2 * across, 0.4 + 3.6 * down), layout="constrained")
    panels = list(np.ravel(figure.subplots(down, across, squeeze=False)))
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels


def _contexts(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A column for each row; many names are written aslant."""
    axes.set_xticks(range(len(rows)), [name_of_tokens(row["context"]) for row in rows])
    if len(rows) > 8:
        axes.tick_params(axis="x", rotation=45)


def _unit(most: float) -> tuple[float, str]:
    power = max(1, min(4, int(math.log2(max(most, 1)) // 10)))
    return 2.0 ** (10 * power), ("", "KiB", "MiB", "GiB", "TiB")[power]
