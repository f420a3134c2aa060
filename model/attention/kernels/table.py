"""HOW, by name: the kernels, and which one `model.attention_kernel=auto` means."""

import functools
import logging
from types import ModuleType

from core.config import UserError
from core.sharding import device_kind
from model.attention.kernels import chunked, gpu, reference, splash

log = logging.getLogger("cakrawala")

KERNELS: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "splash": splash,
    "gpu": gpu,
}
MADE_FOR = {"splash": ("TPU",), "gpu": ("NVIDIA", "Tesla")}  # how names of devices begin
CAPABILITY_8_OR_9 = ("NVIDIA A100", "NVIDIA H100", "NVIDIA H200")  # 8.0 or 9.0


def kernel_of(name: str, tokens: int) -> ModuleType:
    """The kernel for so many queries of a device; what `auto` means and why is logged."""
    kind = device_kind()
    if name == "auto":
        name, reason = _best(kind, tokens)
        log_once(f"attention_kernel=auto: {name} for {kind}{reason}")
    elif name not in KERNELS:
        raise UserError(f"attention_kernel={name!r} is not one of auto, {', '.join(KERNELS)}")
    elif name in MADE_FOR and not kind.startswith(MADE_FOR[name]):
        log_once(
            f"attention_kernel={name} is for {MADE_FOR[name][0]} devices: on {kind} it is "
            "interpreted, right but slow"
        )
    return KERNELS[name]


def _best(kind: str, tokens: int) -> tuple[str, str]:
    """(name, the reason in words, where it is not plain)."""
    if kind.startswith("TPU"):
        few = f": {tokens} tokens a device do not fill the {splash.LANES} lanes of splash"
        return ("splash", "") if tokens >= splash.LANES else ("chunked", few)
    if kind.startswith(MADE_FOR["gpu"]):
        if kind.startswith(CAPABILITY_8_OR_9):
            return "gpu", ", for which it was compiled (docs/gpu.md)"
        return "chunked", ": gpu was compiled for compute capability 8.0 and 9.0, which it may lack"
    return "chunked", ""


@functools.cache
def log_once(message: str) -> None:
    log.info(message)
