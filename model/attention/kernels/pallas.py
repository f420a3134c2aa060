"""Calls of Pallas kernels: compiled on their platform, interpreted on others.

    out, lse = call("tpu", run, count, q, k)    # run(count, q, k, interpret=...): a pallas_call

The platform is the one that a program is lowered for, so that a machine without TPUs or GPUs can
compile for them. Inside shard_map a kernel's arguments and results vary over the same mesh axes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def call(platform: str, run: Callable, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """run(*operands, interpret=...), of which `operands` all vary alike."""
    operands = _vary_alike(operands)
    return jax.lax.platform_dependent(
        *operands,
        **{platform: functools.partial(run, interpret=False)},
        default=functools.partial(_unchecked, functools.partial(run, interpret=True)),
    )


def result(shape: tuple[int, ...], like: jax.Array) -> jax.ShapeDtypeStruct:
    """A float32 result of a kernel; it varies as the operand `like` does."""
    vary = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=vary)


def _vary_alike(operands: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Each, varying over the mesh axes that any of them varies over."""
    every = frozenset().union(*map(_varying, operands))
    return [jax.lax.pcast(x, tuple(every - _varying(x)), to="varying") for x in operands]


def _varying(x: jax.Array) -> frozenset:
    return jax.typeof(x).manual_axis_type.varying


def _unchecked(run: Callable, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """`run` inside a shard_map, but without its check of varying axes: interpretation fails it.

    Its loops start from constants, which vary over no axis. With the check off a product forgets
    what its operands vary over; the results are told again.
    """
    axes = tuple(_varying(operands[0]))
    if not axes:
        return run(*operands)

    def forgetful(*operands):
        return run(*(x * jnp.ones((), x.dtype) for x in operands))

    spec = jax.P()
    unchecked = jax.shard_map(
        forgetful, in_specs=spec, out_specs=spec, axis_names=frozenset(), check_vma=False
    )
    return tuple(jax.lax.pcast(x, axes, to="varying") for x in unchecked(*operands))
