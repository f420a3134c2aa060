"""Reports laid over each other: `bench.compare=A,B` reads them, and runs no model.

Every row of the others stands beside the first report's row of the same attention, kind of cache
and context, with the ratio of each figure to it. The pictures have the lines of all.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from core.config import Experiment, UserError
from core.storage import json_lines, streams
from core.storage.output import signed
from evals.config import BenchConfig
from evals.report.show import folder, plots, tables

FIGURES = {  # head of the column -> (key, unit)
    "prefill s": ("prefill_seconds", 1.0),
    "first token s": ("ttft_seconds", 1.0),
    "decode ms/token": ("decode_ms_per_token", 1.0),
    "KV MiB": ("kv_bytes_allocated", 2.0**20),
    "peak MiB": ("peak_bytes", 2.0**20),
    "of roofline": ("roofline_fraction", 1.0),
    "cost / 1K decode": ("cost_per_1k_tokens", 1.0),
}
NEEDED = {"context", "attention", *(key for key, _ in FIGURES.values())}
LATER = {"kv": "plain", "quality": {}, "fits": True, "reason": None}  # of older reports


def main(experiment: Experiment) -> dict[str, Any]:
    """Reads, prints and writes; {"reports", "rows"}, the contents of compare.json."""
    config: BenchConfig = experiment.bench
    reports = [(name, read(path)) for name, path in labels(config.compare)]
    output = Path(config.output or Path(experiment.workdir) / "compare")
    data, page_file = folder.claim(output, "compare")
    files = {name: str(path) for name, path in labels(config.compare)}
    compared = {"reports": files, "rows": ratios(reports)}
    data.write(json.dumps(compared, indent=1) + "\n")
    pictures = plots.draw(reports, output)
    page_file.write(signed(page(reports, compared["rows"], pictures)))
    with streams.guarded(data.kept):
        console = Console()
        for line in lines(compared["rows"]):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        print(f"{output}/compare.json, compare.md, {', '.join(pictures)}")
    return compared


def labels(paths: Sequence[str]) -> list[tuple[str, Path]]:
    """(what the report is called, its file): the parts of the paths in which they differ."""
    files = [Path(path) / "report.json" if Path(path).is_dir() else Path(path) for path in paths]
    for given, file in zip(paths, files, strict=True):
        if not file.is_file():
            raise UserError(f"bench.compare={given}: there is no {file}: run evals.bench first")
    if len({file.resolve() for file in files}) < len(files):
        raise UserError(f"bench.compare={','.join(paths)} names one report twice")
    parts = [file.resolve().with_suffix("").parts for file in files]
    differ = [[part for part in one if not all(part in other for other in parts)] for one in parts]
    names = ["/".join(one) or file.stem for one, file in zip(differ, files, strict=True)]
    if len(set(names)) < len(names):
        names = [str(file) for file in files]
    return list(zip(names, files, strict=True))


def read(path: Path) -> dict[str, Any]:
    """A report; UserError names the file that is none."""
    try:
        report = json_lines.parse(path.read_bytes())
    except ValueError as error:
        raise UserError(f"bench.compare={path} is not JSON: {error}") from None
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"bench.compare={path} is no report of evals.bench: it has no rows")
    for row in rows:
        missing = sorted(NEEDED - row.keys())
        if missing:
            raise UserError(
                f"bench.compare={path} is no report of this version: a row has no {missing[0]!r}; "
                "run evals.bench again"
            )
        for name, value in LATER.items():
            row.setdefault(name, value)
    return report


def ratios(reports: plots.Reports) -> list[dict[str, Any]]:
    """A row for each row of each report: its figures, and `ratios` to the first report's."""
    (_, first), *_ = reports
    base = {_key(row): row for row in first["rows"]}
    found = []
    for name, report in reports:
        for row in report["rows"]:
            one = {"report": name, "attention": row["attention"], "kv": row["kv"]}
            one |= {"context": row["context"], "fits": row["fits"], "reason": row["reason"]}
            one |= {key: row[key] for key, _ in FIGURES.values()}
            other = base.get(_key(row), {})
            one["ratios"] = {
                key: row[key] / other[key]
                for key, _ in FIGURES.values()
                if row[key] is not None and other.get(key)
            }
            found.append(one)
    keys = dict.fromkeys([*base, *map(_key, found)])
    place = {key: i for i, key in enumerate(keys)}
    return sorted(found, key=lambda row: place[_key(row)])


def _key(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["attention"], row["kv"], row["context"]


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table: each figure with its ratio to the first report."""
    heads = {head: key for head, key in FIGURES.items() if any(r[key[0]] is not None for r in rows)}
    text = ["| context | attention | KV | report | " + " | ".join(heads) + " |"]
    text += ["|---:|---|---|---|" + "---:|" * len(heads)]
    first = rows[0]["report"]
    for row in rows:
        cells = [_cell(row, key, unit, row["report"] == first) for key, unit in heads.values()]
        names = f"{row['context']:,} | {row['attention']} | {row['kv']} | {row['report']}"
        text.append(f"| {names} | " + " | ".join(cells) + " |")
    return text


def _cell(row: Mapping[str, Any], key: str, unit: float, is_first: bool) -> str:
    if row[key] is None:
        return ""
    ratio = row["ratios"].get(key)
    shown = "" if is_first or ratio is None else f" ({ratio:.2f}x)"
    return f"{row[key] / unit:,.4g}{shown}"


def page(reports: plots.Reports, rows: Sequence[Mapping[str, Any]], pictures: Sequence[str]) -> str:
    """compare.md."""
    text = ["# Context windows compared", ""]
    for name, report in reports:
        text.append(f"- {name}: {tables.title(report)}; weights: {report['weights']}")
    text += ["", f"Ratios are to {reports[0][0]}.", "", *lines(rows), ""]
    text += [f"- {row['report']}: {line}" for row in rows for line in tables.missing([row])]
    text += ["", *(f"![{name.removesuffix('.png')}]({name})" for name in pictures)]
    return "\n".join(text) + "\n"
