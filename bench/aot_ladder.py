"""Llama 3 8B from 32K to 1M tokens on TPU slices that are not there: docs/aot.md and docs/aot.json.

    python -m bench.aot_ladder        (make aot-ladder; about 3 minutes a row on 2 cores)

Each row is one `python -m train.aot`, in a process of its own. Rows that stand in docs/aot.json
are kept: delete the file to measure all of them again.
"""

import json
import sys
import tempfile
from pathlib import Path

from bench.sides.commands import call
from core.command import cli
from core.storage.output import File, begins_with, is_json

ROWS, TABLE = Path("docs/aot.json"), Path("docs/aot.md")
LENGTHS = {"32K": 2**15, "128K": 2**17, "512K": 2**19, "1M": 2**20}
# (slice, lengths, variants): a list of lengths is tried from the left until one fits.
CASES = [
    *(("v5p:4x4x8", [name], "") for name in LENGTHS),
    ("v5p:4x4x8", ["1M"], "-sliding"),
    ("v5p:4x4x8", ["1M"], "-nsa"),
    ("v5e:16x16", ["1M", "512K", "128K", "32K"], ""),
    ("v6e:16x16", ["1M", "512K", "128K", "32K"], ""),
]
HEAD = """\
# Llama 3 8B on slices that are not there

Written by `make aot-ladder` (`bench/aot_ladder.py`); all figures are in `aot.json`. Each row is the
train step of `configs/llama3_8b.py`, 1,048,576 tokens a step, compiled by libtpu on a machine
without a TPU. Pattern: `full` attention in every layer; `sliding`, three layers with a window of
4,096 to one with full attention; `nsa`, native sparse attention in every layer.

Nothing here was run. How the figures come about:

- Memory: the compiler's, of one device: the peak of all that lives at once. The limit is what
  libtpu leaves to a program. Where it refuses one, the bytes that it names, which are its peak.
- PFLOP: of the busiest device, rematerialisation included. `cost_analysis()` of XLA counts the body
  of a loop once (the same for 2 layers as for 4), so products are counted in the optimised HLO,
  times the trips of their loops. How many tiles attention visits depends on the documents: it is
  counted by formula for one document a row, on the shard of the length that sees most keys.
- Seconds at best: a lower bound from peak rates; the largest of products, memory traffic and
  overlapped collectives, then the collectives that the compiler does not overlap. Memory traffic is
  counted as FLOPs are: what the instructions of each trip read from and write to HBM. XLA's own
  `optimal_seconds` is no use here: -1 s for each operation that it cannot time.
- MFU at best: useful FLOPs at that time, counting the keys that are seen as MaxText does.

"""
COLUMNS = {
    "slice": lambda r: r["topology"],
    "tokens a row": lambda r: f"{r['length']:,}",
    "pattern": lambda r: r["pattern"],
    "fits": lambda r: "yes" if r["fits"] else "**no**",
    "GiB a device": lambda r: f"{r['hbm_bytes_per_device'] / 2**30:.1f}",
    "limit": lambda r: f"{r['hbm_limit_bytes'] / 2**30:.1f}",
    "PFLOP a device": lambda r: _shown(r["flops_per_device"], 1e15, ".2f"),
    "seconds at best": lambda r: _shown(r["optimal_seconds"], 1, ".2f"),
    "MFU at best": lambda r: _shown(r["estimated_mfu"], 1, ".0%"),
    "GiB in collectives": lambda r: _collectives(r),
    "compile s": lambda r: f"{r['compile_seconds']:.0f}",
}


def main() -> None:
    """Measures the rows that are missing, then writes the table."""
    rows = File(ROWS, "aot.json", is_json("topology", "length", "pattern"))
    page = File(TABLE, "aot.md", begins_with(HEAD.partition("\n")[0]))
    done = json.loads(ROWS.read_text()) if ROWS.exists() else []
    for topology, lengths, variant in CASES:
        for name in lengths:
            row = find(done, topology, name, variant)
            if row is None:
                row = measure(topology, name, variant)
                done.append(row)
                rows.write(json.dumps(done, indent=1) + "\n")
            if row["fits"]:
                break
    page.write(HEAD + table(done))


def find(rows: list[dict], topology: str, name: str, variant: str) -> dict | None:
    """The row of this case, if it is there."""
    key = topology, LENGTHS[name], variant.removeprefix("-") or "full"
    return next((r for r in rows if (r["topology"], r["length"], r["pattern"]) == key), None)


def measure(topology: str, name: str, variant: str) -> dict:
    """Compiles one case in its own process; what train.aot reports, and the case's name."""
    print(f"{topology} {name}{variant}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "aot.json")
        command = [sys.executable, "-m", "train.aot"]
        command += [f"--config=configs/llama3_8b.py:{LENGTHS[name]}{variant}"]
        command += [f"--config.aot.topology={topology}", f"--config.aot.output={output}"]
        call(command)
        pattern = variant.removeprefix("-") or "full"
        return {"length": LENGTHS[name], "pattern": pattern, **json.loads(output.read_text())}


def table(rows: list[dict]) -> str:
    """The rows as a table of Markdown."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(show(row) for show in COLUMNS.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _shown(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else format(value / unit, form)


def _collectives(row: dict) -> str:
    """Bytes by kind; those that overlap are marked so."""
    parts = [
        f"{c['kind']} {c['bytes'] / 2**30:.0f}{' (overlaps)' if c['async'] else ''}"
        for c in row["collectives"]
        if c["bytes"] >= 2**29
    ]
    return ", ".join(parts)


if __name__ == "__main__":
    with cli.exits():
        main()
