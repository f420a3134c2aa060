"""Limits of known chips, from their makers' pages; None for a chip that is not known."""

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
TPU_V5E = Chip(197e12, 15.75 * GIB, 819e9, 400e9, 4)
TPU_V5P = Chip(459e12, 95.74 * GIB, 2765e9, 1200e9, 6)
TPU_V6E = Chip(918e12, 31.25 * GIB, 1640e9, 800e9, 4)
# By `device_kind`, the whole of it: "TPU v5e" is no "TPU v5", an "NVIDIA H100 PCIe" has three
# quarters of the products of an "NVIDIA H100 80GB HBM3", and a MIG instance a part of a GPU.
# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, tables of key specifications.
# NVIDIA: data sheets, without sparsity. `links` of cards in slots is what PCIe has: a bridge joins
# a few of them at most.
CHIPS = {
    "TPU v4": Chip(275e12, 30.5 * GIB, 1228e9, 600e9, 6),
    "TPU v5 lite": TPU_V5E,
    "TPU v5e": TPU_V5E,
    "TPU v5": TPU_V5P,
    "TPU v5p": TPU_V5P,
    "TPU v6 lite": TPU_V6E,
    "TPU v6e": TPU_V6E,
    "TPU7x": Chip(2307e12, 189.5 * GIB, 7380e9, 1200e9, 6, devices=2),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9, 600e9, 1),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9, 600e9, 1),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 40e9, 1555e9, 64e9, 1),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80e9, 1935e9, 64e9, 1),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9, 900e9, 1),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2000e9, 128e9, 1),
    "NVIDIA H100 NVL": Chip(835e12, 94e9, 3900e9, 128e9, 1),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9, 900e9, 1),
    "NVIDIA H200 NVL": Chip(835e12, 141e9, 4800e9, 128e9, 1),
}


def chip(kind: str) -> Chip | None:
    """Returns the chip of this `device_kind`, None if it is not in the table."""
    return CHIPS.get(kind)


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
    # GPUs have no `core_on_chip`.
    is_tpu = devices[0].platform == "tpu"
    parts = max(device.core_on_chip for device in devices) + 1 if is_tpu else 1
    rates = (found.flops, found.hbm_bytes, found.hbm_bandwidth, found.links)
    return Chip(*(rate / parts for rate in rates), found.ports)
