"""The pictures of a report, or of several: what goes into each file.

    draw([("", report)], folder)  # ["decode.png", ...]

Speeds and costs are lines over the context, on logarithmic axes; figures.py draws.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from core.storage import output
from evals.report.measuring.quality import BY_DEPTH
from evals.report.show import figures, heat
from evals.report.show.figures import Look, Series, line, name_of_tokens
from evals.ruler import tasks

NAMES = "decode.png", "prefill.png", "memory.png", "cost.png", "quality.png", "needle.png"
Reports = Sequence[tuple[str, Mapping[str, Any]]]  # (label, report)


def draw(reports: Reports, folder: Path) -> list[str]:
    """Writes the pictures that there are figures for; their names."""
    series = every_series(reports)
    painters = decode, prefill, heat.memory, cost, quality, heat.needle
    drawn = {name: paint(series) for name, paint in zip(NAMES, painters, strict=True)}
    for name, figure in drawn.items():
        if figure is not None:
            figures.save(figure, folder / name)
        elif not output.is_foreign(folder / name, figures.is_ours):
            (folder / name).unlink(missing_ok=True)  # of an earlier report
    return [name for name, figure in drawn.items() if figure is not None]


def every_series(reports: Reports) -> list[Series]:
    """A series for each case of each report, in their order; a case has its colour in all."""
    named = [(row["attention"], row["kv"]) for _, report in reports for row in report["rows"]]
    cases = list(dict.fromkeys(named))
    plain = len({kv for _, kv in cases}) == 1
    found = []
    for index, (label, report) in enumerate(reports):
        for number, (attention, kv) in enumerate(cases):
            case = attention if plain else f"{attention}, {kv}"
            rows = [
                row for row in report["rows"] if (row["attention"], row["kv"]) == (attention, kv)
            ]
            name = f"{label}: {case}" if label else case
            if rows:
                found.append(Series(name, sorted_by_context(rows), Look(number, index)))
    return found


def sorted_by_context(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: row["context"])


def decode(series: Sequence[Series]) -> Figure | None:
    """Milliseconds a token, the floor of the roofline under each."""
    if not any(one.points("decode_ms_per_token") for one in series):
        return None
    figure, axes = figures.one_panel("Time for each new token", "milliseconds a token")
    for one in series:
        line(axes, one.points("decode_ms_per_token"), one.look, one.label)
        line(axes, one.points("roofline_ms"), one.look, None, floor=True)
    if any(one.points("roofline_ms") for one in series):
        figures.explain(axes, "floor of the roofline", linestyle=":")
    figures.context_axis(axes, series)
    return figures.legend(figure, axes)


def prefill(series: Sequence[Series]) -> Figure | None:
    """Seconds to read the context with fitted exponents, and how fast each part of it went."""
    if not any(one.points("prefill_seconds") for one in series):
        return None
    curves = [_parts(one) for one in series]
    figure, panels = figures.panels(2 if any(curves) else 1)
    for one in series:
        points = one.points("prefill_seconds")
        line(panels[0], points, one.look, f"{one.label}{fitted(points)}")
    figures.label(panels[0], "Time to read the context", "context, tokens", "seconds")
    figures.context_axis(panels[0], series)
    if any(curves):
        for one, points in zip(series, curves, strict=True):
            line(panels[1], points, one.look, None, small=True)
        name = "Speed by depth, longest context"
        figures.label(panels[1], name, "tokens read before", "tokens/s")
        figures.tokens_axis(panels[1], max(x for points in curves for x, _ in points))
        panels[1].set_yscale("log")
        figures.plain_numbers(panels[1])
    return figures.legend(figure, panels[0])


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """p of the best t = a n^p, by least squares of the logarithms; None for less than two."""
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points, float)).T
    return float(np.polyfit(x, y, 1)[0])


def fitted(points: Sequence[tuple[float, float]]) -> str:
    """The exponent over all points, and over the last half of them where that is another."""
    whole = exponent(points)
    if whole is None:
        return ""
    text = f": seconds ~ $n^{{{whole:.2f}}}$"
    late = points[len(points) // 2 :]
    if len(points) >= 4 and len(late) >= 2:
        text += f", from {name_of_tokens(late[0][0])} on $n^{{{exponent(late):.2f}}}$"
    return text


def _parts(one: Series) -> list[tuple[float, float]]:
    """(tokens read before, tokens/s) of each part of the longest measured context."""
    rows = [row for row in one.rows if row["prefill_curve"]]
    if not rows or len(rows[-1]["prefill_curve"]) < 2:
        return []
    ends = [(0, 0.0), *rows[-1]["prefill_curve"]]
    batch = rows[-1]["batch_size"]
    pairs = zip(ends, ends[1:], strict=False)
    return [(a, batch * (b - a) / (t - s)) for (a, s), (b, t) in pairs if t > s]


def cost(series: Sequence[Series]) -> Figure | None:
    """Draws the costs of 1,000 tokens, read and made."""
    if not any(one.points("cost_per_1k_tokens") for one in series):
        return None
    figure, panels = figures.panels(2)
    keys = {"Reading": "cost_per_1k_prefill_tokens", "Writing": "cost_per_1k_tokens"}
    for axes, (name, key) in zip(panels, keys.items(), strict=True):
        for one in series:
            line(axes, one.points(key), one.look, one.label)
        figures.label(axes, f"{name} 1,000 tokens", "context, tokens", "cost, unit of the price")
        figures.context_axis(axes, series)
    return figures.legend(figure, panels[0])


def quality(series: Sequence[Series]) -> Figure | None:
    """The loss by position, and task scores by context: one panel, or one a score of several."""
    losses = [_loss(one) for one in series]
    scores = [_scores(one) for one in series]
    names = list(dict.fromkeys(what for found in scores for what in found))
    apart = sum(map(bool, scores)) > 1
    count = any(losses) + (len(names) if apart else any(scores))
    if not count:
        return None
    figure, panels = figures.panels(count)
    if any(losses):
        for one, points in zip(series, losses, strict=True):
            line(panels[0], points, one.look, one.label)
        figures.label(panels[0], "Loss by position", "position, tokens", "nats a token")
        figures.tokens_axis(panels[0], max(x for points in losses for x, _ in points), log=True)
    for axes in panels[any(losses) :]:
        figures.label(axes, "Task scores", "context, tokens", "percent")
    for number, what in enumerate(names):
        axes = panels[any(losses) + number * apart]
        if apart:
            axes.set_title(what[0].upper() + what[1:])
        if what not in BY_DEPTH and not axes.get_legend_handles_labels()[0]:
            figures.threshold(axes, tasks.THRESHOLD, f"RULER's threshold, {tasks.THRESHOLD}")
        for one, found in zip(series, scores, strict=True):
            look = one.look if apart else one.look._replace(case=number)
            line(axes, found.get(what, []), look, one.label if apart else f"{one.label}, {what}")
    for axes in panels[any(losses) :]:
        figures.context_axis(axes, series, log=False)
        axes.set_ylim(-3, 103)
    if apart:
        return figures.legend(figure, *panels)
    for axes in panels:
        figures.own_legend(axes)
    return figure


def _loss(one: Series) -> list[tuple[float, float]]:
    """(middle of the bucket, loss) of the longest context that has them."""
    rows = [row for row in one.rows if "loss_by_position" in row["quality"]]
    buckets = rows[-1]["quality"]["loss_by_position"] if rows else []
    return [(math.sqrt(b["first"] * b["last"]), b["loss"]) for b in buckets]


def _scores(one: Series) -> dict[str, list[tuple[float, float]]]:
    """The mean of RULER's kinds if there are several, each kind if few, needle and passkey."""
    told = [(row["context"], row["quality"]) for row in one.rows if "tasks" in row["quality"]]
    kinds = dict.fromkeys(kind for _, quality in told for kind in quality["tasks"])
    shown = [kind for kind in kinds if len(kinds) <= 4 or kind not in tasks.KINDS]
    found = {k: [(n, q["tasks"][k]) for n, q in told if k in q["tasks"]] for k in shown}
    means = [(n, q["ruler"]) for n, q in told if q.get("ruler_kinds", 0) > 1]
    if means:
        most = max(q.get("ruler_kinds", 0) for _, q in told)
        found = {f"mean of {most} RULER tasks": means, **found}
    return found
