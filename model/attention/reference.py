"""The dense oracle: every score at once in float32, O(T S) memory. For tests and tiny inputs."""

import jax
import jax.numpy as jnp

from model.attention.spec import Mask, Where


def forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_at: Where,
    k_at: Where,
    mask: Mask,
    *,
    scale: float,
    softcap: float,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H] in q's dtype, log-sum-exp [B, T, N] float32; no key seen: 0 and -inf)."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H).astype(jnp.float32)
    k_BSKH, v_BSKH = k_BSKH.astype(jnp.float32), v_BSKH.astype(jnp.float32)
    s_BTKGS = jnp.einsum("BTKGH,BSKH->BTKGS", q_BTKGH * scale, k_BSKH)
    if softcap:
        s_BTKGS = softcap * jnp.tanh(s_BTKGS / softcap)
    seen_BTS = mask.allowed(
        q_at.positions_BT[:, :, None],
        k_at.positions_BT[:, None, :],
        q_at.segments_BT[:, :, None],
        k_at.segments_BT[:, None, :],
    )
    s_BTKGS = jnp.where(seen_BTS[:, :, None, None, :], s_BTKGS, -jnp.inf)
    lse_BTKG = jax.nn.logsumexp(s_BTKGS, axis=-1)
    # A row that sees nothing has lse -inf: keep exp(-inf - -inf) out of values and gradients.
    safe_BTKG = jnp.where(jnp.isneginf(lse_BTKG), 0.0, lse_BTKG)
    p_BTKGS = jnp.exp(s_BTKGS - safe_BTKG[..., None])
    out_BTKGH = jnp.einsum("BTKGS,BSKH->BTKGH", p_BTKGS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype), lse_BTKG.reshape(B, T, N)


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_at: Where,
    k_at: Where,
    mask: Mask,
    out_BTNH: jax.Array,
    lse_BTN: jax.Array,
    dout_BTNH: jax.Array,
    *,
    scale: float,
    softcap: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) by differentiating `forward`."""
    del out_BTNH, lse_BTN

    def out(q_BTNH, k_BSKH, v_BSKH):
        return forward(q_BTNH, k_BSKH, v_BSKH, q_at, k_at, mask, scale=scale, softcap=softcap)[0]

    return jax.vjp(out, q_BTNH, k_BSKH, v_BSKH)[1](dout_BTNH)
