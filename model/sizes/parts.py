"""The parameters of a model by part, counted from its own shapes: no array, and no device.

    total(config), count(config)["mlp"].total, matrices(config)

What a leaf is, its name says: `stages.0.1.attention.q_DNH` is of slot 1 of the pattern, stacked
over its layers, and the letters after the last underscore are its dims.
"""

import contextlib
import functools
import math
import re
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from core import sharding, tree
from model import transformer
from model.config import ModelConfig

MESH = AbstractMesh((1, 1, 1), sharding.AXES, axis_types=(AxisType.Explicit,) * 3)

# A part and its names, less the place in the stages; the first that is found counts.
PARTS = {
    "embedding": r"^embedding_",
    "positions": r"^position",
    "head": r"^head_",
    "norms": r"norm\.",
    "biases": r"bias",
    "attention q": r"^attention\.q_",
    "attention k": r"^attention\.k_",
    "attention v": r"^attention\.v_",
    "attention o": r"^attention\.o_",
    "mlp": r"^mlp\.",
    "other": r"",
}
PLACE = re.compile(r"^stages\.(\d+)\.(\d+)\.")


class Part(NamedTuple):
    """Parameters of one part: of the whole model, and of a layer of each slot of the pattern."""

    total: int
    per_layer: tuple[int, ...]


class Matrix(NamedTuple):
    """A weight that tokens are multiplied by, in each of `layers` layers."""

    layers: int
    inputs: int
    outputs: int
    input_dims: int  # the first so many, after that of the layers, are of the inputs


def somewhere() -> contextlib.AbstractContextManager:
    """A mesh for tracing what is whole everywhere: the one in use, or one of no devices."""
    if jax.sharding.get_abstract_mesh().empty:
        return jax.sharding.use_abstract_mesh(MESH)
    return contextlib.nullcontext()


@functools.cache
def shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter by name; a layer of a stage is one of the rows of its first dim."""
    with somewhere():
        leaves = tree.named_leaves(transformer.abstract(config, sharding.whole()))
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in leaves.items()}


def total(config: ModelConfig) -> int:
    """All parameters."""
    return tree.num_elements(shapes(config))


def part(name: str) -> str:
    """The part that a parameter belongs to."""
    own = PLACE.sub("", name)
    return next(key for key, pattern in PARTS.items() if re.search(pattern, own))


def count(config: ModelConfig) -> dict[str, Part]:
    """The parts that this model has, in the order of PARTS."""
    totals = dict.fromkeys(PARTS, 0)
    layers = {key: [0] * len(config.pattern) for key in PARTS}
    for name, x in shapes(config).items():
        key, place = part(name), PLACE.match(name)
        totals[key] += x.size
        if place and place[1] == "0":  # what is left of the pattern has the same layers again
            layers[key][int(place[2])] += x.size // x.shape[0]
    return {key: Part(totals[key], tuple(layers[key])) for key in PARTS if totals[key]}


def matrices(config: ModelConfig) -> dict[str, Matrix]:
    """The weights of the layers whose product with each token is from or to the residual stream.

    That is: D is the first or last of several dims. Biases and norms have one or no D, and what
    compresses blocks (native sparse attention) meets no token.
    """
    found = {}
    for name, x in shapes(config).items():
        dims, sizes = name.rpartition("_")[2], x.shape[1:]
        if not PLACE.match(name) or len(sizes) < 2 or "D" not in (dims[0], dims[-1]):
            continue
        outputs = math.prod(sizes[1:]) if dims[0] == "D" else sizes[-1]
        input_dims = 1 if dims[0] == "D" else len(sizes) - 1
        found[name] = Matrix(x.shape[0], math.prod(sizes) // outputs, outputs, input_dims)
    return found
