"""WHERE: queries and keys of one device. The one custom_vjp around a kernel's pair."""

import functools
from types import ModuleType

import jax
from jax.ad_checkpoint import checkpoint_name

from model.attention import blocks
from model.attention.spec import Heads, Mask, Where

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
    heads: Heads,
    q_at: Where,
    k_at: Where,
) -> jax.Array:
    """out [B, T, N, H] in q's dtype, differentiated by the kernel's own backward."""
    return _forward(kernel, mask, scale, softcap, q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at)[0]


def _forward(kernel, mask, scale, softcap, q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at):
    part = kernel.forward(
        q_BTNH, k_BSKH, v_BSKH, q_at, k_at, mask,
        scale=scale, softcap=softcap, slope_N=heads.slope_N,
    )  # fmt: skip
    out_BTNH, lse_BTN = blocks.add_sink(part, heads)
    out_BTNH = out_BTNH.astype(q_BTNH.dtype)
    out_BTNH, lse_BTN = (checkpoint_name(x, SAVED) for x in (out_BTNH, lse_BTN))
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at, out_BTNH, lse_BTN)


def _backward(kernel, mask, scale, softcap, saved, dout_BTNH):
    q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at, out_BTNH, lse_BTN = saved
    delta_BTN = blocks.delta(out_BTNH, dout_BTNH)
    gradients = kernel.backward(
        q_BTNH, k_BSKH, v_BSKH, q_at, k_at, mask, dout_BTNH, lse_BTN, delta_BTN,
        scale=scale, softcap=softcap, slope_N=heads.slope_N,
    )  # fmt: skip
    qkv = q_BTNH, k_BSKH, v_BSKH
    dqkv = (g.astype(x.dtype) for g, x in zip(gradients, qkv, strict=True))
    return *dqkv, blocks.sink_gradient(heads, lse_BTN, delta_BTN), None, None


attention.defvjp(_forward, _backward)
