"""Worker of bench.attention: our kernel, MoBA, NSA, and jax.nn.dot_product_attention."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench import attention as bench
from bench.sides import turns
from core import backend
from core.sharding import MeshConfig, make_mesh, training
from model.attention import nsa, spec
from model.attention.attend import attend
from model.attention.mask import Positions


def ours(
    implementation: str, kernel: str, window: int, at: Positions, *qkv: jax.Array
) -> jax.Array:
    """`attend`, or native sparse attention, as a layer calls it."""
    how = dict(kernel=kernel, rules=training("ring" if implementation == "ring" else "local"))
    if implementation == "nsa":
        gates_BTN3 = jnp.full_like(qkv[0][..., :3], 1 / 3)
        weights = compressors(qkv[0].shape[-1])
        return nsa.attention(*qkv, gates_BTN3, weights, at, spec.nsa(), **how)
    if implementation == "moba":
        return attend(*qkv, at, spec.moba(512, 4), **how)
    return attend(*qkv, at, spec.sliding(window) if window else spec.full(), **how)


def compressors(width: int) -> tuple[nsa.Compressor, nsa.Compressor]:
    """Returns compressors of K and of V, as good as untrained."""
    places, square = jnp.zeros((spec.nsa().compress, width)), jnp.eye(width) / 8
    return (nsa.Compressor(places, square, square),) * 2


def theirs(on: str, window: int, *qkv: jax.Array) -> jax.Array:
    """Runs JAX's own attention on the one device of the mesh, whose axes it does not know."""
    place = training()("batch", "length", "act_heads", None)
    how = dict(local_window_size=(window - 1, 0)) if window else {}
    if on == "gpu":
        how["implementation"] = "cudnn"
    attention = functools.partial(jax.nn.dot_product_attention, is_causal=True, **how)
    return jax.shard_map(attention, in_specs=(place,) * 3, out_specs=place)(*qkv)


@functools.cache
def program(
    implementation: str, on: str, length: int, window: int, backward: bool
) -> Callable[[], Any]:
    """A call that runs one case on arrays that are there already, to its end."""
    place, machine = training()("batch", "length", "act_heads", None), bench.MACHINES[on]
    shape = (1, length, bench.HEADS, machine.width)
    q, k, v, dout = (
        jax.device_put(jax.random.normal(jax.random.key(i), shape, machine.dtype), place)
        for i in range(4)
    )
    at = Positions(jnp.arange(length, dtype=jnp.int32)[None], jnp.ones((1, length), jnp.int32))
    at = jax.device_put(at, training()("batch", "length"))
    attention = functools.partial(ours, implementation, machine.kernel, window, at)
    if implementation == "jax":
        attention = functools.partial(theirs, on, window)

    def run(q, k, v, dout):
        if not backward:
            return attention(q, k, v)
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(dout)

    run = jax.jit(run)
    return lambda: jax.block_until_ready(run(q, k, v, dout))


def main(simulate: int = 0, seq: int = 1) -> None:
    backend.prepare(simulate)
    with jax.set_mesh(make_mesh(MeshConfig(simulate=simulate, seq=seq))):
        turns.serve(lambda task: program(**task)())


if __name__ == "__main__":
    main()
