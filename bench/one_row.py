"""GB/s at which a CPU reads weights to multiply one row, for each way to write the product.

    python -m bench.one_row

64 weights of 768 x 2048, more than caches hold; the median of 7 rounds of 8 products with each of
them, with all ways in turns.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.command import cli
from model.ops import one_row

INPUTS, OUTPUTS, WEIGHTS, ROUNDS, PRODUCTS = 768, 2048, 64, 7, 8


class Way(NamedTuple):
    name: str
    multiply: Callable[[jax.Array, jax.Array], jax.Array]  # of x [1, I] and one weight: [1, O]
    weights: list[jax.Array]


def main() -> None:
    keys = jax.random.split(jax.random.key(0), WEIGHTS)
    wide = [jax.random.normal(key, (INPUTS, OUTPUTS)) for key in keys]
    narrow = [w_IO.astype(jnp.bfloat16) for w_IO in wide]
    turned, narrow_turned = ([jnp.array(w_IO.T) for w_IO in ws] for ws in (wide, narrow))
    integers = [(w_IO * 40).astype(jnp.int8) for w_IO in wide]
    ways = [
        Way("float32, weight [inputs, outputs]", rows(1), wide),
        Way("float32, weight [outputs, inputs]", rows(1, weight_dim=1), turned),
        *(Way(f"bfloat16, {count} rows", rows(count), narrow) for count in (2, 4, 8, 16)),
        Way("bfloat16, 2 rows, weight [outputs, inputs]", rows(2, weight_dim=1), narrow_turned),
        Way("bfloat16, sums of 8 inputs", by_columns, narrow),
        Way("int8, sums of 8 inputs", by_columns, integers),
    ]
    chains = [chain(way) for way in ways]
    seconds = [[call() for call in chains] for _ in range(ROUNDS + 1)][1:]  # the first compiles
    for way, times in zip(ways, zip(*seconds, strict=True), strict=True):
        size = PRODUCTS * sum(w.nbytes for w in way.weights)
        print(f"{size / statistics.median(times) / 1e9:6.1f} GB/s  {way.name}")


def rows(count: int, weight_dim: int = 0) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A product of so many equal rows with a weight, over this dim of it."""

    def multiply(x_1I: jax.Array, w: jax.Array) -> jax.Array:
        x_RI = jnp.concatenate([x_1I] * count)
        dims = ((1,), (weight_dim,)), ((), ())
        return jax.lax.dot_general(x_RI, w, dims, preferred_element_type=jnp.float32)[:1]

    return multiply


def by_columns(x_1I: jax.Array, w_IO: jax.Array) -> jax.Array:
    """The product as decoding does it."""
    return one_row.by_columns(x_1I[:, None], w_IO[None])[None]


def chain(way: Way) -> Callable[[], float]:
    """A call that gives the seconds of all products; each waits for the one before."""
    dtype = jnp.float32 if way.weights[0].dtype == jnp.float32 else jnp.bfloat16

    @jax.jit
    def multiply(x_1I, weights):
        for w in weights:
            x_1I = x_1I * 0.5 + way.multiply(x_1I, w)[:, :INPUTS].astype(dtype) * 1e-3
        return x_1I

    def seconds() -> float:
        x_1I, began = jnp.ones((1, INPUTS), dtype), time.perf_counter()
        for _ in range(PRODUCTS):
            x_1I = multiply(x_1I, way.weights)
        jax.block_until_ready(x_1I)
        return time.perf_counter() - began

    return seconds


if __name__ == "__main__":
    with cli.exits():
        jax.config.update("jax_platforms", "cpu")
        main()
