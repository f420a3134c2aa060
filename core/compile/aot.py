"""Compiling for TPUs that are not there: libtpu brings the compiler, and needs no chip.

    devices = slice_devices("v5p:4x4x8")
    with jax.set_mesh(make_mesh(config, devices)):
        compiled = compile_for(step.trace(*abstract).lower(lowering_platforms=("tpu",)))

Arguments are shapes with shardings: no array is ever made. Call `backend.compile_only()` first.
"""

import dataclasses
import importlib.util
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from core.compile.hardware import Chip
from core.compile.hlo import Collective
from core.config import UserError

EXAMPLES = "v4:2x2x4, v5e:4x4, v5p:4x4x8, v6e:16x16, tpu7x:4x4x4"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "... total memory required for HLO temporaries (18.00G) exceeds available HBM (15.75G)": it says
# temporaries, and means arguments and results too. Older: "Used 18.20G of 15.75G hbm"; of "vmem",
# the memory of a kernel, it says the same, and that is a mistake of ours.
NEEDED = re.compile(
    r"(?:temporaries \(|Used )([\d.]+)([KMGT]?)(?:\) exceeds available HBM| of \S+ hbm)"
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's answer. Bytes are those of one device; `text` is empty if it refused."""

    argument_bytes: int
    hbm_bytes: int  # at its highest: arguments, results and temporaries that live together
    seconds: float
    text: str  # optimised HLO
    refused: bool


def slice_devices(topology: str, field: str = "aot.topology") -> Sequence[jax.Device]:
    """The devices of a slice such as `v5e:2x2`; UserError, about `field`, if there is none."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{field} needs the TPU compiler, which is not installed: pip install -e .[aot]"
        )
    mistake = UserError(f"{field}={topology!r} is no slice that libtpu knows; some are {EXAMPLES}")
    shape = re.fullmatch(r"\w+:(\d+(?:x\d+)*)", topology)
    sizes = [int(size) for size in shape[1].split("x")] if shape else [0]
    if 0 in sizes:  # libtpu divides by it
        raise mistake
    options = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(sizes) == 1 else {}
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(f"{mistake}\nlibtpu: {error}") from None


def compile_for(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles; a program that the compiler refuses for its memory is an answer too."""
    arguments = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(lowered.in_avals))
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = NEEDED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        peak = round(float(needed[1]) * UNITS[needed[2]])
        return Compiled(arguments, peak, time.perf_counter() - began, "", refused=True)
    seconds = time.perf_counter() - began
    # The peak is what libtpu refuses by: one program needed 28.81G of a v5e's 15.75G and had this
    # peak on a v6e. The sum of all temporaries is larger, they do not live at once.
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return Compiled(arguments, peak, seconds, compiled.as_text(), refused=False)


def _local_bytes(leaf: Any) -> int:
    """Bytes of one device's part of an abstract argument."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def optimal_seconds(
    flops: float, num_bytes: float, collectives: tuple[Collective, ...], chip: Chip
) -> float:
    """A lower bound: products, memory and asynchronous collectives side by side, then the rest.

    A device receives at half of `chip.links` at most. An all-reduce moves its bytes twice, as a
    reduce-scatter and an all-gather would.
    """
    waits = {True: 0.0, False: 0.0}
    for one in collectives:
        moved = one.bytes * (2 if one.kind == "all-reduce" else 1)
        waits[one.asynchronous] += moved / (chip.links / 2)
    overlapped = max(flops / chip.flops, num_bytes / chip.hbm_bandwidth, waits[True])
    return overlapped + waits[False]
