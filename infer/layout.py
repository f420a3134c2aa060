"""The weights as a CPU decodes from them.

XLA's CPU backend multiplies an array where it lies, but copies what is cut from one: the layers
of a stack, and all of a bfloat16 table, widened, for the rows that are looked up.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from core import tree
from core.sharding import Rules, device_kind
from model import transformer
from model.config import ModelConfig
from model.sizes.parts import PLACE
from model.transformer import Transformer

TABLES = "embedding_VD", "positions_PD"  # that tokens are looked up in


def place(config: ModelConfig, rules: Rules, weights: dict[str, Any]) -> Transformer:
    """The model of these weights by name; on CPUs with an array for each layer.

    `weights` are used up one by one, so that there is never a second copy of all.
    """
    if device_kind() != "cpu":
        return tree.with_leaves(transformer.abstract(config, rules), weights)
    slots = len(config.pattern)
    if config.tied_head:
        weights["head_VD"] = weights["embedding_VD"]
    new = {}
    while weights:
        name, x = weights.popitem()
        if in_stage := PLACE.match(name):
            stage, slot = map(int, in_stage.groups())
            rest = config.num_layers // slots * slots if stage else 0
            for i, layer in enumerate(_apart(x)):
                at = rest + i * slots + slot
                new[f"stages.0.{at}.{name[in_stage.end() :]}"] = layer
        elif name in TABLES and isinstance(x, jax.Array) and x.dtype == jnp.bfloat16:
            new[name] = _raw(x)
        else:
            new[name] = x
    pattern = (config.pattern * config.num_layers)[: config.num_layers]
    config = dataclasses.replace(config, pattern=pattern, tied_head=False)
    return tree.with_leaves(transformer.abstract(config, rules), new)


@jax.jit
def _raw(x: jax.Array) -> jax.Array:
    """The bits of bfloat16 as integers, of which XLA makes no wider copy."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _apart(x: Any) -> list[Any]:
    """Each layer of a stack, [1, ...]; of a rounded one, each of its arrays so."""
    arrays, form = jax.tree.flatten(x)
    return [form.unflatten(layer) for layer in zip(*map(_cut, arrays), strict=True)]


@jax.jit
def _cut(x_L: jax.Array) -> list[jax.Array]:
    narrow = x_L.dtype == jnp.bfloat16
    bits_L = _raw(x_L) if narrow else x_L
    layers = [bits_L[i : i + 1] for i in range(len(x_L))]
    return [jax.lax.bitcast_convert_type(x, x_L.dtype) for x in layers] if narrow else layers
