"""Peak rates of the chips we know, from their makers' pages; None where nobody can know."""

import jax

# Dense bfloat16 FLOP/s of one JAX device. cloud.google.com/tpu/docs (v7x: half a chip is a
# device); NVIDIA data sheets, without sparsity.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of `device`; None if its kind is not in the table."""
    kind = device.device_kind
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None
