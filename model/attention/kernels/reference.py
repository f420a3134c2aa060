"""The dense oracle: every score at once in float32, O(T S) memory. For tests and tiny inputs."""

import jax
import jax.numpy as jnp

from model.attention.mask import Mask, Positions


def forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_at: Positions,
    k_at: Positions,
    mask: Mask,
    *,
    scale: float,
    softcap: float,
    slope_N: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H], log-sum-exp [B, T, N]), both float32; no key seen: 0 and -inf."""
    B, T, N, H = q_BTNH.shape
    s_BTKGS, seen_BTS = _scores(q_BTNH, k_BSKH, q_at, k_at, mask, scale, softcap, slope_N)
    s_BTKGS = jnp.where(seen_BTS[:, :, None, None, :], s_BTKGS, -jnp.inf)
    lse_BTKG = jax.nn.logsumexp(s_BTKGS, axis=-1)
    # A row that sees nothing has lse -inf: keep -inf - -inf out.
    safe_BTKG = jnp.where(jnp.isneginf(lse_BTKG), 0.0, lse_BTKG)
    p_BTKGS = jnp.exp(s_BTKGS - safe_BTKG[..., None])
    out_BTKGH = jnp.einsum("BTKGS,BSKH->BTKGH", p_BTKGS, v_BSKH.astype(jnp.float32))
    return out_BTKGH.reshape(B, T, N, H), lse_BTKG.reshape(B, T, N)


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_at: Positions,
    k_at: Positions,
    mask: Mask,
    dout_BTNH: jax.Array,
    lse_BTN: jax.Array,
    delta_BTN: jax.Array,
    *,
    scale: float,
    softcap: float,
    slope_N: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients (dq, dk, dv), float32, of these keys' part in an attention with `lse` and `delta`.

    `lse` is over all keys that the queries see, here or elsewhere; `delta` is <out, dout>.
    """
    K = k_BSKH.shape[2]
    s_BTKGS, seen_BTS = _scores(q_BTNH, k_BSKH, q_at, k_at, mask, scale, softcap, slope_N)
    seen_BTS = seen_BTS[:, :, None, None, :]
    # Masked before exp: a score that was not in `lse` may be far above it.
    lse_BTKG1 = _grouped(lse_BTN, K)[..., None]
    p_BTKGS = jnp.exp(jnp.where(seen_BTS, s_BTKGS - lse_BTKG1, -jnp.inf))
    dout_BTKGH = _grouped(dout_BTNH, K)
    dv_BSKH = jnp.einsum("BTKGS,BTKGH->BSKH", p_BTKGS, dout_BTKGH)
    dp_BTKGS = jnp.einsum("BTKGH,BSKH->BTKGS", dout_BTKGH, v_BSKH.astype(jnp.float32))
    ds_BTKGS = p_BTKGS * (dp_BTKGS - _grouped(delta_BTN, K)[..., None])
    if softcap:
        ds_BTKGS = ds_BTKGS * (1 - (s_BTKGS / softcap) ** 2)
    ds_BTKGS = ds_BTKGS * scale
    dq_BTKGH = jnp.einsum("BTKGS,BSKH->BTKGH", ds_BTKGS, k_BSKH.astype(jnp.float32))
    dk_BSKH = jnp.einsum("BTKGS,BTKGH->BSKH", ds_BTKGS, _grouped(q_BTNH, K))
    return dq_BTKGH.reshape(q_BTNH.shape), dk_BSKH, dv_BSKH


def _scores(q_BTNH, k_BSKH, q_at, k_at, mask, scale, softcap, slope_N):
    """Scores [B, T, K, G, S] and which of them count, [B, T, S]."""
    q_BTKGH = _grouped(q_BTNH, k_BSKH.shape[2])
    s_BTKGS = jnp.einsum("BTKGH,BSKH->BTKGS", q_BTKGH * scale, k_BSKH.astype(jnp.float32))
    if softcap:
        s_BTKGS = softcap * jnp.tanh(s_BTKGS / softcap)
    if slope_N is not None:
        ahead_BTS = k_at.positions_BT[:, None, :] - q_at.positions_BT[:, :, None]
        slope_KG1 = slope_N.reshape(k_BSKH.shape[2], -1, 1)
        s_BTKGS = s_BTKGS + slope_KG1[None, None] * ahead_BTS[:, :, None, None, :]
    q_at_BT1 = jax.tree.map(lambda x_BT: x_BT[:, :, None], q_at)
    k_at_B1S = jax.tree.map(lambda x_BS: x_BS[:, None, :], k_at)
    seen_BTS = mask.pairs(q_at_BT1, k_at_B1S)
    return s_BTKGS, seen_BTS


def _grouped(x_BTN: jax.Array, K: int) -> jax.Array:
    """[B, T, N, ...] -> [B, T, K, G, ...] in float32."""
    B, T, N, *rest = x_BTN.shape
    return x_BTN.reshape(B, T, K, N // K, *rest).astype(jnp.float32)
