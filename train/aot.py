"""Compiles the train step for a TPU slice that is not there: does it fit, and what does it cost?

    python -m train.aot --config=configs/llama3_8b.py --config.aot.topology=v5p:4x4x8

The same step as train.pretrain runs, from shapes alone: no array is made. Needs the TPU compiler
(pip install -e .[aot]) and no TPU. Prints a table; aot.output names a file for it as JSON.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import backend, layout, sharding, tree
from core.command import cli
from core.compile import aot, hardware, hlo
from core.compile.hardware import Chip
from core.config import Experiment
from core.sharding import MeshConfig, Rules, make_mesh
from core.storage import streams
from core.storage.output import File, begins_with, is_json
from data.batch import Batch
from model import transformer
from model.config import ModelConfig
from train import aot_report, optimizer, state
from train.aot_report import Report
from train.attention_flops import busiest_device
from train.config import AotConfig, TrainConfig
from train.loop.run import choose_rules
from train.step import make_train_step

ATTENTION = "/attention/shard_map/"  # in the op_name of all that an attention kernel does


def main(experiment: Experiment) -> Report:
    """Compiles, prints the table and writes the files that `aot` names."""
    config: AotConfig = experiment.aot
    file = File(config.output, "aot.output", is_json("topology", "fits", "compile_seconds"))
    other = [("aot.output", config.output)]
    program = File(config.text, "aot.text", begins_with("HloModule"), other)
    devices = aot.slice_devices(config.topology)
    experiment.model.check_length("train.length", experiment.train.length)
    with jax.set_mesh(make_mesh(experiment.mesh, devices)):
        one_document = np.ones((1, experiment.train.length), np.int32)
        rules = choose_rules(experiment, lambda: one_document)
        compiled = aot.compile_for(lower(experiment, rules))
        order = layout.order(rules.layout, experiment.train.length, rules.ring_size())
    chip = hardware.one_device(devices)
    report = measure(experiment, compiled, chip, len(devices), order)
    file.write(json.dumps(aot_report.to_dict(report), indent=2) + "\n")
    if compiled.text:
        program.write(compiled.text)
    # A file that goes to stdout has it to itself.
    if not (file.is_stdout or program.is_stdout):
        with streams.guarded(file.kept):
            aot_report.show(experiment, report)
    return report


def lower(experiment: Experiment, rules: Rules) -> jax.stages.Lowered:
    """The train step on the mesh in use, lowered for TPUs, its state donated as in training."""
    config = experiment.train
    names = tree.named_leaves(transformer.abstract(experiment.model, rules))
    rule = optimizer.make(config, names)
    step = make_train_step(config, rule, rules)
    planned = state.abstract(experiment.model, rules, rule)
    return step.trace(planned, batch(config, rules)).lower(lowering_platforms=("tpu",))


def batch(config: TrainConfig, rules: Rules) -> Batch:
    """A Batch of shapes, placed as a BatchSharder places it."""
    place = jax.NamedSharding(jax.sharding.get_mesh(), rules("batch", "length"))
    shape = config.batch_size, config.length
    integers = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    return Batch(integers, integers, weights, integers, integers)


def measure(
    experiment: Experiment,
    compiled: aot.Compiled,
    chip: Chip | None,
    devices: int,
    order: np.ndarray,
) -> Report:
    """The report of what the compiler answered; costs are None where it refused."""
    limit = chip.hbm_bytes if chip else None
    report = Report(
        topology=experiment.aot.topology,
        devices=devices,
        fits=not compiled.refused and (limit is None or compiled.hbm_bytes <= limit),
        hbm_bytes_per_device=compiled.hbm_bytes,
        hbm_limit_bytes=limit and int(limit),
        argument_bytes=compiled.argument_bytes,
        temp_bytes=compiled.hbm_bytes - compiled.argument_bytes,
        compile_seconds=round(compiled.seconds, 2),
    )
    if compiled.refused:
        return report
    program = hlo.count(compiled.text, ATTENTION)
    return dataclasses.replace(report, **costs(experiment, program, chip, devices, order))


def costs(
    experiment: Experiment,
    program: hlo.Program,
    chip: Chip | None,
    devices: int,
    order: np.ndarray,
) -> dict[str, Any]:
    """FLOPs, bytes, time and collectives of one step, on the device that has most to do.

    Attention is counted by formula: how many tiles are visited depends on the documents. Its bytes
    are those of one trip of its loops, or of all tiles of its kernels, in proportion to the FLOPs.
    """
    mesh = sharding.axis_sizes(experiment.mesh, devices)
    attention = busiest_device(experiment.model, experiment.train, mesh, order)
    trips = (attention - program.scope_flops) / max(program.loop_flops, 1.0)
    flops = program.flops + attention
    num_bytes = program.bytes + program.loop_bytes * (trips if program.loop_flops else 1)
    seconds = chip and aot.optimal_seconds(flops, num_bytes, program.collectives, chip)
    return dict(
        flops_per_device=flops,
        bytes_per_device=num_bytes,
        optimal_seconds=seconds,
        estimated_mfu=chip and aot_report.mfu(experiment, seconds, chip, devices, "seen"),
        estimated_mfu_dense=chip and aot_report.mfu(experiment, seconds, chip, devices, "dense"),
        collectives=program.collectives,
    )


if __name__ == "__main__":
    cli.run(
        main,
        __doc__,
        start=lambda _: backend.compile_only(),
        model=ModelConfig,
        mesh=MeshConfig,
        train=TrainConfig,
        aot=AotConfig,
    )
