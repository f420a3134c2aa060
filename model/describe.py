"""Describes a model by arithmetic alone: parameters, memory, FLOPs, cache.

    python -m model.describe --config=configs/llama3_8b.py --batches=1,8
    python -m model.describe --bundle=runs/quickstart --contexts=4096,65536 --json

From shapes alone: a model of any size is described in seconds, no array is made.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any, get_args

from core import checkpoint, sharding
from core.command import cli
from core.config import Section, UserError, setting, to_dict
from model.config import ModelConfig
from model.sizes import flops, memory, parts, weights
from model.sizes import table as describe_table
from model.sizes.memory import Format
from model.transformer import Remat

LONGEST = 2**20


@dataclasses.dataclass(frozen=True)
class DescribeConfig(Section):
    """The flags of this command, beside --config or --bundle."""

    contexts: tuple[int, ...] = setting(
        (), "tokens a row; none is 1024, 4096, ... 1048576 and the model's own", low=1
    )
    batches: tuple[int, ...] = setting((1,), "rows", low=1)
    weights: tuple[Format, ...] = setting(
        ("float32", "bfloat16", "int8", "int4"), "of the matrices, to decode"
    )
    cache: tuple[Format, ...] = setting(
        (), "of keys and values; none is model.dtype, as decoding allocates it, int8 and int4"
    )
    group: int | None = setting(
        None, "inputs that share a scale in int8 and int4, as decode.weights_group", low=0
    )
    json: bool = setting(False, "JSON on stdout in place of the tables, in bytes and FLOPs")

    def check(self) -> None:
        for name in ("batches", "weights"):
            if not getattr(self, name):
                raise UserError(f"{name}=() is empty: name at least one")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Prints the tables, or JSON; the report."""
    of_model = ("--bundle", "--config")
    own = [arg for arg in argv if not arg.startswith("--config.")]
    own = [arg for arg in own if arg.partition("=")[0] not in of_model]
    options = cli.flags(own, DescribeConfig)
    name, model = opened([arg for arg in argv if arg not in own])
    found = report(name, model, options)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        describe_table.show(found)
    return found


def opened(argv: Sequence[str]) -> tuple[str, ModelConfig]:
    """(name, model) of `--config=FILE` with its overrides, or of `--bundle=DIR`."""
    bundles = [arg.partition("=")[2] for arg in argv if arg.partition("=")[0] == "--bundle"]
    if bundles == [""]:
        raise UserError("--bundle is empty: name the directory of a bundle, --bundle=DIR")
    if len(bundles) > 1:
        raise UserError(f"--bundle is given {len(bundles)} times: {', '.join(bundles)}; name one")
    if bundles and len(argv) > 1:
        raise UserError(f"{' '.join(argv)}: --bundle goes without --config; name one of the two")
    if bundles:
        return bundles[0], checkpoint.read_config(bundles[0], model=ModelConfig).model
    if not argv:
        raise UserError("a model is needed: --config=FILE[:ARG] or --bundle=DIR")
    experiment = cli.parse(argv, dict(model=ModelConfig))
    return experiment.name, experiment.model


def report(name: str, model: ModelConfig, options: DescribeConfig) -> dict[str, Any]:
    """All figures, exact, in bytes, FLOPs and parameters."""
    powers = {LONGEST // 4**i for i in range(6)} | {model.context}
    contexts = sorted(set(options.contexts) or powers)
    caches = options.cache or (model.dtype, "int8", "int4")
    options = dataclasses.replace(options, cache=caches)
    return {
        "name": name,
        "model": to_dict(model),
        "parameters": {
            "total": parts.total(model),
            "matrix": flops.matrix_parameters(model),
            "parts": {key: part._asdict() for key, part in parts.count(model).items()},
        },
        "quantisation": {
            "weights_group": {
                form: weights.rounding(model, sharding.whole(), form, options.group).group
                for form in options.weights
                if form in weights.BITS
            },
            "cache_group": model.head_dim,
            "scale_dtype": "bfloat16",
        },
        "weight_bytes": {
            form: memory.weight_bytes(model, form, options.group) for form in options.weights
        },
        "kv_bytes_per_token": {form: memory.token_bytes(model, form) for form in options.cache},
        "flops_per_token": [flops_row(model, context) for context in contexts],
        "decode": decode_rows(model, contexts, options),
        "training": training(model, contexts, options.batches),
    }


def flops_row(model: ModelConfig, context: int) -> dict[str, float]:
    """Returns FLOPs by the keys that masks let a token see, and as if it saw all."""
    row = {"context": context}
    for work in ("training", "forward", "decode"):
        count = vars(flops)[f"{work}_flops_per_token"]
        for convention in get_args(flops.Convention):
            row[f"{work}_{convention}"] = count(model, context, convention)
    return row


def decode_rows(
    model: ModelConfig, contexts: Sequence[int], options: DescribeConfig
) -> list[dict[str, Any]]:
    """A row for each context, batch and type of cache."""
    sizes = {f: memory.weight_bytes(model, f, options.group) for f in options.weights}
    rows = []
    for context in contexts:
        for batch in options.batches:
            for form in options.cache:
                kv, cache = memory.cache_bytes(model, batch, context, form)
                row = dict(context=context, batch=batch, cache=form, kv_bytes=kv, cache_bytes=cache)
                row["kv_bytes_per_token"] = kv / (batch * context)
                totals = {name: size + cache for name, size in sizes.items()}
                rows.append({**row, "total_bytes": totals})
    return rows


def training(model: ModelConfig, contexts: Sequence[int], batches: Sequence[int]) -> dict[str, Any]:
    """Parameters, gradients and moments; then a row for each context and batch."""
    state = memory.state_bytes(model)
    kept = {remat: memory.kept_bytes(model, remat) for remat in get_args(Remat)}
    rows = []
    for context in contexts:
        for batch in batches:
            tokens = context * batch
            device = {r: round(k.device * tokens) for r, k in kept.items()}
            totals = {remat: sum(state) + size for remat, size in device.items()}
            host = round(kept["offload"].host * tokens)
            rows.append(
                dict(context=context, batch=batch, kept_bytes=device, offloaded_bytes=host)
                | dict(total_bytes=totals)
            )
    per_token = {remat: k._asdict() for remat, k in kept.items()}
    return {**state._asdict(), "kept_bytes_per_token": per_token, "rows": rows}


def run() -> None:
    """`python -m model.describe`."""
    with cli.exits():
        if any(arg in ("-h", "--help") for arg in sys.argv[1:]):
            print("\n".join([__doc__.strip(), "", *cli.fields_text("", DescribeConfig)]))
            return
        main(sys.argv[1:])


if __name__ == "__main__":
    run()
