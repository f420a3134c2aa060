"""Worker of bench.attention: `chunked`, MoBA, NSA, and jax.nn.dot_product_attention."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench import attention as bench
from bench import turns
from core import backend
from core.sharding import MeshConfig, make_mesh, training
from model.attention import nsa, spec
from model.attention.attend import attend
from model.attention.spec import Where


def ours(implementation: str, window: int, at: Where, *qkv: jax.Array) -> jax.Array:
    """`attend`, or native sparse attention, as a layer calls it."""
    how = dict(kernel="chunked", rules=training("ring" if implementation == "ring" else "local"))
    if implementation == "nsa":
        gates_BTN3 = jnp.full_like(qkv[0][..., :3], 1 / 3)
        return nsa.attention(*qkv, gates_BTN3, compressors(), at, spec.nsa(), **how)
    if implementation == "moba":
        return attend(*qkv, at, spec.moba(512, 4), **how)
    return attend(*qkv, at, spec.sliding(window) if window else spec.full(), **how)


def compressors() -> tuple[nsa.Compressor, nsa.Compressor]:
    """Of K and of V, as good as untrained."""
    places, square = jnp.zeros((spec.nsa().compress, bench.WIDTH)), jnp.eye(bench.WIDTH) / 8
    return (nsa.Compressor(places, square, square),) * 2


def theirs(*qkv: jax.Array) -> jax.Array:
    """On the one device of the mesh, whose axes it does not know."""
    place = training()("batch", "length", "act_heads", None)
    attention = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    return jax.shard_map(attention, in_specs=(place,) * 3, out_specs=place)(*qkv)


@functools.cache
def program(implementation: str, length: int, window: int, backward: bool) -> Callable[[], Any]:
    """A call that runs one case on arrays that are there already, to its end."""
    place = training()("batch", "length", "act_heads", None)
    shape = (1, length, bench.HEADS, bench.WIDTH)
    q, k, v, dout = (
        jax.device_put(jax.random.normal(jax.random.key(i), shape), place) for i in range(4)
    )
    at = Where(jnp.arange(length, dtype=jnp.int32)[None], jnp.ones((1, length), jnp.int32))
    at = jax.device_put(at, training()("batch", "length"))
    mine = functools.partial(ours, implementation, window, at)
    attention = theirs if implementation == "jax" else mine

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
