"""A checkpoint's tensors as our parameters: into a bundle, or straight onto a mesh.

    save(source, "runs/tinyllama")                  # no device is needed
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = load("TinyLlama-1.1B", prefilling())

One tensor at a time is read; on a mesh each device holds its own shards alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from core import tree
from core.checkpoint import Bundle
from core.lazy import StreamedArray
from core.sharding import Rules
from model import transformer
from model.families.tensor import Tensor
from model.io import checkpoint_files
from model.io.checkpoint_files import CheckpointSource
from model.sizes import parts as model_parts
from model.transformer import Transformer

Done = Callable[[str], None]  # told the name of a tensor that is done with
STEP = 0  # of the bundle


def plan(tensors: list[Tensor]) -> dict[str, list[tuple[Tensor, int]]]:
    """Returns the tensors that hold each parameter, by layer, and its place in `params`."""
    found: dict[str, list[tuple[Tensor, int]]] = {}
    for tensor in tensors:
        for i, name in enumerate(tensor.params):
            found.setdefault(name, []).append((tensor, i))
    for parts in found.values():
        parts.sort(key=lambda part: -1 if part[0].layer is None else part[0].layer)
    return found


def parts(
    source: CheckpointSource, name: str, done: Done = lambda name: None
) -> Iterator[tuple[int | None, np.ndarray]]:
    """The parameter `name`, layer by layer as (layer, values), or at once as (None, values)."""
    for tensor, i in plan(source.tensors)[name]:
        yield tensor.layer, checkpoint_files.part(tensor, i, source)
        if i == len(tensor.params) - 1:
            done(tensor.name)


def save(source: CheckpointSource, path: Path, done: Done) -> None:
    """Writes the one step of a bundle that is there without steps."""
    leaves = {
        name: StreamedArray(leaf.shape, leaf.dtype, functools.partial(parts, source, name, done))
        for name, leaf in model_parts.shapes(source.config).items()
    }
    assert leaves.keys() == plan(source.tensors).keys(), "a family does not name our parameters"
    bundle = Bundle(path, lazily=True)
    try:
        bundle.save(STEP, {"model": leaves}, {})
        bundle.wait()
    finally:
        bundle.close()


def load(directory: str | Path, rules: Rules, **fields: Any) -> Transformer:
    """The model of a checkpoint's directory on the mesh in use, in the checkpoint's dtype.

    `fields` replace those of the config, as `dtype`, in which it computes.
    """
    source = checkpoint_files.find(directory)
    source = source._replace(config=dataclasses.replace(source.config, **fields))
    abstract = transformer.abstract(source.config, rules)
    leaves = {
        name: _placed(leaf, parts(source, name))
        for name, leaf in tree.named_leaves(abstract).items()
    }
    return tree.with_leaves(abstract, leaves)


def _placed(
    leaf: jax.ShapeDtypeStruct, parts: Iterator[tuple[int | None, np.ndarray]]
) -> jax.Array:
    """A parameter put together on the devices, layer by layer."""
    mesh, spec = jax.sharding.get_mesh(), leaf.sharding.spec
    stacked = None
    for layer, values in parts:
        of_part = spec if layer is None else PartitionSpec(*spec[1:])
        part = jax.make_array_from_callback(
            values.shape,
            jax.sharding.NamedSharding(mesh, of_part),
            lambda index, values=values: values[index].astype(leaf.dtype, copy=False),
        )
        if layer is None:
            return part
        if stacked is None:
            stacked = jnp.zeros(leaf.shape, leaf.dtype, out_sharding=spec)
        stacked = jax.block_until_ready(_insert(stacked, part, layer))  # not many at once
        del values, part  # before the next layer is read
    return stacked


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stacked: jax.Array, part: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, part, layer, 0)
