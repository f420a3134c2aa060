"""Weights of few bits: int8 or int4, and a bfloat16 scale for each group of inputs.

    w = quantise(w_DNH, 1, QuantConfig(bits=4, group=128))
    y_BTNH = product(x_BTD, w, 1)

Weights alone: activations stay as they are. A weight is Z groups of C inputs by O outputs, rounded
to the nearest multiple of its group's scale, so that |w - q * scale| <= scale / 2, and the scale is
at most (1 + 2^-7) * max|w| / (2^(bits - 1) - 1/2) in the group.

The product takes integers as they lie in memory, and no float weight is ever whole: XLA reads them
into the product, TPUs by `_at_once`, CPUs by `_on_cpu`. The dims Z and C are apart for that:
where they are one, a TPU first copies all layers into another layout. `qwix` 0.1.8 has the same
arrays, but not this: beside float activations its `dot_general` makes the float weight first,
which a CPU does in full, its groups are within the last dim of the inputs, and its scales are
rounded after the integers are, which adds up to a quarter of a step of int8.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from core.sharding import device_kind
from model.attention import blocks
from model.ops import one_row

SCALE = jnp.bfloat16
BLOCK = 256  # inputs at a time on a CPU: their floats stay in its cache
ROWS = 1024  # rows of a table at a time, for the same reason


class QuantConfig(NamedTuple):
    """Settings of rounded weights."""

    bits: int  # 8 or 4
    group: int = 0  # inputs that share a scale; 0 is all of them

    @property
    def largest(self) -> int:
        return 2 ** (self.bits - 1) - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """A matrix, or as many as there are layers on a first dim L."""

    values_ZCO: jax.Array  # int8; 4 bits: inputs c and C/2 + c of a group in byte c, low and high
    scales_ZO: jax.Array  # bfloat16
    outputs: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))  # dims that O is of
    bits: int = dataclasses.field(metadata=dict(static=True))

    def __getitem__(self, index) -> "Quantised":
        assert index is Ellipsis  # of an nnx.Param
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """Rows [V, D] of an embedding or a head in int8, each with its scale."""

    values_VD: jax.Array
    scales_V: jax.Array

    def __getitem__(self, index) -> "Table":
        assert index is Ellipsis
        return self


def quantise(w: jax.Array, inputs: int, form: QuantConfig, layers: bool = False) -> Quantised:
    """Quantises w [*inputs, *outputs], with so many dims of inputs, or [L, *inputs, *outputs]."""
    stack, shape = w.shape[:layers], w.shape[layers:]
    spec = jax.typeof(w).sharding.spec
    ins, outs = spec[layers : layers + inputs], spec[layers + inputs :]
    size, outputs = math.prod(shape[:inputs]), shape[inputs:]
    group = form.group or size
    to = PartitionSpec(*spec[:layers], ins[0] if group < size else None, None, outs[0])
    sizes = *stack, size // group, group, math.prod(outputs)
    if group == size:  # each output has one scale, of inputs on any device
        w = jax.sharding.reshard(w, PartitionSpec(*spec[:layers], *[None] * inputs, *outs))
    w_ZCO = jnp.reshape(w, sizes, out_sharding=to)
    q_ZCO, scales_ZO = _rounded(w_ZCO.astype(jnp.float32), -2, form)
    if form.bits == 4:
        low, high = jnp.split(q_ZCO, 2, axis=-2)
        q_ZCO = (low & 15) | (high << 4)
    if group == size:
        q_ZCO = jax.sharding.reshard(q_ZCO, PartitionSpec(*spec[:layers], None, *ins[:1], outs[0]))
    return Quantised(q_ZCO, scales_ZO, outputs, form.bits)


def quantise_table(w_VD: jax.Array) -> Table:
    """Quantises the rows of a table to int8."""
    return Table(*_rounded(w_VD.astype(jnp.float32), -1, QuantConfig(8)))


def _rounded(w: jax.Array, axis: int, form: QuantConfig) -> tuple[jax.Array, jax.Array]:
    """(int8, scales) where all along `axis` share one.

    What is largest in its group is half a step beyond the largest integer, so that no error is
    larger than half a step and all steps are as small as can be.
    """
    step = jnp.abs(w).max(axis=axis) / (form.largest + 0.5)
    bits = jax.lax.bitcast_convert_type(step, jnp.uint32)  # up to the next bfloat16: no overflow
    bits = ((bits + 0xFFFF) >> 16).astype(jnp.uint16)
    scales = jax.lax.bitcast_convert_type(bits, SCALE)
    divisor = jnp.expand_dims(jnp.where(scales > 0, scales, 1).astype(jnp.float32), axis)
    q = jnp.clip(jnp.round(w / divisor), -form.largest, form.largest)
    return q.astype(jnp.int8), scales


def product(
    x: jax.Array, w: Quantised, inputs: int, out_sharding: PartitionSpec | None = None
) -> jax.Array:
    """x [*rows, *inputs] times w: [*rows, *outputs] in x's dtype; it has `inputs` dims of these."""
    rows = x.shape[:-inputs]
    lead = jax.typeof(x).sharding.spec
    lead, split = lead[: len(rows)], lead[len(rows)]
    groups, within, outs = jax.typeof(w.values_ZCO).sharding.spec
    axes = groups or within
    assert axes == split, f"{axes} of the weight, {split} of what it multiplies"

    def local(x, values_ZCO, scales_ZO):
        Z, _, O = values_ZCO.shape
        x_RZC = x.reshape(math.prod(x.shape[: len(rows)]), Z, -1)
        multiply = _on_cpu if device_kind() == "cpu" else _at_once
        y_RO = multiply(x_RZC, values_ZCO, scales_ZO, w.bits).astype(x.dtype)
        y_RO = jax.lax.psum(y_RO, axes) if axes else y_RO
        return y_RO.reshape(*x.shape[: len(rows)], O)

    y = jax.shard_map(
        local,
        in_specs=(
            PartitionSpec(*lead, split, *[None] * (inputs - 1)),
            PartitionSpec(groups, within, outs),
            PartitionSpec(groups, outs),
        ),
        out_specs=PartitionSpec(*lead, outs),
    )(x, w.values_ZCO, w.scales_ZO)
    whole = [None] * (len(w.outputs) - 1)
    y = jnp.reshape(y, (*rows, *w.outputs), out_sharding=PartitionSpec(*lead, outs, *whole))
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def look_up(table: Table, index_BT: jax.Array, place: PartitionSpec) -> jax.Array:
    """Float32 rows [B, T, D], placed so."""
    rows_BTD = table.values_VD.at[index_BT].get(out_sharding=place)
    scales_BT = table.scales_V.at[index_BT].get(out_sharding=PartitionSpec(*place[:2]))
    return rows_BTD.astype(jnp.float32) * scales_BT[..., None].astype(jnp.float32)


def logits(hidden_D: jax.Array, table: Table) -> jax.Array:
    """Float32 [..., V], the products of [..., D] with all rows of the table."""
    *lead, split = jax.typeof(hidden_D).sharding.spec
    vocab, whole = jax.typeof(table.values_VD).sharding.spec
    assert split is None and whole is None

    def local(x_D, values_VD, scales_V):
        x_RD = x_D.reshape(-1, x_D.shape[-1])
        multiply = _rows_on_cpu if device_kind() == "cpu" else _rows_at_once
        y_RV = multiply(x_RD, values_VD) * scales_V.astype(jnp.float32)[None, :]
        return y_RV.reshape(*x_D.shape[:-1], -1)

    return jax.shard_map(
        local,
        in_specs=(PartitionSpec(*lead), PartitionSpec(vocab), PartitionSpec(vocab)),
        out_specs=PartitionSpec(*lead, vocab),
    )(hidden_D, table.values_VD, table.scales_V)


def _rows_at_once(x_RD: jax.Array, values_VD: jax.Array) -> jax.Array:
    """Float32 [R, V], before the scales."""
    w_VD = values_VD.astype(x_RD.dtype)
    return jnp.einsum("RD,VD->RV", x_RD, w_VD, preferred_element_type=jnp.float32)


def _rows_on_cpu(x_RD: jax.Array, values_VD: jax.Array) -> jax.Array:
    """The same, a block of the vocabulary after the other, of which the last may repeat some rows;
    for one row of x all at once.
    """
    if len(x_RD) == 1 and x_RD.size % one_row.LANES == 0:
        return one_row.by_rows(x_RD[0], values_VD)[None]
    x_RD, V = x_RD.astype(jnp.float32), len(values_VD)
    block = min(ROWS, V)

    def put(i, y_RV):
        first = jnp.minimum(i * block, V - block)
        w_VD = jax.lax.dynamic_slice_in_dim(values_VD, first, block)
        some_RV = jnp.einsum("RD,VD->RV", x_RD, w_VD.astype(jnp.float32))
        return jax.lax.dynamic_update_slice_in_dim(y_RV, some_RV, first, axis=1)

    start_RV = blocks.fresh((x_RD, values_VD), (len(x_RD), V), 0.0)
    return jax.lax.fori_loop(0, -(-V // block), put, start_RV)


def _at_once(x_RZC: jax.Array, values_ZCO: jax.Array, scales_ZO: jax.Array, bits: int):
    """Float32 [R, O]. A single scale multiplies sums; several multiply weights, as they come."""
    parts = one_row.halves(values_ZCO, 8 // bits)
    single, y_RO = scales_ZO.shape[0] == 1, 0.0
    for x_RZc, q_ZcO in zip(jnp.split(x_RZC, len(parts), axis=2), parts, strict=True):
        w_ZcO = q_ZcO.astype(jnp.float32)
        if not single:
            w_ZcO = w_ZcO * scales_ZO[:, None, :].astype(jnp.float32)
        y_RO += jnp.einsum(
            "RZC,ZCO->RO", x_RZc, w_ZcO.astype(x_RZC.dtype), preferred_element_type=jnp.float32
        )
    return y_RO * scales_ZO.astype(jnp.float32) if single else y_RO


def _on_cpu(x_RZC: jax.Array, values_ZCO: jax.Array, scales_ZO: jax.Array, bits: int):
    """The same in float32, a block of inputs after the other; one row eight inputs at a time."""
    parts, x_RZC = 8 // bits, x_RZC.astype(jnp.float32)
    R, (Z, C, O) = len(x_RZC), values_ZCO.shape
    if R == 1 and one_row.fits(parts * C):
        x_ZPC = x_RZC.reshape(Z, parts, C)
        return one_row.by_columns(x_ZPC, values_ZCO, scales_ZO)[None]
    block = math.gcd(C, BLOCK)
    values_ZCO = values_ZCO.reshape(-1, block, O)
    scales_ZO = jnp.repeat(scales_ZO, C // block, axis=0)
    x_ZPRC = jnp.moveaxis(x_RZC.reshape(R, Z, parts, C // block, block), (1, 3, 2), (0, 1, 2))
    x_ZPRC = x_ZPRC.reshape(-1, parts, R, block)

    def add(y_RO, each):
        x_PRC, values_CO, scales_O = each
        some_RO = sum(
            jnp.einsum("RC,CO->RO", x_RC, q_CO.astype(jnp.float32))
            for x_RC, q_CO in zip(x_PRC, one_row.halves(values_CO, parts), strict=True)
        )
        return y_RO + some_RO * scales_O.astype(jnp.float32)[None, :], None

    operands = x_ZPRC, values_ZCO, scales_ZO
    return jax.lax.scan(add, blocks.fresh(operands, (R, O), 0.0), operands)[0]
