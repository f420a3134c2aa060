"""RMSNorm and LayerNorm."""

import jax
import jax.numpy as jnp
from flax import nnx

from model.initializers import ParamInit


def unit_rms(x32: jax.Array, eps: float) -> jax.Array:
    """x over the root of its mean square along the last dim."""
    return x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + eps)


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last dim, in float32."""

    def __init__(self, make: ParamInit, size: int, kind: str):
        self.eps = make.config.norm_eps
        self.offset = 1.0 if kind == "rms_offset" else 0.0
        self.scale_D = make.constant(1.0 - self.offset, size)
        self.bias_D = make.constant(0.0, size) if kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.bias_D is not None:
            x32 = x32 - x32.mean(axis=-1, keepdims=True)
        x32 = unit_rms(x32, self.eps)
        rank = (1,) * (x.ndim - 1)
        scale_D = self.offset + self.scale_D[...].astype(jnp.float32)
        x32 = x32 * scale_D.reshape(*rank, -1)
        if self.bias_D is not None:
            x32 = x32 + self.bias_D[...].reshape(*rank, -1)
        return x32.astype(x.dtype)
