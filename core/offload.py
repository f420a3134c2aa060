"""Computation by the host's processor, on arrays that lie in its memory (`cache_host=True`).

    index = jax.device_put(index, jax.memory.Space.Host)
    x = run_on_host(jnp.take)(x, index)

Neither `x` nor the result visits the device.
"""

from collections.abc import Callable

import jax
from jax.experimental import compute_on

# JAX 0.10 and 0.11 name it `compute_on2`; their `compute_on` is an older function.
_compute_on = vars(compute_on).get("compute_on2") or compute_on.compute_on


def run_on_host(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `function` as the host's processor runs it, on arrays in the host's memory alone."""
    host = jax.memory.Space.Host
    return _compute_on(function, compute_type="device_host", out_memory_spaces=host)
