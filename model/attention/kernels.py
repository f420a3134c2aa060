"""HOW, by name: the kernels, and which one `model.attention_kernel=auto` means."""

import functools
import logging
from types import ModuleType

import jax

from core.config import UserError
from model.attention import chunked, reference, splash

log = logging.getLogger("cakrawala")

KERNELS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked, "splash": splash}


def kernel_of(name: str, tokens: int) -> ModuleType:
    """The kernel for so many queries of a device; what `auto` means and why is logged."""
    kind = device_kind()
    on_tpu = kind.startswith("TPU")
    if name == "auto":
        name = "splash" if on_tpu and tokens >= splash.LANES else "chunked"
        few = f": {tokens} tokens a device do not fill the {splash.LANES} lanes of splash"
        reason = few if on_tpu and name == "chunked" else ""
        log_once(f"attention_kernel=auto: {name} for {kind}{reason}")
    elif name not in KERNELS:
        raise UserError(f"attention_kernel={name!r} is not one of auto, {', '.join(KERNELS)}")
    elif name == "splash" and not on_tpu:
        log_once(
            f"attention_kernel=splash is for TPUs: on {kind} it is interpreted, right but slow"
        )
    return KERNELS[name]


def device_kind() -> str:
    """Of the mesh in use, which under train.aot is not that of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else "a mesh without devices"


@functools.cache
def log_once(message: str) -> None:
    log.info(message)
