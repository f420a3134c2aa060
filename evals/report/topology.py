"""The report for TPUs that are not there: their compiler says what fits and what a step does.

Prefill and decode are compiled for the slice from shapes alone; no array is made. Times are lower
bounds from peak rates: products, memory and overlapped collectives side by side, then the rest.
Attention over the cache is a loop whose trips depend on how full it is, so its work is by formula.
"""

import functools
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core import sharding, tree
from core.compile import aot, hardware, hlo
from core.compile.hardware import Chip
from core.config import Experiment, UserError
from core.sharding import make_mesh
from evals.config import BenchConfig
from evals.report import predict, rows, source, sweep
from evals.report.cases import Case
from evals.report.measuring import measure
from evals.report.progress import Bar, ProgressStep
from evals.report.rows import ReportRow
from evals.report.show import tables
from infer import steps
from infer.engine import Plan
from infer.sampling.params import Sampling, pack
from model import transformer
from model.cache import kv_cache
from model.sizes import flops
from model.transformer import Transformer

ATTENTION = "/attention/shard_map/"  # in the op_name of all that attention does


class SlicePrograms(NamedTuple):
    """The compiler's answers. `step` is one token without the loop around it, for counting work."""

    extend: aot.Compiled
    advance: aot.Compiled
    step: aot.Compiled | None  # None where one of the others was refused


def report(experiment: Experiment) -> dict[str, Any]:
    """The report for `bench.topology`, with the rows that the sweep here would have."""
    config: BenchConfig = experiment.bench
    devices = aot.slice_devices(config.topology, "bench.topology")
    chip = hardware.one_device(devices)
    if chip is None:
        raise UserError(
            f"bench.topology={config.topology}: nothing is known of the rates of "
            f"{devices[0].device_kind}; the kinds known are in core/compile/hardware.py"
        )
    with jax.set_mesh(make_mesh(experiment.mesh, devices)):
        of = source.find(experiment)
        limit = config.memory_gib * hardware.GIB or chip.hbm_bytes
        planned = sweep.plan(source.cases_of(of.model, config), config, int(limit))
        device = f"{config.topology}, {len(devices)} x {devices[0].device_kind}, not run"
        found = {**source.head(experiment, of, device), "peaks": None, "effective_length": {}}
        print(tables.title(found), file=sys.stderr, flush=True)
        named = [
            (one, ProgressStep(one.name, "compile", 1.0 + one.context / 2**17)) for one in planned
        ]
        found["rows"] = []
        with Bar([step for _, step in named]) as bar:
            for one, step in named:
                with bar.step(step):
                    found["rows"].append(row(one, config, chip, len(devices)))
    return found


def row(one: ReportRow, config: BenchConfig, chip: Chip, devices: int) -> dict[str, Any]:
    """The row of the report, in which nothing is measured."""
    known = {**rows.planned(one, config), "compile_seconds": None}
    least = one.need.weights + one.need.kv
    if one.reason is None and least > chip.hbm_bytes:
        reason = _too_much(least, chip, "weights and KV cache alone")
        return {**known, "fits": False, "reason": reason}
    if one.reason is not None:
        return known
    programs = compiled(one.case, measure.plan(config, one.context))
    peak = max(programs.extend.hbm_bytes, programs.advance.hbm_bytes)
    known |= {
        "peak_bytes": peak,
        "temporary_bytes": max(p.hbm_bytes - p.argument_bytes for p in programs[:2]),
        "compile_seconds": sum(p.seconds for p in programs if p is not None),
    }
    if programs.step is None or peak > chip.hbm_bytes:
        return {**known, "fits": False, "reason": _too_much(peak, chip, "as compiled")}
    return {**known, **at_best(one, config, programs, chip, devices)}


def _too_much(needed: float, chip: Chip, what: str) -> str:
    needed, limit = rows.shown(needed), rows.shown(chip.hbm_bytes)
    return f"needs {needed} a device {what}, and {limit} are available"


def at_best(
    one: ReportRow, config: BenchConfig, programs: SlicePrograms, chip: Chip, devices: int
) -> dict[str, Any]:
    """Times, MFU and MBU if the chip does all that is compiled at its peak rates."""
    shapes, case, context = measure.plan(config, one.context), one.case, one.context
    model, batch = case.model.config, shapes.batch
    matrices = 2 * flops.matrix_parameters(model)
    head = 2 * model.vocab_size * model.embed_dim
    reading = predict.prefill_flops(model, batch, context)
    writing = predict.decode_flops(model, batch, context)
    chunks = math.ceil(context / shapes.chunk)
    seen = (reading - (matrices - head) * batch * context) / (devices * chunks)
    prefill = chunks * seconds(programs.extend, 0.0, seen, None, chip)
    kv_read = predict.kv_bytes_read(case, batch, context)
    # Of a single token the compiler makes sums of products, which are no products to count.
    matrix = matrices * batch / devices
    step = seconds(programs.step, matrix, writing / devices - matrix, kv_read, chip)
    weights = predict.weight_bytes_read(case.model)
    tokens = batch * context
    return {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": tokens / prefill,
        "ttft_seconds": prefill + step,
        "decode_ms_per_token": 1e3 * step,
        "mfu": reading / (prefill * devices * chip.flops),
        "mbu_weights": weights / (step * chip.hbm_bandwidth),
        "mbu_total": (weights + kv_read) / (step * chip.hbm_bandwidth),
        **rows.costs(config.price_per_hour, batch, step, tokens, prefill),
    }


def seconds(
    compiled: aot.Compiled, least: float, attention: float, kv_read: float | None, chip: Chip
) -> float:
    """The least time of a program whose attention has so many FLOPs on this device.

    What is no attention has `least` FLOPs, or those that the compiler tells if they are more.
    `kv_read` bytes come from the cache; without it, those of as many trips of the loops over it as
    the FLOPs of attention make.
    """
    program = hlo.count(compiled.text, ATTENTION)
    if kv_read is None:
        trips = max(0.0, attention - program.scope_flops) / max(program.loop_flops, 1.0)
        kv_read = program.loop_bytes * trips
    work = max(least, program.flops) + attention
    num_bytes = program.bytes + kv_read
    return aot.optimal_seconds(work, num_bytes, program.collectives, chip)


def compiled(case: Case, shapes: Plan) -> SlicePrograms:
    """The programs of an engine of these shapes, for the mesh in use."""
    extend = aot.compile_for(lower(case, shapes, "extend"))
    advance = aot.compile_for(lower(case, shapes, "advance"))
    refused = extend.refused or advance.refused
    step = None if refused else aot.compile_for(lower(case, shapes, "step"))
    return SlicePrograms(extend, advance, step)


def lower(case: Case, shapes: Plan, name: str) -> jax.stages.Lowered:
    """One program, its cache donated."""
    decoder = case.model
    if name != "extend":
        abstract = transformer.abstract(case.model.config, sharding.decoding())
        decoder = tree.with_leaves(abstract, tree.named_leaves(case.model))
    function, args = _program(case, decoder, shapes, name)
    traced = jax.jit(function, donate_argnums=1).trace(decoder, *args)
    return traced.lower(lowering_platforms=("tpu",))


def _program(case: Case, model: Transformer, shapes: Plan, name: str) -> tuple[Any, tuple]:
    """(function, its arguments after the model, as shapes)."""
    config, rules, B = model.config, model.rules, shapes.batch

    def state() -> tuple:
        kv = kv_cache.create(config, B, shapes.length, case.model.rules, case.form)
        place = rules("batch", None)
        last_BD = jnp.zeros((B, config.embed_dim), config.compute_dtype, out_sharding=place)
        row_B = jnp.zeros(B, jnp.int32, out_sharding=rules("batch"))
        now = steps.Prefilled(kv, last_BD)
        keys_B = jax.vmap(jax.random.key)(row_B)
        how = pack([Sampling(temperature=0)] * B)
        packed = jax.tree.map(lambda x: row_B.astype(x.dtype), how)
        return now, row_B, steps.State(now, row_B, row_B, row_B > 0, keys_B, packed, None)

    now, row_B, decoding = jax.eval_shape(state)
    if name == "extend":
        place = jax.NamedSharding(jax.sharding.get_mesh(), rules("batch", None))
        tokens_BT = jax.ShapeDtypeStruct((B, shapes.chunk), jnp.int32, sharding=place)
        chunk = steps.PromptChunk(tokens_BT, jax.ShapeDtypeStruct((), jnp.int32), row_B)
        return steps.extend, (now, chunk, row_B)
    if name == "advance":
        advance = functools.partial(steps.advance, eos=(), vocab_size=config.vocab_size)
        return advance, (decoding, decoding.done_B)
    return _one_token, (now, row_B, row_B)


def _one_token(model: Transformer, now: steps.Prefilled, at_B: jax.Array, length_B: jax.Array):
    """A greedy step as `advance` does it."""
    logits_BV = model.logits(now.last_BD)
    logits_BV = jax.sharding.reshard(logits_BV, model.rules("batch", None))
    token_B = logits_BV.argmax(axis=-1).astype(jnp.int32)
    return steps.feed(model, now, token_B, at_B, token_B >= 0, length_B), token_B
