"""Measures the most that this device reaches: a copy and a matrix product, in turns."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.compile import hardware
from core.sharding import AXES

SECONDS = 0.4  # of measuring, beside compilation
TURN = 0.02  # a turn has as many copies or products as take so long
COPIED = {"cpu": 2**28}  # bytes: many times the caches
WIDTH = {"cpu": 1024}  # of the product


class Peaks(NamedTuple):
    """Rates of one device."""

    bandwidth: float  # bytes/s, read and written
    flops: float  # FLOP/s of a product in the compute dtype
    sheet_bandwidth: float | None = None  # of the maker's page; None where there is none
    sheet_flops: float | None = None

    @property
    def mfu_flops(self) -> float:
        """FLOP/s that MFU is a share of: the data sheet's figure, or the measured one."""
        return self.sheet_flops or self.flops

    @property
    def mbu_bandwidth(self) -> float:
        """Bytes/s that MBU is a share of."""
        return self.sheet_bandwidth or self.bandwidth


@functools.partial(jax.jit, donate_argnums=0)
def _copy(x: jax.Array, times: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, times, lambda _, x: x * 0.999, x)


@functools.partial(jax.jit, donate_argnums=0)
def _product(x: jax.Array, y: jax.Array, times: jax.Array) -> jax.Array:
    def multiply(_, x):
        return jnp.einsum("pij,pjk->pik", x, y)

    return jax.lax.fori_loop(0, times, multiply, x)


def measure(dtype: jnp.dtype) -> Peaks:
    """The best of each over SECONDS; on the mesh in use, all devices at work at once."""
    count, platform, place = num_devices(), jax.devices()[0].platform, jax.P(AXES)
    size, width = COPIED.get(platform, 2**30), WIDTH.get(platform, 8192)
    if platform == "cpu":  # simulated devices share the host
        size //= count
    put = functools.partial(jax.device_put, device=place)
    x = put(jnp.ones((count, size // 4), jnp.float32))
    y = put(jnp.broadcast_to(jnp.eye(width, dtype=dtype), (count, width, width)))
    z = put(jnp.ones_like(y))
    copies, products = jnp.int32(1), jnp.int32(1)

    def timed(function, *args) -> tuple[jax.Array, float]:
        began = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        return result, time.perf_counter() - began

    for _ in range(2):  # the first compiles
        x, copy_seconds = timed(_copy, x, copies)
        z, product_seconds = timed(_product, z, y, products)
    copies = jnp.int32(max(1, TURN / copy_seconds))
    products = jnp.int32(max(1, TURN / product_seconds))
    bandwidth = flops = 0.0
    ends = time.perf_counter() + SECONDS
    while time.perf_counter() < ends or not flops:
        x, seconds = timed(_copy, x, copies)
        bandwidth = max(bandwidth, 2 * size * int(copies) / seconds)
        z, seconds = timed(_product, z, y, products)
        flops = max(flops, 2 * width**3 * int(products) / seconds)
    sheet = hardware.one_device(jax.devices())
    known = (sheet.hbm_bandwidth, sheet.flops) if sheet else (None, None)
    return Peaks(bandwidth, flops, *known)


def num_devices() -> int:
    """The number of devices of the mesh in use."""
    return jax.sharding.get_mesh().size
