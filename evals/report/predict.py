"""Predicts a row's time and memory from shapes alone, before anything is compiled or allocated.

    need = memory(case, plan)
    need.total <= capacity()

FLOPs and bytes are those of useful work: each weight and each key that is seen once a step.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from core import tree
from core.compile import hardware
from evals.report.cases import Case
from infer.engine import Plan
from model.cache import flash_decode, kv_cache
from model.config import ModelConfig
from model.sizes import flops
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
    """Predicts the bytes that an engine of this plan holds."""
    planned = create(case, plan.batch, plan.length)
    return Memory(device_bytes(case.model), cache_bytes(planned), working_set(case.model, plan))


def create(case: Case, batch: int, length: int) -> kv_cache.KVCache:
    """The cache as shapes."""
    sizes = case.model.config, batch, length, case.model.rules, case.form
    return jax.eval_shape(lambda: kv_cache.create(*sizes))


def cache_bytes(planned: kv_cache.KVCache) -> int:
    """Bytes of a cache on one device: of what the host keeps, two layers at a time."""
    total, fetched = device_bytes(planned), 0
    for slot in planned.slots:
        if slot.host:
            kept = device_bytes((slot.k_LBKSH, slot.v_LBKSH))
            total -= kept
            fetched = max(fetched, 2 * kept // slot.k_LBKSH.shape[0])
    return total + fetched


def device_bytes(arrays: Any) -> int:
    """Bytes of all leaves on one device; an array that is there twice counts once."""
    return sum(map(_local_bytes, {id(x): x for x in jax.tree.leaves(arrays)}.values()))


def _local_bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def kv_arrays(slots: Sequence[kv_cache.LayerStack]) -> list[tuple]:
    """Keys, values and what chooses among them, without the positions."""
    every = [x for slot in slots for x in (slot, slot.blocks) if x is not None]
    return [(x.k_LBKSH, x.v_LBKSH, x.pages) for x in every]


def kv_bytes(slots: Sequence[kv_cache.LayerStack]) -> int:
    """Bytes of `kv_arrays` over all devices."""
    return tree.num_bytes(kv_arrays(slots))


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
    block = min(flash_decode.BLOCK, plan.length)
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
    """Bytes of weights that each step reads on one device: of a table that is looked up in, none,
    unless the head is the same.
    """
    if model.head_VD is None:
        heads = jax.tree.leaves(model.embedding_VD)
    else:
        heads = jax.tree.leaves(model.head_VD)
    tables = jax.tree.leaves((model.embedding_VD, model.positions_PD))
    idle = [x for x in tables if all(x is not head for head in heads)]
    return device_bytes(model) - device_bytes(idle)


def kv_bytes_read(case: Case, batch: int, context: int) -> int:
    """Bytes of keys and values that a decode step reads on one device: those that a token sees.

    For windows that is all that is kept. Who chooses blocks or pages reads the chosen ones, and
    all that it chooses by.
    """
    config, form = case.model.config, case.form
    specs = [spec for slots, _ in config.stages for spec in slots]
    total = 0.0
    for spec, slot in zip(specs, create(case, batch, context).slots, strict=True):
        seen = int(spec.keys_seen(context)[-1])
        if slot.pages is not None:
            seen = min(seen, form.cache_pages * form.cache_page)
        kept = slot.positions_BS.shape[1]
        tokens = device_bytes((slot.k_LBKSH, slot.v_LBKSH))
        chosen_by = device_bytes(kv_arrays([slot])) - tokens
        total += tokens * min(1.0, seen / kept) + chosen_by
    return int(total)


def capacity(memory_gib: float, held: int) -> int | None:
    """Bytes of one device that the model, its cache and its work may take; None is not known.

    `held` is what the weights have taken already. `memory_gib` stands for what the device has.
    """
    if memory_gib:
        return int(memory_gib * hardware.GIB)
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if stats.get("bytes_limit"):
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


def live_bytes(kv: kv_cache.KVCache) -> int:
    """Bytes of the keys and values of all tokens that the cache holds, over all devices."""
    return sum(int((slot.positions_BS >= 0).sum()) * slot.token_bytes for slot in kv.slots)
