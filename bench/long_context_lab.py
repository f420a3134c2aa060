"""Trains and questions all models of configs/long_context_lab.py: docs/long-context-lab.md.

    python -m bench.long_context_lab        (make lab)

Models whose runs/lab-*/recall.json is there are kept: delete it to ask again, or the run to
train again. The docs also get a picture, and all figures in a JSON file.
"""

import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.sides.commands import call
from core.command import cli
from core.storage import files
from core.storage.output import File, begins_with, is_json

CONFIG = "configs/long_context_lab.py"
SHORT = "short", "short-nsa"  # where the others begin
KINDS = "full", "sliding", "sinks", "moba", "nsa"
EXTENDED, TRAINED = "extended", "yarn, trained a little at 4K"
DOCS, PAGE = Path("docs"), "long-context-lab"
COMMANDS = "data.prepare", "train.pretrain", "evals.recall"
# Okabe and Ito's palette, and a marker each: told apart by every eye, and in print.
STYLES = {
    "full": ("#000000", "s"),
    "sliding": ("#0072B2", "o"),
    "sinks": ("#56B4E9", "v"),
    "moba": ("#D55E00", "^"),
    "nsa": ("#009E73", "D"),
    "none": ("#000000", "s"),
    "pi": ("#E69F00", "o"),
    "ntk": ("#0072B2", "v"),
    "dynamic": ("#56B4E9", "^"),
    "yarn": ("#009E73", "D"),
    TRAINED: ("#CC79A7", "P"),
}


def main() -> None:
    """Runs what is missing, then writes the table, the picture and the figures."""
    data = File(DOCS / f"{PAGE}.json", PAGE, is_json(*SHORT, *KINDS))
    page = File(DOCS / f"{PAGE}.md", PAGE, begins_with(HEAD.partition("\n")[0]))
    File(DOCS / f"{PAGE}.png", PAGE, lambda content: content.startswith(b"\x89PNG"))
    for name in (*SHORT, *KINDS, EXTENDED):
        if not is_asked(run(name) / "recall.json"):
            for command in COMMANDS:
                print(command, name, file=sys.stderr, flush=True)
                call([sys.executable, "-m", command, f"--config={CONFIG}:{name}"])
    models = {name: collect(run(name)) for name in (*SHORT, *KINDS, EXTENDED)}
    data.write(json.dumps(models, indent=1) + "\n")
    page.write(markdown(models))
    picture(models, DOCS / f"{PAGE}.png")


def run(name: str) -> Path:
    """The workdir of a model."""
    return Path(f"runs/lab-{name}")


def is_asked(path: Path) -> bool:
    """Returns whether a recall.json is there that was written to its end."""
    return path.is_file() and json.loads(path.read_text()).get("complete", True)


def collect(workdir: Path) -> dict[str, Any]:
    """Returns the figures that training and recall wrote into `workdir`.

    Seconds are those of all steps at the median speed, so that a pause does not count.
    """
    config = json.loads((workdir / "config.json").read_text())["train"]
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    tokens = config["steps"] * config["batch_size"] * config["length"]
    speeds = [row["tokens_per_second"] for row in lines if "tokens_per_second" in row]
    return {
        "steps": config["steps"],
        "tokens": tokens,
        "train_seconds": tokens / statistics.median(speeds),
        "loss": next(row["eval_loss"] for row in reversed(lines) if "eval_loss" in row),
        "rows": json.loads((workdir / "recall.json").read_text())["rows"],
    }


def by_kind(models: dict[str, Any], rope: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of each kind of attention by length, with RoPE extended in this way."""
    return {name: [r for r in models[name]["rows"] if r["rope"] == rope] for name in KINDS}


def by_rope(models: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of the full model by length, for each way to extend it."""
    rows = models["full"]["rows"]
    names = dict.fromkeys(row["rope"] for row in rows)
    found = {name: [row for row in rows if row["rope"] == name] for name in names}
    return found | {TRAINED: models[EXTENDED]["rows"]}


def markdown(models: dict[str, Any]) -> str:
    """docs/long-context-lab.md."""
    row = models["full"]["rows"][0]
    training = [
        f"| {name} | {m['steps']:,} | {m['tokens'] / 1e6:.1f} M | {m['train_seconds'] / 60:.1f} | "
        f"{m['loss']:.3f} |"
        for name, m in models.items()
    ]
    parts = [
        HEAD.format(asked=row["asked"], depths=len(row["by_depth"])),
        "## Kinds of attention, RoPE extended by YaRN",
        table(by_kind(models, "yarn"), "second layer"),
        "## Kinds of attention, RoPE as it was trained",
        table(by_kind(models, "none"), "second layer"),
        "## RoPE of the full model, extended to 16 times the length",
        table(by_rope(models), "RoPE"),
        "## Training",
        "| model | steps | tokens | minutes | validation loss |\n|---|---:|---:|---:|---:|\n"
        + "\n".join(training),
    ]
    return "\n\n".join(parts) + "\n"


def table(lines: dict[str, list[dict[str, Any]]], head: str) -> str:
    """Accuracies by length, in Markdown."""
    lengths = [row["length"] for row in next(iter(lines.values()))]
    out = [f"| {head} | " + " | ".join(f"{n:,}" for n in lengths) + " |"]
    out.append("|---|" + "---:|" * len(lengths))
    for name, rows in lines.items():
        out.append(f"| {name} | " + " | ".join(f"{row['accuracy']:.1f}" for row in rows) + " |")
    return "\n".join(out)


def picture(models: dict[str, Any], path: Path) -> None:
    """Three panels: kinds by length, RoPE by length, and kinds by depth at the trained length."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for panel, lines in zip(axes, (by_kind(models, "yarn"), by_rope(models)), strict=False):
        for name, rows in lines.items():
            lengths = [row["length"] for row in rows]
            _draw(panel, name, lengths, [row["accuracy"] for row in rows])
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
        panel.minorticks_off()
        panel.set_xlabel("length of the text, tokens")
    for name, rows in by_kind(models, "yarn").items():
        values = rows[0]["by_depth"]
        depths = [(i + 0.5) / len(values) for i in range(len(values))]
        _draw(axes[2], name, depths, values)
    axes[2].set_xlabel("depth of the record: 0 is the start of the text, 1 its end")
    titles = "Kinds of attention, with YaRN", "RoPE of the full model", "Kinds by depth, at 1K"
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, fontsize=11)
        panel.set_ylim(-3, 103)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(
            fontsize=9, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14)
        )
    axes[0].set_ylabel("values found, %")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    files.replace(path, out.getvalue())


def _draw(panel, name: str, x: list[float], y: list[float]) -> None:
    colour, marker = STYLES[name]
    # Thinner and smaller than those below: lines that coincide are all seen.
    width = 4.2 - 0.6 * len(panel.lines)
    panel.plot(x, y, color=colour, marker=marker, markersize=3 * width, linewidth=width, label=name)


HEAD = """\
# The long-context lab: who finds a value by its key?

Written by `make lab` (`bench/long_context_lab.py`, which trains and asks all models of
`configs/long_context_lab.py` on CPUs); all figures are in `long-context-lab.json`.

Each text holds 32 records, `VALUE key`, at even depths of RULER's noise, and ends with one of the
keys; the model must write its value. There are 128 keys and 32 values: guessing finds 3%, or a
little more for a model that knows which values the text has. Every accuracy is of {asked} greedy
answers at {depths} even depths, read through the cache in chunks of 512 tokens (`evals/recall.py`).

All models have two layers, of which the first sees two tokens. They learn to look for a key in
texts of up to 128 tokens (`:short`, full attention; NSA has weights of its own and begins with
`:short-nsa`), then each goes on with its own second layer in texts of 511 to 1,022 tokens. Longer
ones are never trained for, but in the last line of the third table: that model goes on from `full`
for 60 steps at 4,096 tokens. Otherwise RoPE is extended without any training, always to 16 times
the length: `pi` (arXiv 2306.15595), `ntk` (a larger base), `dynamic` (NTK by the length of each
text), `yarn` (arXiv 2309.00071).

![](long-context-lab.png)"""


if __name__ == "__main__":
    with cli.exits():
        main()
