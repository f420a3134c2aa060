"""How many keys each token of a document sees: what FLOPs and the cost model count."""

import numpy as np

from model.attention.spec import AttentionSpec, Mask


def keys_seen(spec: AttentionSpec, length: int) -> np.ndarray:
    """Keys that each token of a document of `length` attends to, int [length].

    Those of the three branches of NSA add up; what it costs to choose blocks is not counted.
    """
    if not spec.top:
        return keys_allowed(spec.mask, length)
    q = np.arange(length)
    chosen = q % spec.block + 1 + np.minimum(q // spec.block, spec.top - 1) * spec.block
    if spec.kind == "moba":
        return chosen
    compressed = np.maximum((q + 1 - spec.compress) // spec.step + 1, 0)
    return chosen + compressed + np.minimum(q + 1, spec.window)


def keys_allowed(mask: Mask, length: int) -> np.ndarray:
    """Keys that the mask lets each token of a document of `length` see, int [length]."""
    if not mask.causal:
        return np.full(length, length)
    q = np.arange(length)
    near = q + 1
    if mask.window:
        near = np.minimum(near, mask.window)
    elif mask.chunk:
        near = q % mask.chunk + 1
    elif mask.block:
        near = np.minimum(near, q % mask.block + 1 + (mask.local - 1) * mask.block)
    far = np.minimum(mask.sinks, q + 1 - near)
    if mask.stride:
        block = q // mask.block
        far += (block // mask.stride - (mask.local - 1) // mask.stride).clip(0) * mask.block
        for first in range(0, mask.sinks, mask.block):  # both a sink and on the stride
            back = block - first // mask.block
            both = (back >= mask.local) & (back % mask.stride == 0)
            far -= both * min(mask.block, mask.sinks - first)
    return np.maximum(near + far, min(mask.prefix, length))
