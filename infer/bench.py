"""The context-window report: speed and memory of a model against context.

    python -m infer.bench --config=configs/quickstart.py

Sweeps bench.contexts for the model's own attention pattern and for the same sizes with full
attention in every layer. Writes report.json, report.md and context.png into bench.output.
"""

import dataclasses
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from core import backend, cli, hardware, sharding, tree
from core.checkpoint import CONFIG, write_text
from core.config import Experiment, to_dict
from core.sharding import MeshConfig, make_mesh
from infer import load, plot
from infer.config import BenchConfig
from infer.engine import Engine, Plan
from infer.sampling import Sampling, pack
from infer.steps import STEPS, Prefilled
from model import cache, flops, parts, transformer, weights
from model.cache import KVCache
from model.cache_form import Form
from model.config import ModelConfig
from model.transformer import Transformer

COLUMNS = {  # of the printed tables: head -> how a row of the report is shown
    "context": lambda row: f"{row['context']:,}",
    "attention": lambda row: row["attention"],
    "prefill s": lambda row: f"{row['prefill_seconds']:.3f}",
    "prefill tokens/s": lambda row: f"{row['prefill_tokens_per_second']:,.0f}",
    "decode ms/token": lambda row: f"{row['decode_ms_per_token']:.2f}",
    "KV cache MB": lambda row: f"{row['kv_bytes_live'] / 1e6:,.2f}",
    "memory MB": lambda row: f"{row['peak_bytes'] / 1e6:,.1f}",
}

NOTES = """\
- Context: tokens that each row holds when decoding is timed. Speeds are of all rows together.
- Prefill: time to read the context, in chunks. Decode: median of {repeats} calls of {steps} tokens.
  Compilation is left out of both.
- KV cache: keys and values of the tokens that are kept, over all devices; a sliding layer keeps
  its window alone.
- Memory: weights, KV cache of this context and XLA's temporaries, on one device.
- Weights: {weights}. Speed only: this says nothing of quality at contexts beyond training.
"""


def main(experiment: Experiment) -> dict[str, Any]:
    """Measures, prints and writes; the contents of report.json."""
    config: BenchConfig = experiment.bench
    output = Path(config.output or Path(experiment.workdir) / "bench")
    output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    backend.keep_programs(experiment.workdir)
    with jax.set_mesh(make_mesh(experiment.mesh)):
        model, source = open_model(experiment)
        report = {
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "config": experiment.name,
            "weights": source,
            "parameters": parts.total(model.config),
            "model": to_dict(model.config),
            "bench": to_dict(config),
            "rows": [],
        }
        print(title(report), "  ".join(COLUMNS), sep="\n", file=sys.stderr, flush=True)
        for name, variant in variants(model).items():
            for row in sweep(variant, name, config):
                report["rows"].append(row)
                cells = (show(row).rjust(len(head)) for head, show in COLUMNS.items())
                print("  ".join(cells), file=sys.stderr, flush=True)
    report["measured_peak_bytes"] = measured_peak_bytes()
    report["seconds"] = time.perf_counter() - began
    write_text(output / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(output / "report.md", markdown(report))
    plot.context(report["rows"], title(report), output / "context.png")
    Console().print(table(report))
    print(f"{output}/report.json, report.md, context.png; {report['seconds']:.0f} s")
    return report


def open_model(experiment: Experiment) -> tuple[Transformer, str]:
    """The model and where its weights are from: the bundle, or random when there is none."""
    config: BenchConfig = experiment.bench
    path = config.checkpoint or experiment.workdir
    mesh = experiment.mesh
    rules = sharding.prefilling(mesh.strategy, mesh.ulysses, mesh.both_ways)
    how = config.weights, config.weights_group
    if config.checkpoint or config.step is not None or (Path(path) / CONFIG).is_file():
        found = load.find(path, config.step)
        form = weights.rounding(found.config, rules, *how)
        source = f"{path} step {found.step}{weights.text(form)}"
        return load.restore(found, rules, form), source
    form = weights.rounding(experiment.model, rules, *how)
    source = f"random, as {path} is no bundle{weights.text(form)}"
    model = transformer.create(experiment.model, rules, jax.random.key(0))
    if form is None:
        return load.in_compute_dtype(model, experiment.model), source
    return load.rounded(model, form), source


def variants(model: Transformer) -> dict[str, Transformer]:
    """The model as it is, and with the same weights but full attention in every layer."""
    config = model.config
    kinds = [spec.kind for spec in config.pattern if spec.kind != "full"]
    if not kinds:
        return {"full": model}
    pattern = tuple(spec.everywhere() for spec in config.pattern)
    full_config = dataclasses.replace(config, pattern=pattern)
    everywhere = transformer.abstract(full_config, model.rules)
    return {kinds[0]: model, "full": tree.with_leaves(everywhere, weights.leaves(model))}


def sweep(model: Transformer, attention: str, config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One row of the report for each context, shortest first.

    One text grows through all contexts, in a cache allocated for the longest: two programs
    serve the whole sweep, and no token is read twice.
    """
    contexts = sorted(set(config.contexts))
    room = STEPS * (config.repeats + 1)
    model.config.check_length("bench.contexts with the tokens decoded", contexts[-1] + room)
    chunk = min(config.prefill_chunk, contexts[0])
    plan = Plan.of(config.batch_size, contexts[-1], room, chunk)
    engine = Engine(model, plan, form=Form.of(config))
    shape = (plan.batch, contexts[-1])
    tokens_BT = np.random.default_rng(0).integers(0, model.config.vocab_size, shape, np.int32)
    jax.block_until_ready(engine.prefill(tokens_BT[:, : plan.chunk]))  # compiles and warms up
    now, done, seconds = engine.empty(), 0, 0.0
    for context in contexts:
        began = engine.clock()
        now = jax.block_until_ready(engine.prefill(tokens_BT[:, :context], now, done))
        seconds += engine.clock() - began
        done = context
        decode_seconds = time_decode(engine, now, tokens_BT[:, :context], config.repeats)
        yield report_row(engine, now.cache, attention, context, seconds, decode_seconds)


def time_decode(engine: Engine, now: Prefilled, tokens_BT: np.ndarray, repeats: int) -> float:
    """Seconds a token (of every row) at this depth; `now` is copied, and stays as it is."""
    stopped_B = np.zeros(engine.plan.batch, bool)
    copy = jax.tree.map(jnp.copy, now)
    hows = [Sampling(temperature=0, max_tokens=STEPS * (repeats + 1))] * len(tokens_BT)
    state = engine.start(copy, tokens_BT, [0] * len(hows), pack(hows))
    state, _ = jax.block_until_ready(engine.advance(state, stopped_B))  # compiles, warms up
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(engine.advance(state, stopped_B))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) / STEPS


def report_row(
    engine: Engine, kv: KVCache, attention: str, context: int, prefill: float, decode: float
) -> dict[str, Any]:
    """The measured row; None is what is not known here."""
    config, batch = engine.model.config, engine.plan.batch
    rules = engine.model.rules
    theory = cache.kv_bytes(config, batch, context, rules, engine.form)
    shards = math.prod(rules.size(name) for name in ("batch", "kv_length", "act_kv_heads"))
    on_device = theory * device_bytes(kv.slots) // tree.num_bytes(kv.slots)
    tokens = batch * context
    return {
        "context": context,
        "attention": attention,
        "phase": "prefill+decode",
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": tokens / prefill,
        "decode_ms_per_token": 1e3 * decode,
        "kv_bytes_theory": theory,
        "kv_bytes_per_device": theory // shards,
        "kv_bytes_live": live_bytes(kv),
        "peak_bytes": device_bytes(engine.model) + on_device + engine.temporary_bytes(),
        "mfu": prefill_mfu(config, context, tokens / prefill),
        "mbu_weights": None,
        "mbu_total": None,
        "roofline_fraction": None,
        "quality": {},
        "cost_per_1k_tokens": None,
        "fits": True,
    }


def live_bytes(kv: KVCache) -> int:
    """Bytes of the keys and values of all tokens that the cache holds."""
    return sum(int((slot.positions_BS >= 0).sum()) * slot.token_bytes for slot in kv.slots)


def device_bytes(arrays: Any) -> int:
    """Bytes of all leaves on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )


def prefill_mfu(config: ModelConfig, context: int, tokens_per_second: float) -> float | None:
    """Share of the devices' peak FLOP/s that prefill reaches; it computes no logits."""
    peak = hardware.peak_flops(jax.devices()[0])
    if peak is None:
        return None
    forward = flops.training_flops_per_token(config, context, "seen") / 3
    forward -= 2 * config.vocab_size * config.embed_dim
    return forward * tokens_per_second / (peak * jax.device_count())


def measured_peak_bytes() -> int:
    """Most bytes in use so far: of the first device, or of this process on a CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def title(report: dict[str, Any]) -> str:
    """What was measured, on what."""
    layers = report["model"]["num_layers"]
    windows = [spec["window"] for spec in report["model"]["pattern"]]
    windows = [window for i in range(layers) if (window := windows[i % len(windows)])]
    pattern = ""
    if windows:
        seen = " or ".join(f"{window:,}" for window in sorted(set(windows)))
        pattern = f" (sliding: {len(windows)} of them see {seen} tokens)"
    return (
        f"{report['config']}: {report['parameters'] / 1e6:.1f} M parameters, "
        f"{layers} layers{pattern}, {report['model']['dtype']}, on {report['device']}"
    )


def table(report: dict[str, Any]) -> Table:
    """The rows for a terminal."""
    grid = Table(title=title(report))
    for head in COLUMNS:
        grid.add_column(head, justify="right")
    previous = None
    for row in report["rows"]:
        if previous not in (None, row["attention"]):
            grid.add_section()
        previous = row["attention"]
        grid.add_row(*(show(row) for show in COLUMNS.values()))
    return grid


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    lines = [f"# Context window: {title(report)}", "", "![](context.png)", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---:|" * len(COLUMNS)]
    for row in report["rows"]:
        lines.append("| " + " | ".join(show(row) for show in COLUMNS.values()) + " |")
    repeats, source = report["bench"]["repeats"], report["weights"]
    return "\n".join([*lines, "", NOTES.format(repeats=repeats, steps=STEPS, weights=source)])


if __name__ == "__main__":
    cli.run(main, __doc__, model=ModelConfig, bench=BenchConfig, mesh=MeshConfig)
