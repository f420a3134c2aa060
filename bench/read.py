"""Worker that reads a gibibyte from memory once: the measure beside decoding."""

import jax
import jax.numpy as jnp

from bench.sides import turns

BYTES = 2**30


def main() -> None:
    x = jnp.ones((BYTES // 4,), jnp.float32)
    total = jax.jit(jnp.sum)
    turns.serve(lambda _: jax.block_until_ready(total(x)))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
