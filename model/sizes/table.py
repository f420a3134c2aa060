"""The report of model.describe as tables that a person reads."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 100  # of what no terminal bounds

SEEN = ("seen", "all")  # keys, as in flops.Convention

NOTES = """\
1 GB is 10^9 bytes, all figures are of all devices together. Exact from shapes: parameters, weights,
cache, state. Weights in int8 and int4: the layers' matrices, {groups};
embedding and head in int8, a row as one group; a {scale_dtype} scale a group; all else is
in model.dtype. A cache in int8 and int4: each key and each value of a head ({cache_group}) is a
group. A sliding layer keeps its window alone; positions are counted.
FLOPs: 2 for a multiply-add; seen: keys that the masks let a token see, all: every key; training is
three forward passes; decode: the last token of the context.
Training: AdamW on all parameters, gradients whole beside them; activations as differentiation asks
to keep them from the layers, where XLA may keep less.
Not counted: temporaries (a layer's work, logits and loss, prefill chunks), and what runs the
program. train.aot compiles a training step and tells its true peak."""


def show(report: dict[str, Any]) -> None:
    """Prints everything on stdout."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(title(report), highlight=False, soft_wrap=True)
    for table in (parameters(report), flops(report), decode(report), training(report)):
        console.print(table)
    print(NOTES.format(**report["quantisation"], groups=groups(report)))


def groups(report: dict[str, Any]) -> str:
    """Inputs of a matrix that share a scale."""
    found = report["quantisation"]["weights_group"]
    each = (f"{form} {f'in groups of {n} inputs' if n else 'an output as one group'}"
            for form, n in found.items())  # fmt: skip
    return ", ".join(each) or "none here"


def title(report: dict[str, Any]) -> str:
    """Name and sizes."""
    model = report["model"]
    return (
        f"{report['name']}: {report['parameters']['total']:,} parameters, "
        f"{model['num_layers']} layers of width {model['embed_dim']}, "
        f"{model['num_heads']} query and {model['num_kv_heads']} kv heads of {model['head_dim']}, "
        f"context {model['context']:,}"
    )


def parameters(report: dict[str, Any]) -> Table:
    """Lines of parameters by part; a layer's stand once where all slots of the pattern agree."""
    table = grid("parameters", "part", "all", "share", "a layer")
    counted = report["parameters"]
    for name, part in counted["parts"].items():
        layers = sorted(set(part["per_layer"]))
        layer = " to ".join(f"{n:,}" for n in dict.fromkeys((layers[0], layers[-1])))
        share = f"{part['total'] / counted['total']:.1%}"
        table.add_row(name, f"{part['total']:,}", share, "" if layers == [0] else layer)
    table.add_section()
    table.add_row("total", f"{counted['total']:,}", "100.0%", "")
    table.add_row("that multiply a token", f"{counted['matrix']:,}", "", "")
    return table


def flops(report: dict[str, Any]) -> Table:
    """Lines of FLOPs by context, in both conventions."""
    heads = [f"{work} {keys}" for work in ("training", "forward", "decode") for keys in SEEN]
    table = grid("FLOPs per token", "context", *heads)
    for row in report["flops_per_token"]:
        context, *figures = row.values()
        table.add_row(f"{context:,}", *map(short, figures))
    return table


def decode(report: dict[str, Any]) -> Table:
    """Weights and cache, for each type of either."""
    weights = report["weight_bytes"]
    each = ", ".join(f"{n:,} B in {f}" for f, n in report["kv_bytes_per_token"].items())
    table = grid(
        "memory to decode: keys and values, then the cache with the weights in each type\n"
        f"keys and values of a token, while all layers keep it: {each}",
        *("context", "batch", "cache", "KV", "KV / token", *weights),
    )
    table.add_row("weights", "", "", "", "", *map(size, weights.values()))
    grouped(table, report["decode"], lambda row: (
        row["cache"], size(row["kv_bytes"]), size(row["kv_bytes_per_token"]),
        *map(size, row["total_bytes"].values()),
    ))  # fmt: skip
    return table


def training(report: dict[str, Any]) -> Table:
    """State and activations, for each policy of train.remat."""
    found = report["training"]
    state = ", ".join(f"{key} {size(found[key])}" for key in ("parameters", "gradients", "moments"))
    policies = found["kept_bytes_per_token"]
    table = grid(
        f"memory to train, by train.remat\n{state}, then activations",
        *("context", "batch", *policies, "offloaded"),
    )
    per_token = [size(kept["device"]) for kept in policies.values()]
    table.add_row("a token", "", *per_token, size(policies["offload"]["host"]))
    grouped(table, found["rows"], lambda row: (
        *map(size, row["total_bytes"].values()), size(row["offloaded_bytes"])
    ))  # fmt: skip
    return table


def grid(heading: str, *heads: str) -> Table:
    """An empty table, figures to the right."""
    table = Table(title=heading, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if not index and head == "part" else "right")
    return table


def grouped(table: Table, rows: Iterable[dict[str, Any]], cells: Any) -> None:
    """Adds rows; a context and a batch are written where they change."""
    last: Sequence[int] = ()
    for row in rows:
        place = row["context"], row["batch"]
        names = ("", "") if place == last else tuple(f"{n:,}" for n in place)
        table.add_row(*names, *cells(row))
        last = place


def size(num_bytes: float) -> str:
    """Bytes in three or four digits."""
    return f"{short(num_bytes)}B"


def short(number: float) -> str:
    """12.3 G: a number in powers of 1000."""
    power = 0
    while number >= 1000 and power < 6:
        number, power = number / 1000, power + 1
    digits = 0 if number == int(number) and not power else max(0, 3 - len(str(int(number))))
    return f"{number:.{digits}f} {' kMGTPE'[power].strip()}"
