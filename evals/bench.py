"""The context-window report: how far a model sees, how fast, and at what cost.

    python -m evals.bench --config=configs/quickstart.py --config.bench.tasks=needle,vt

Speed, memory and quality at each of bench.contexts, for the model as it is and for full attention
in every layer. Writes report.json, report.md and plots into bench.output; an interrupted run goes
on where it was. bench.compare=A,B overlays reports, bench.topology=v5p:2x2x1 predicts for TPUs.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from core import backend
from core.command import cli
from core.config import Experiment
from core.sharding import MeshConfig, make_mesh
from core.storage import streams
from core.storage.output import signed
from evals.config import BenchConfig
from evals.report import predict, source, sweep, topology
from evals.report.measuring import peaks, quality, quality_steps
from evals.report.show import compare, folder, plots, tables
from evals.report.store import NAME, Store
from model.config import ModelConfig


def main(experiment: Experiment) -> dict[str, Any]:
    """Measures, compares or predicts, prints and writes; what is in the JSON file."""
    config: BenchConfig = experiment.bench
    if config.compare:
        return compare.main(experiment)
    began = time.perf_counter()
    output = Path(config.output or Path(experiment.workdir) / "bench")
    data, page = folder.claim(output, "report")
    with streams.guarded(data.kept):
        if config.topology:
            report, store = topology.report(experiment), None
        else:
            report, store = measure(experiment, output)
        report["seconds"] = time.perf_counter() - began
        data.write(json.dumps(report, indent=1) + "\n")
        pictures = plots.draw([("", report)], output)
        page.write(signed(tables.page(report, pictures)))
        if store:
            store.remove()
        show(report, output, pictures)
    return report


def measure(experiment: Experiment, output: Path) -> tuple[dict[str, Any], Store]:
    """The report of this device, and what was measured, which is kept in rows.jsonl meanwhile."""
    config: BenchConfig = experiment.bench
    backend.keep_programs(experiment.workdir)
    with jax.set_mesh(make_mesh(experiment.mesh)):
        of = source.find(experiment)
        tokenizer = of.found.tokenizer if of.found else None
        material = quality.read(experiment, tokenizer, of.model.config.vocab_size)
        available = predict.capacity(config.memory_gib, 0)
        planned = sweep.plan(source.cases_of(of.model, config), config, available)
        device = f"{peaks.num_devices()} x {jax.devices()[0].device_kind}"
        report = source.head(experiment, of, device)
        print(tables.title(report), file=sys.stderr, flush=True)
        planned = sweep.with_model(planned, source.cases_of(source.weights(of), config))
        best = peaks.measure(of.model.config.compute_dtype)
        report["peaks"] = best._asdict()
        store = Store(output / NAME, sweep.depends(experiment, of.depends))
        speeds = sweep.speeds(planned, config, best)
        told = quality_steps.steps(planned, material, config, best, available)
        results = sweep.run([*speeds, *(task for _, _, task in told)], store)
        report["rows"] = sweep.assemble(planned, config, speeds, results)
    qualities = quality_steps.gather(told, results[len(speeds) :])
    for row, one in zip(report["rows"], planned, strict=True):
        row["quality"] = qualities.get(one.name, {})
    report["quality_text"] = material.source
    report["effective_length"] = quality.by_case(report["rows"])
    return report, store


def show(report: dict[str, Any], output: Path, pictures: list[str]) -> None:
    """Prints the tables, and where the files are."""
    console = Console()
    console.print(tables.terminal(report))
    for line in tables.missing(report["rows"]):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    print(f"{output}/report.json, report.md, {', '.join(pictures)}; {report['seconds']:.0f} s")


def start(experiment: Experiment) -> None:
    """Devices where a model is run, the compiler alone where it is not."""
    if experiment.bench.topology:
        backend.compile_only()
    elif not experiment.bench.compare:
        cli.start_backend(experiment)


if __name__ == "__main__":
    cli.run(main, __doc__, start=start, model=ModelConfig, bench=BenchConfig, mesh=MeshConfig)
