"""What a row will take, from shapes alone, before anything is compiled or allocated.

    need = memory(case, plan)
    need.total <= capacity()

FLOPs and bytes are those of useful work: each weight and each key that is seen once a step.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from core import hardware
from infer.engine import Plan
from infer.report.cases import Case
from model import cache, flops
from model.attention import decode
from model.attention.seen import keys_seen
from model.config import ModelConfig
from model.transformer import Transformer


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: int
    kv: int  # as allocated, with the positions
    temporaries: int

    @property
    def total(self) -> int:
        return sum(self)


def memory(case: Case, plan: Plan) -> Memory:
    """What an engine of this plan holds."""
    planned = create(case, plan.batch, plan.length)
    return Memory(device_bytes(case.model), device_bytes(planned), working_set(case.model, plan))


def create(case: Case, batch: int, length: int) -> Any:
    """The cache as shapes."""
    model = case.model
    return jax.eval_shape(
        lambda: cache.create(model.config, batch, length, model.rules, **case.how)
    )


def device_bytes(arrays: Any) -> int:
    """Bytes of all leaves on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )


def kv_bytes(arrays: Any) -> int:
    """Bytes of keys and values over all devices, without the positions."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays) if x.ndim == 5)


def working_set(model: Transformer, plan: Plan) -> int:
    """Bytes of what a prefill chunk has alive at once in its widest layer: an estimate.

    Residual stream, norm and output; queries, keys and values; scores of one block of keys and
    their exponentials; the MLP; the chunk's keys and values of all layers, before they are stored.
    Compilers fuse some of it, and keep copies of their own: tests hold the factor.
    """
    config, rules = model.config, model.rules
    rows = plan.batch // rules.size("batch")
    tokens = rows * plan.chunk // rules.size("length")
    heads = rules.size("act_heads")
    N, D, F = config.num_heads / heads, config.embed_dim, config.mlp_dim / heads
    itemsize = config.compute_dtype.itemsize
    shapes = [config.kv_shape(spec) for spec in config.pattern]
    widest = max(H for _, H in shapes)
    kv = max(max(1, K / heads) * H for K, H in shapes)
    block = min(decode.BLOCK, plan.length)
    # Queries of all shards of the length meet the keys of this one.
    scores = 2 * rows * plan.chunk * N * block * 4
    layer = tokens * (4 * D + 2 * N * widest + 2 * kv) * itemsize
    mlp = tokens * (3 if config.mlp == "gated" else 2) * F * itemsize
    new = 2 * tokens * config.num_layers * 2 * kv * itemsize
    logits = 2 * rows * config.vocab_size * 4
    return int(max(scores + layer, mlp + layer) + new + logits)


def prefill_flops(config: ModelConfig, batch: int, context: int) -> float:
    """FLOPs to read `context` tokens a row; no logits are made, causal attention counts once."""
    a_token = flops.forward_flops_per_token(config, context, "seen")
    return (a_token - 2 * config.vocab_size * config.embed_dim) * batch * context


def decode_flops(config: ModelConfig, batch: int, context: int) -> float:
    """FLOPs of the next token of every row."""
    return flops.decode_flops_per_token(config, context + 1, "seen") * batch


def weight_bytes_read(model: Transformer) -> int:
    """Bytes of weights that each step reads on one device: of a table of embeddings, nothing."""
    total = device_bytes(model)
    looked_up = [model.positions_PD] if model.positions_PD is not None else []
    if model.head_VD is not None:
        looked_up.append(model.embedding_VD)
    return total - device_bytes(looked_up)


def kv_bytes_read(case: Case, batch: int, context: int) -> int:
    """Bytes of keys and values that a decode step reads on one device: those that a token sees.

    For windows that is all that is kept. A kind that chooses blocks reads the chosen ones, and
    all that it chooses by.
    """
    config = case.model.config
    planned = create(case, batch, context)
    specs = [spec for slots, _ in config.stages for spec in slots]
    total = 0.0
    for spec, slot in zip(specs, planned.slots, strict=True):
        blocks = 0 if slot.blocks is None else kv_on_device(slot.blocks)
        kept = slot.positions_BS.shape[1]
        seen = int(keys_seen(spec, context)[-1])
        total += (kv_on_device(slot) - blocks) * min(1.0, seen / kept) + blocks
    return int(total)


def kv_on_device(slot: Any) -> int:
    """Bytes of keys and values on one device."""
    return device_bytes([x for x in jax.tree.leaves(slot) if x.ndim == 5])


def capacity(memory_gib: float, held: int) -> int | None:
    """Bytes of one device that the model, its cache and its work may take; None is not known.

    `held` is what the weights have taken already. `memory_gib` stands for what the device has.
    """
    if memory_gib:
        return int(memory_gib * hardware.GIB)
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"] + held
    if device.platform != "cpu":
        chip = hardware.one_device(jax.devices())
        return chip and int(chip.hbm_bytes)
    free = _host_bytes()
    return None if free is None else free // jax.local_device_count() + held


def _host_bytes() -> int | None:
    """Bytes of the host that nobody uses; None where nobody tells."""
    found = []
    if Path("/proc/meminfo").is_file():
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (group / "memory.current").is_file():
        limit = (group / "memory.max").read_text().strip()
        if limit.isdecimal():
            used = int((group / "memory.current").read_text())
            found.append(max(0, int(limit) - used))
    return min(found, default=None)


def live_bytes(kv: cache.KVCache) -> int:
    """Bytes of the keys and values of all tokens that the cache holds, over all devices."""

    def of(slot: cache.Slot) -> float:
        blocks = 0 if slot.blocks is None else kv_bytes(slot.blocks)
        held = int((slot.positions_BS >= 0).sum()) / np.prod(slot.positions_BS.shape)
        own = (kv_bytes(slot) - blocks) * held
        return own + (of(slot.blocks) if slot.blocks is not None else 0)

    return round(sum(map(of, kv.slots)))
