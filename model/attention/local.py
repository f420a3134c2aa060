"""WHERE: queries and keys of one device. One custom_vjp around a kernel's pair."""

import functools
from types import ModuleType

import jax
from jax.ad_checkpoint import checkpoint_name

from model.attention import blocks
from model.attention.spec import Mask, Where

SAVED = "attention"  # name of what backward needs and rematerialisation had better keep


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def attention(
    kernel: ModuleType,
    mask: Mask,
    scale: float,
    softcap: float,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_at: Where,
    k_at: Where,
) -> jax.Array:
    """out [B, T, N, H] in q's dtype, differentiated by the kernel's own backward."""
    return _forward(kernel, mask, scale, softcap, q_BTNH, k_BSKH, v_BSKH, q_at, k_at)[0]


def _forward(kernel, mask, scale, softcap, q_BTNH, k_BSKH, v_BSKH, q_at, k_at):
    out_BTNH, lse_BTN = saved(
        q_BTNH.dtype,
        *kernel.forward(q_BTNH, k_BSKH, v_BSKH, q_at, k_at, mask, scale=scale, softcap=softcap),
    )
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, q_at, k_at, out_BTNH, lse_BTN)


def _backward(kernel, mask, scale, softcap, residuals, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, q_at, k_at, out_BTNH, lse_BTN = residuals
    gradients = kernel.backward(
        q_BTNH, k_BSKH, v_BSKH, q_at, k_at, mask,
        dout_BTNH, lse_BTN, blocks.delta(out_BTNH, dout_BTNH), scale=scale, softcap=softcap,
    )  # fmt: skip
    qkv = q_BTNH, k_BSKH, v_BSKH
    return *(g.astype(x.dtype) for g, x in zip(gradients, qkv, strict=True)), None, None


def saved(dtype, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out in `dtype`, lse), under the name that rematerialisation keeps."""
    return checkpoint_name(out.astype(dtype), SAVED), checkpoint_name(lse, SAVED)


attention.defvjp(_forward, _backward)
