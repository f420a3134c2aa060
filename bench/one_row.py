"""How fast a CPU reads weights to multiply one row: GB/s of each way to write the product.

    python -m bench.one_row

64 weights of 768 x 2048 in turns, more than caches hold; the median of 7 runs.
"""

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout

INPUTS, OUTPUTS, WEIGHTS, RUNS = 768, 2048, 64, 7


def main() -> None:
    keys = jax.random.split(jax.random.key(0), WEIGHTS)
    wide = [jax.random.normal(key, (INPUTS, OUTPUTS)) for key in keys]
    narrow = [w_IO.astype(jnp.bfloat16) for w_IO in wide]
    turned = [jnp.array(w_IO.T) for w_IO in wide]
    bits = [jax.lax.bitcast_convert_type(w_IO, jnp.uint16) for w_IO in narrow]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    column = Format(Layout(major_to_minor=(1, 0)), device)
    show("float32, weight [inputs, outputs]", rows(1), wide)
    show("float32, weight [outputs, inputs]", rows(1, weight_dim=1), turned)
    show("the first in a device layout of the second", rows(1), jax.device_put(wide, column))
    for count in (2, 4, 8, 16):
        show(f"bfloat16, {count} rows", rows(count), narrow)
    narrow_turned = [w_OI.astype(jnp.bfloat16) for w_OI in turned]
    show("bfloat16, 2 rows, weight [outputs, inputs]", rows(2, weight_dim=1), narrow_turned)
    show("bfloat16, bits widened in the reduction", widened, bits)


def rows(count: int, weight_dim: int = 0) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A product of so many equal rows with a weight, over this dim of it."""

    def multiply(x_1I: jax.Array, w: jax.Array) -> jax.Array:
        x_RI = jnp.concatenate([x_1I] * count)
        dims = ((1,), (weight_dim,)), ((), ())
        return jax.lax.dot_general(x_RI, w, dims, preferred_element_type=jnp.float32)[:1]

    return multiply


def widened(x_1I: jax.Array, bits_IO: jax.Array) -> jax.Array:
    """The product with a weight of bfloat16, as bits, whose numbers it makes on the way."""
    w_IO = jax.lax.bitcast_convert_type(bits_IO.astype(jnp.uint32) << 16, jnp.float32)
    return (x_1I[0].astype(jnp.float32)[:, None] * w_IO).sum(axis=0)[None]


def show(name: str, multiply: Callable, weights: Sequence[jax.Array]) -> None:
    """One line; each product waits for the one before."""
    dtype = jnp.float32 if weights[0].dtype == jnp.float32 else jnp.bfloat16

    @jax.jit
    def chain(x_1I, weights):
        for w in weights:
            x_1I = x_1I * 0.5 + multiply(x_1I, w)[:, :INPUTS].astype(dtype) * 1e-3
        return x_1I

    x_1I, seconds = jnp.ones((1, INPUTS), dtype), []
    jax.block_until_ready(chain(x_1I, weights))
    for _ in range(RUNS):
        began = time.perf_counter()
        jax.block_until_ready(chain(x_1I, weights))
        seconds.append(time.perf_counter() - began)
    size = sum(w.nbytes for w in weights)
    print(f"{size / statistics.median(seconds) / 1e9:6.1f} GB/s  {name}", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
