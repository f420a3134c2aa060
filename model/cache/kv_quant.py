"""Keys or values in 8 or 4 bits: each vector of a head is integers times a scale of its own.

    held = quantise(x_BTKH, bits=8)      held.x integers, held.scale bfloat16
    x_BTKH = dequantise(held, dtype)     off by at most ERROR[bits] of the largest |x| of a vector

Attention never makes that copy of a cache: a key's scale multiplies its scores, a value's scale
its weight.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from core.sharding import device_kind

LEVELS = {8: 127, 4: 7}  # integers -levels .. levels
# Half a step of the integers, when bfloat16 has rounded their scale up.
ERROR = {bits: (1 + 2**-8) / (2 * levels) for bits, levels in LEVELS.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedKV:
    """Vectors [..., H] in `bits`; for 4, byte i of H / 2 has number i in its low half and number
    i + H / 2 in its high one.
    """

    x: jax.Array  # int8 [..., H or H / 2]
    scale: jax.Array  # bfloat16 [...]
    bits: int = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the vectors."""
        return *self.x.shape[:-1], self.x.shape[-1] * 8 // self.bits


KVArray = jax.Array | QuantisedKV


def quantise(x: jax.Array, bits: int) -> QuantisedKV:
    """Symmetric: the largest |number| of a vector is the last of the levels."""
    x32 = x.astype(jnp.float32)
    scale = (jnp.abs(x32).max(axis=-1) / LEVELS[bits]).astype(jnp.bfloat16)
    step = jnp.where(scale == 0, 1, scale).astype(jnp.float32)[..., None]
    levels = jnp.clip(jnp.round(x32 / step), -LEVELS[bits], LEVELS[bits]).astype(jnp.int8)
    if bits == 4:
        low, high = jnp.split(levels, 2, axis=-1)
        levels = (low & 15) | (high << 4)
    return QuantisedKV(levels, scale, bits)


def levels(held: KVArray, dtype: jnp.dtype) -> jax.Array:
    """The integers as `dtype`, which has them all; arrays that are not quantised stay."""
    if not isinstance(held, QuantisedKV):
        return held
    x = held.x
    if held.bits == 4:
        x = jnp.concatenate([(x << 4) >> 4, x >> 4], axis=-1)  # shifts of int8 keep the sign
    return x.astype(dtype)


def product_dtype(held: KVArray, dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which `held` is multiplied with an array of `dtype`.

    Plain arrays keep their own. Quantised ones take `dtype`, or float32 on CPUs, which have no
    other fast kernel.
    """
    if isinstance(held, QuantisedKV):
        return jnp.dtype(jnp.float32) if device_kind() == "cpu" else dtype
    return held.dtype


def dequantise(held: KVArray, dtype: jnp.dtype) -> jax.Array:
    """The vectors; for few of them."""
    if not isinstance(held, QuantisedKV):
        return held
    x = levels(held, jnp.float32) * held.scale.astype(jnp.float32)[..., None]
    return x.astype(dtype)


def as_read(new: jax.Array, held: KVArray) -> jax.Array:
    """`new` as it will be read once it is stored in `held`."""
    return dequantise(like(new, held), new.dtype)


def scaled(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Scores or weights times the scales of their keys or values, if these have any."""
    return x if scale is None else x * scale.astype(x.dtype)


def like(new: jax.Array, held: KVArray) -> KVArray:
    """`new` as it is to be stored in `held`."""
    return quantise(new, held.bits) if isinstance(held, QuantisedKV) else new


def sharding(held: KVArray, spec: PartitionSpec) -> PartitionSpec | QuantisedKV:
    """The PartitionSpec of each array, where `spec` is that of the vectors."""
    if not isinstance(held, QuantisedKV):
        return spec
    return QuantisedKV(spec, PartitionSpec(*spec[:-1]), held.bits)


def zeros(shape: tuple[int, ...], bits: int, spec: PartitionSpec) -> QuantisedKV:
    """Vectors of `shape` that are all zero, where `spec` is their PartitionSpec."""
    *vectors, H = shape
    x = jnp.zeros((*vectors, H * bits // 8), jnp.int8, out_sharding=spec)
    scale = jnp.zeros(vectors, jnp.bfloat16, out_sharding=PartitionSpec(*spec[:-1]))
    return QuantisedKV(x, scale, bits)
