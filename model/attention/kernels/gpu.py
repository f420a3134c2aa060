"""Attention on NVIDIA GPUs: Pallas kernels for Triton that visit the tiles that the mask allows.

FlashAttention-2 (Dao, 2023, arXiv 2307.08691) over lists of tiles: each query block has a list of
the key blocks that it meets, each key block one of the query blocks. They are made in XLA from
positions and segments, ahead of the kernel: every `Mask`, packed documents, any order of tokens
and each hop of a ring have lists of their own.

    out_BTNH, lse_BTN = forward(q_BTNH, k_BSKH, v_BSKH, at, at, Full(), scale=0.125, softcap=0.0)

The backward pass is two kernels, dq by query blocks and dk, dv by key blocks: nothing is added
atomically, so that it gives the same bits each time. Elsewhere than on CUDA the kernels are
interpreted: slow, and the same. They were compiled for GPUs, and right on an H200 (docs/gpu.md).
"""

import jax

from model.attention.kernels import gpu_call, tiles
from model.attention.kernels.tiles import KernelParams
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
    how = KernelParams(mask, scale, softcap, slope_N is not None)
    return gpu_call.FORWARD(how, q_BTNH, k_BSKH, v_BSKH, q_at, k_at, slope_N)


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
    how = KernelParams(mask, scale, softcap, slope_N is not None)
    inputs = q_BTNH, k_BSKH, v_BSKH, q_at, k_at, slope_N
    done = dout_BTNH, tiles.base_2(lse_BTN), delta_BTN
    (dq_BTNH,) = gpu_call.BACKWARD_QUERIES(how, *inputs, *done)
    return dq_BTNH, *gpu_call.BACKWARD_KEYS(how, *inputs, *done)
