"""Bytes of a model at work, from shapes alone: weights, cache, training state, activations.

Weights in `int8` and `int4` are those of quantised.py: the matrices of the layers, with a bfloat16
scale for each group of inputs, and embedding and head in int8, a scale a row; norms and biases are
as ever.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp

from core import sharding, tree
from model import transformer
from model.cache import kv_cache
from model.cache.form import CacheConfig
from model.config import ModelConfig
from model.ops.quantised import QuantConfig
from model.sizes import parts, weights
from model.transformer import Remat

Format = Literal["float32", "bfloat16", "int8", "int4"]
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
SCALE_BITS = 16
MOMENTS = 2  # of Adam: the mean gradient, the mean square
TRACED = 256  # tokens a row when activations are counted: all of them grow with the row


class TrainBytes(NamedTuple):
    """Bytes that training holds whatever the batch; all parameters learn."""

    parameters: int
    gradients: int
    moments: int


class Kept(NamedTuple):
    """Bytes of activations a token, that the forward pass keeps for the backward."""

    device: float
    host: float


def weight_bytes(config: ModelConfig, form: Format, group: int | None) -> int:
    """Bytes of the weights as decoding holds them, on one device: norms stay in `param_dtype`.

    In int8 and int4, what is not rounded is in config.dtype; `group` is as in weights.rounding.
    """
    if form in ("int8", "int4"):
        return _rounded_bytes(config, weights.rounding(config, sharding.whole(), form, group))
    itemsize = jnp.dtype(form).itemsize
    return sum(
        x.size * (x.dtype.itemsize if parts.part(name) == "norms" else itemsize)
        for name, x in parts.shapes(config).items()
    )


def _rounded_bytes(config: ModelConfig, form: QuantConfig) -> int:
    matrices, total = parts.matrices(config), 0
    for name, x in parts.shapes(config).items():
        if name in matrices:
            layers, inputs, outputs, _ = matrices[name]
            groups = inputs // form.group if form.group else 1
            total += x.size * form.bits // 8 + layers * groups * outputs * SCALE_BITS // 8
        elif weights.is_table(name):
            total += x.size + x.shape[0] * SCALE_BITS // 8
        else:
            norm = parts.part(name) == "norms"
            total += x.size * (x.dtype if norm else config.compute_dtype).itemsize
    return total


def cache_bytes(config: ModelConfig, batch: int, length: int, form: Format) -> tuple[int, int]:
    """(keys and values, all) of the cache for `batch` rows of `length` tokens.

    Slots are those of cache.create: windows are rings, blocks that a kind chooses from come too.
    """
    dtype = form if form == "float32" else "bfloat16"
    config = dataclasses.replace(config, dtype=dtype)
    numbers = form if form in ("int8", "int4") else "compute"
    how = config, batch, length, sharding.whole(), CacheConfig(k_cache=numbers, v_cache=numbers)
    with parts.somewhere():
        planned = jax.eval_shape(lambda: kv_cache.create(*how))
        return kv_cache.kv_bytes(*how), tree.num_bytes(planned)


def token_bytes(config: ModelConfig, form: Format) -> int:
    """Bytes of the keys and the values of one token, over the layers; none is out of reach."""
    scale = SCALE_BITS if form in ("int8", "int4") else 0
    slots = [(*config.kv_shape(spec), n) for slots, n in config.stages for spec in slots]
    return sum(n * math.ceil(2 * K * (H * BITS[form] + scale) / 8) for K, H, n in slots)


def state_bytes(config: ModelConfig) -> TrainBytes:
    """Bytes of AdamW's state: gradient and moments have the dtype of the parameter."""
    stored = tree.num_bytes(parts.shapes(config))
    return TrainBytes(stored, stored, MOMENTS * stored)


def kept_bytes(config: ModelConfig, remat: Remat) -> Kept:
    """Bytes that differentiation asks to keep, read from the program itself; XLA may keep less.

    Of the layers and the final norm: the loss, and what a layer's backward works on, come on top.
    """
    config = dataclasses.replace(config, attention_kernel="chunked")  # reference keeps T x T
    integers = jax.ShapeDtypeStruct((1, TRACED), jnp.int32)

    def pullback(model, *at):
        return jax.vjp(lambda model: model(*at, remat=remat)[0], model)[1]

    with parts.somewhere():
        model = transformer.abstract(config, sharding.whole())
        program = jax.make_jaxpr(pullback)(model, *[integers] * 3).jaxpr
    arguments, total = set(program.invars), {False: 0, True: 0}
    for x in set(filter(_is_variable, program.outvars)) - arguments:
        total[x.aval.memory_space == jax.memory.Space.Host] += x.aval.size * x.aval.dtype.itemsize
    return Kept(total[False] / TRACED, total[True] / TRACED)


def _is_variable(x: Any) -> bool:
    return not isinstance(x, jax.extend.core.Literal)
