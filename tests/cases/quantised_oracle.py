"""The numbers that rounded weights stand for, unpacked by NumPy one by one."""

import jax
import numpy as np

from core import tree
from model import transformer
from model.ops.quantised import Table
from model.sizes import weights


def stands_for(w):
    """float64 [..., Z * C, O] of a matrix, or [V, D] of a table."""
    if isinstance(w, Table):
        return np.asarray(w.values_VD) * np.asarray(w.scales_V, np.float64)[:, None]
    q_ZCO = np.asarray(w.values_ZCO)
    if w.bits == 4:
        low, high = (q_ZCO & 15).astype(np.int8), (q_ZCO.view(np.uint8) >> 4).astype(np.int8)
        q_ZCO = np.concatenate([low - 16 * (low > 7), high - 16 * (high > 7)], axis=-2)
    w_ZCO = q_ZCO * np.asarray(w.scales_ZO, np.float64)[..., None, :]
    return w_ZCO.reshape(*w_ZCO.shape[:-3], -1, w_ZCO.shape[-1])


def as_floats(model):
    """The model whose float weights are those numbers."""
    planned = transformer.abstract(model.config, model.rules)
    shapes = tree.named_leaves(planned)

    def floats(name, w):
        if isinstance(w, jax.Array):
            return w
        values = stands_for(w).reshape(shapes[name].shape).astype(model.config.compute_dtype)
        return jax.device_put(values, shapes[name].sharding.spec)

    leaves = {name: floats(name, w) for name, w in weights.leaves(model).items()}
    return tree.with_leaves(planned, leaves)
