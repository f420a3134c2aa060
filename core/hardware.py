"""What the chips we know can do, from their makers' pages; None where nobody can know."""

import dataclasses
from collections.abc import Sequence

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of one chip, and how many JAX devices it is.

    `hbm_bytes` is what a program may use: on TPUs what libtpu 0.0.42 names when it refuses one
    (the chip has a little more), on GPUs the data sheet's.
    """

    flops: float  # dense bfloat16 FLOP/s
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    links: float  # bytes/s to other chips, both directions of all ports; ICI or NVLink
    ports: int  # to neighbours in the torus; a switch is one
    devices: int = 1


GIB = 2**30
# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, tables of key specifications.
# NVIDIA: data sheets of the SXM modules, without sparsity.
CHIPS = {
    "TPU v4": Chip(275e12, 30.5 * GIB, 1228e9, 600e9, 6),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 819e9, 400e9, 4),
    "TPU v5": Chip(459e12, 95.74 * GIB, 2765e9, 1200e9, 6),
    "TPU v6 lite": Chip(918e12, 31.25 * GIB, 1640e9, 800e9, 4),
    "TPU7x": Chip(2307e12, 189.5 * GIB, 7380e9, 1200e9, 6, devices=2),
    "NVIDIA A100": Chip(312e12, 80e9, 2039e9, 600e9, 1),
    "NVIDIA H100": Chip(989e12, 80e9, 3350e9, 900e9, 1),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 900e9, 1),
}


def chip(kind: str) -> Chip | None:
    """The chip whose name `kind` begins with, the longest that does; None if none does."""
    matches = [name for name in CHIPS if kind.startswith(name)]
    return CHIPS[max(matches, key=len)] if matches else None


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of `device`; None if its kind is not in the table."""
    found = chip(device.device_kind)
    return found.flops / found.devices if found else None


def one_device(devices: Sequence[jax.Device]) -> Chip | None:
    """The part of a chip that one of `devices` is.

    A TPU v4 that is there is one device; one that is compiled for without it is two.
    """
    found = chip(devices[0].device_kind)
    if found is None:
        return None
    parts = max(device.core_on_chip for device in devices) + 1
    rates = (found.flops, found.hbm_bytes, found.hbm_bandwidth, found.links)
    return Chip(*(rate / parts for rate in rates), found.ports)
