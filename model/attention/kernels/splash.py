"""Attention on TPUs: Pallas kernels that visit the tiles of queries x keys that the mask allows.

FlashAttention-2 (Dao, 2023, arXiv 2307.08691) over a list of tiles that the kernel gets ahead of
its data, as in the splash ("sparse flash") attention of JAX. There the list is made in Python from
places in the row; here in XLA from positions and segments: every `Mask`, packed documents, any
order of tokens and each hop of a ring have a list of their own.

    out_BTNH, lse_BTN = forward(q_BTNH, k_BSKH, v_BSKH, at, at, Full(), scale=0.125, softcap=0.0)

The grid is as long as the list of the row that has most: what is ruled out costs neither a copy
nor a step. On other platforms than TPUs the kernels are interpreted: slow, and the same.

Beyond the letters of the repo: Y query blocks of R, Z key blocks of C, W = Y Z entries of a list.
A length whose list or gradients do not fit is cut in U parts, one after the other.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from core.config import Unsupported
from model.attention.kernels import splash_tiles, tiles
from model.attention.kernels.splash_call import SUBLANES, SplashCall
from model.attention.kernels.tiles import KernelParams
from model.attention.mask import Mask, Positions

LANES = 128  # of a TPU register: blocks are multiples of it
# Not measured. A tile has to hide the bytes that it fetches: in bfloat16 it does R FLOPs a byte
# forward and 2.5 C backward, where a v6e needs 560. Scores of 512 x 512 are 1 MiB, of which the
# backward pass holds about four; a TPU v4 has 16 MiB of vector memory in all.
MIN_BLOCK, QUERIES, BACKWARD_QUERIES, KEYS = 256, 1024, 512, 512
WIDTH = 256  # bytes of a head for which that holds: two heads' worth has blocks half as large
MAX_TILES = 2**16  # in one list: 256 KiB of the 1 MiB of scalar memory
RESIDENT = 2**23  # bytes of dK and dV that stay in vector memory


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
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    wide = pl.cdiv(H * q_BTNH.dtype.itemsize, WIDTH)
    R, C = _block(T, QUERIES // wide, mask), _block(S, KEYS // wide, mask)
    _, S_whole = _parts(S, C, splash_tiles.MAX_Z, "keys")
    most = min(splash_tiles.MAX_Y, MAX_TILES * C // (B * S_whole))
    U, T_whole = _parts(T, R, most, "keys")
    call = SplashCall(KernelParams(mask, scale, softcap, slope_N is not None), N, K, H, R, C)
    queries = _heads_first(q_BTNH, T_whole), _rows(q_at, T_whole)
    k_BKSH, v_BKSH = (_heads_first(x, S_whole) for x in (k_BSKH, v_BSKH))
    k_at_B8S, slope_N = _rows(k_at, S_whole), tiles.slopes(slope_N, N)
    v_BKHS = v_BKSH.swapaxes(2, 3)

    def part(queries):
        q_BNTH, q_at_B8T = queries
        arrays = {"q_RH": q_BNTH, "k_CH": k_BKSH, "v_HC": v_BKHS}
        return call(splash_tiles.forward, slope_N, arrays, q_at_B8T, k_at_B8S, ("HR", "1R"))

    out_UBNHT, lse_UBN1T = jax.lax.map(part, tuple(_split(x, U) for x in queries))
    out_BTNH, lse_BTN1 = (_join(x.swapaxes(3, 4), T) for x in (out_UBNHT, lse_UBN1T))
    return out_BTNH, lse_BTN1[..., 0]


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
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    wide = pl.cdiv(H * q_BTNH.dtype.itemsize, WIDTH)
    R, C = _block(T, BACKWARD_QUERIES // wide, mask), _block(S, KEYS // wide, mask)
    _, T_whole = _parts(T, R, splash_tiles.MAX_Y, "queries")
    resident = max(1, RESIDENT // (8 * C * _round_up(H, LANES)))
    most = min(resident, MAX_TILES * R // (B * T_whole))
    U, S_whole = _parts(S, C, most, "queries")
    call = SplashCall(KernelParams(mask, scale, softcap, slope_N is not None), N, K, H, R, C)
    queries = {
        "q_RH": _heads_first(q_BTNH, T_whole),
        "dout_RH": _heads_first(dout_BTNH, T_whole),
        "lse_1R": _heads_first(tiles.base_2(lse_BTN)[..., None], T_whole).swapaxes(2, 3),
        "delta_1R": _heads_first(delta_BTN[..., None], T_whole).swapaxes(2, 3),
    }
    keys = *(_heads_first(x, S_whole) for x in (k_BSKH, v_BSKH)), _rows(k_at, S_whole)
    q_at_B8T, slope_N = _rows(q_at, T_whole), tiles.slopes(slope_N, N)

    def part(keys):
        k_BKSH, v_BKSH, k_at_B8S = keys
        arrays = queries | {"k_CH": k_BKSH, "k_HC": k_BKSH.swapaxes(2, 3), "v_CH": v_BKSH}
        results = "HR", "ZCH", "ZCH"
        return call(splash_tiles.backward, slope_N, arrays, q_at_B8T, k_at_B8S, results)

    def add(dq_BNHT, keys):
        more_BNHT, *dkv = part(keys)
        return dq_BNHT + more_BNHT, dkv

    keys_U = [_split(x, U) for x in keys]
    dq_BNHT, *dkv_BKZCH = part([x[0] for x in keys_U])
    dkv_UBKZCH = [x[None] for x in dkv_BKZCH]
    if U > 1:
        dq_BNHT, more = jax.lax.scan(add, dq_BNHT, [x[1:] for x in keys_U])
        dkv_UBKZCH = map(jnp.concatenate, zip(dkv_UBKZCH, more, strict=True))
    dk_BSKH, dv_BSKH = (_join(x.reshape(U, B, K, S_whole // U, H), S) for x in dkv_UBKZCH)
    dq_BTNH = _join(dq_BNHT.swapaxes(2, 3)[None], T)
    return dq_BTNH * scale, dk_BSKH * scale, dv_BSKH


def _block(length: int, limit: int, mask: Mask) -> int:
    """Tokens of a block: about half of what a query can see, within the bounds."""
    extent = min(mask.extent or length, length)
    block = max(MIN_BLOCK, min(limit, 2 ** (max(extent // 2, 1).bit_length() - 1)))
    return min(block, _round_up(length, LANES))


def _parts(length: int, block: int, most: int, other: str) -> tuple[int, int]:
    """(parts of no more than `most` blocks, length of all of them together)."""
    if most < 1:
        raise Unsupported(
            f"attention_kernel='splash' with so many {other} on one device: its list of tiles "
            "would overflow the scalar memory. Cut the length over more devices (mesh.seq), or "
            "the rows (mesh.data, train.accumulation), or use attention_kernel='chunked'"
        )
    num_blocks = pl.cdiv(length, block)
    parts = pl.cdiv(num_blocks, most)
    return parts, parts * pl.cdiv(num_blocks, parts) * block


def _round_up(x: int, unit: int) -> int:
    return pl.cdiv(x, unit) * unit


def _heads_first(x_BTNH: jax.Array, length: int) -> jax.Array:
    """[B, N, length, H], padded with zeros."""
    short = length - x_BTNH.shape[1]
    return jnp.pad(x_BTNH, ((0, 0), (0, short), (0, 0), (0, 0))).swapaxes(1, 2)


def _rows(at: Positions, length: int) -> jax.Array:
    """[B, 8, length]: positions, segments, until, and zeros; padding has segment 0."""
    at_B3T = at.stacked(1)
    return jnp.pad(at_B3T, ((0, 0), (0, SUBLANES - 3), (0, length - at_B3T.shape[2])))


def _split(x_BNT: jax.Array, U: int) -> jax.Array:
    """[B, N, T, ...] -> [U, B, N, T / U, ...]."""
    B, N, T, *rest = x_BNT.shape
    return jnp.moveaxis(x_BNT.reshape(B, N, U, T // U, *rest), 2, 0)


def _join(x_UBNTH: jax.Array, length: int) -> jax.Array:
    """[U, B, N, T, H] -> [B, length, N, H]."""
    U, B, N, T, H = x_UBNTH.shape
    return x_UBNTH.transpose(1, 0, 3, 2, 4).reshape(B, U * T, N, H)[:, :length]
