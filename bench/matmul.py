"""Worker of the benchmarks: one float32 matrix product of 2048 a line, for the machine's peak."""

import jax
import jax.numpy as jnp

from bench.sides import turns


def main() -> None:
    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    product = jax.jit(jnp.dot)
    turns.serve(lambda _: product(x, x).block_until_ready())


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
