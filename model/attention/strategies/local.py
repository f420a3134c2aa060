"""WHERE: queries and keys of one device. The one custom_vjp around a kernel's pair."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from model.attention import blocks
from model.attention.blocks import MaskedKernel, PartialSoftmax
from model.attention.mask import Positions
from model.attention.spec import Heads

SAVED = "attention"  # name of what backward needs and rematerialisation had better keep


def attention(pair: MaskedKernel, *args) -> jax.Array:
    """out [B, T, N, H] in q's dtype; arguments of `with_lse`."""
    return with_lse(pair, *args)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_lse(
    pair: MaskedKernel,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    heads: Heads,
    q_at: Positions,
    k_at: Positions,
) -> PartialSoftmax:
    """(out in q's dtype, lse float32), differentiated by the kernel's own backward."""
    return _forward(pair, q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at)[0]


def _forward(pair, q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at):
    part = pair.forward(q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at)
    out_BTNH, lse_BTN = saved(q_BTNH.dtype, blocks.add_sink(part, heads))
    part = out_BTNH, lse_BTN
    return part, (q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at, *part)


def _backward(pair, residuals, dpart):
    q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at, out_BTNH, lse_BTN = residuals
    dout_BTNH, dlse_BTN = dpart
    # ds = p (dp - delta) + p dlse: the gradient of lse is the softmax.
    done = dout_BTNH, lse_BTN, blocks.delta(out_BTNH, dout_BTNH) - dlse_BTN
    dqkv = pair.backward(q_BTNH, k_BSKH, v_BSKH, heads, q_at, k_at, *done)
    dqkv = (d.astype(x.dtype) for d, x in zip(dqkv, (q_BTNH, k_BSKH, v_BSKH), strict=True))
    return *dqkv, blocks.sink_gradient(heads, *done[1:]), None, None


def saved(dtype, part: PartialSoftmax) -> PartialSoftmax:
    """(out in `dtype`, lse), under the name that rematerialisation keeps."""
    out, lse = part
    return checkpoint_name(out.astype(dtype), SAVED), checkpoint_name(lse, SAVED)


with_lse.defvjp(_forward, _backward)
