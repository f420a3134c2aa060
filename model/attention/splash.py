"""Attention on TPUs: Pallas kernels that visit the tiles of queries x keys that the mask allows.

FlashAttention-2 (Dao, 2023, arXiv 2307.08691) over a list of tiles that the kernel gets ahead of
its data, as in the splash ("sparse flash") attention of JAX. There the list is made in Python from
places in the row; here in XLA from positions and segments: every `Mask`, packed documents, any
order of tokens and each hop of a ring have a list of their own.

    out_BTNH, lse_BTN = forward(q_BTNH, k_BSKH, v_BSKH, at, at, Mask(), scale=0.125, softcap=0.0)

The grid is as long as the list of the row that has most: what is ruled out costs neither a copy
nor a step. On other platforms than TPUs the kernels are interpreted: slow, and the same.

Beyond the letters of the repo: Y query blocks of R, Z key blocks of C, W = Y Z entries of a list.
A length whose list or gradients do not fit is cut in U parts, one after the other.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from core.config import Unsupported
from model.attention import blocks, splash_tiles
from model.attention.spec import Mask, Where
from model.attention.splash_tiles import How

LANES, SUBLANES = 128, 8  # of a TPU register: blocks are multiples of 128
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
    q_at: Where,
    k_at: Where,
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
    call = _Call(How(mask, scale, softcap, slope_N is not None), N, K, H, R, C)
    slope_N, q_BNTH, k_BKSH, v_BKSH, q_at_B8T, k_at_B8S = _vary_alike(
        _slopes(slope_N, N),
        _heads_first(q_BTNH, T_whole),
        _heads_first(k_BSKH, S_whole),
        _heads_first(v_BSKH, S_whole),
        _rows(q_at, T_whole),
        _rows(k_at, S_whole),
    )
    v_BKHS = v_BKSH.swapaxes(2, 3)

    def part(queries):
        q_BNTH, q_at_B8T = queries
        arrays = {"q_RH": q_BNTH, "k_CH": k_BKSH, "v_HC": v_BKHS}
        return call(
            splash_tiles.forward, slope_N, arrays, q_at_B8T, k_at_B8S, ("HR", "1R"), ("1R", "1R")
        )

    out_UBNHT, lse_UBN1T = jax.lax.map(part, (_split(q_BNTH, U), _split(q_at_B8T, U)))
    out_BTNH, lse_BTN1 = (_join(x.swapaxes(3, 4), T) for x in (out_UBNHT, lse_UBN1T))
    return out_BTNH, lse_BTN1[..., 0]


def backward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_at: Where,
    k_at: Where,
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
    most = min(max(1, RESIDENT // (8 * C * pl.cdiv(H, LANES) * LANES)), MAX_TILES * R // (B * T_whole))
    U, S_whole = _parts(S, C, most, "queries")
    call = _Call(How(mask, scale, softcap, slope_N is not None), N, K, H, R, C)
    # 2 ** (score - inf) is 0: nothing comes back to queries that saw nothing.
    lse_BTN = jnp.where(jnp.isneginf(lse_BTN), jnp.inf, lse_BTN * splash_tiles.LOG2_E)
    slope_N, q_BNTH, dout_BNTH, lse_BNT1, delta_BNT1, k_BKSH, v_BKSH, q_at_B8T, k_at_B8S = (
        _vary_alike(
            _slopes(slope_N, N),
            *(_heads_first(x, T_whole) for x in (q_BTNH, dout_BTNH.astype(q_BTNH.dtype))),
            *(_heads_first(x_BTN[..., None], T_whole) for x_BTN in (lse_BTN, delta_BTN)),
            *(_heads_first(x, S_whole) for x in (k_BSKH, v_BSKH)),
            _rows(q_at, T_whole),
            _rows(k_at, S_whole),
        )
    )
    lse_BN1T, delta_BN1T = lse_BNT1.swapaxes(2, 3), delta_BNT1.swapaxes(2, 3)

    def part(keys):
        k_BKSH, v_BKSH, k_at_B8S = keys
        arrays = {"q_RH": q_BNTH, "dout_RH": dout_BNTH, "lse_1R": lse_BN1T, "delta_1R": delta_BN1T}
        arrays |= {"k_CH": k_BKSH, "k_HC": k_BKSH.swapaxes(2, 3), "v_CH": v_BKSH}
        return call(
            splash_tiles.backward, slope_N, arrays, q_at_B8T, k_at_B8S, ("HR", "ZCH", "ZCH")
        )

    def add(dq_BNHT, keys):
        more_BNHT, *dkv = part(keys)
        return dq_BNHT + more_BNHT, dkv

    keys_U = [_split(x, U) for x in (k_BKSH, v_BKSH, k_at_B8S)]
    dq_BNHT, *dkv_BKZCH = part([x[0] for x in keys_U])
    dkv_UBKZCH = [x[None] for x in dkv_BKZCH]
    if U > 1:
        dq_BNHT, more = jax.lax.scan(add, dq_BNHT, [x[1:] for x in keys_U])
        dkv_UBKZCH = map(jnp.concatenate, zip(dkv_UBKZCH, more, strict=True))
    dk_BSKH, dv_BSKH = (
        _join(x.reshape(U, B, K, S_whole // U, H), S) for x in dkv_UBKZCH
    )
    dq_BTNH = _join(dq_BNHT.swapaxes(2, 3)[None], T)
    return dq_BTNH * scale, dk_BSKH * scale, dv_BSKH


class _Call(NamedTuple):
    """A pallas_call: its grid is (rows, kv heads, query heads of each, entries of the list)."""

    how: How
    N: int
    K: int
    H: int
    R: int
    C: int

    def __call__(
        self,
        body: Callable,
        slope_N: jax.Array,
        arrays: dict[str, jax.Array],
        q_at_B8T: jax.Array,
        k_at_B8S: jax.Array,
        results: Sequence[str],
        scratch: Sequence[str] = (),
    ) -> tuple[jax.Array, ...]:
        """Names of `arrays` end in the block that the body sees, `results` are such endings."""
        tiles_BW, count = tile_list(self.how.mask, q_at_B8T, k_at_B8S, self.R, self.C)
        (B, W), S, T = tiles_BW.shape, k_at_B8S.shape[2], q_at_B8T.shape[2]
        arrays = {**arrays, "q_at_8R": q_at_B8T, "k_at_8C": k_at_B8S}
        shapes = {
            "HR": (B, self.N, self.H, T),
            "1R": (B, self.N, 1, T),
            "ZCH": (B, self.K, S // self.C, self.C, self.H),
        }
        blocks_of = self.blocks(S // self.C, W)

        def run(*operands, interpret):
            vary = jax.typeof(operands[0]).manual_axis_type
            shape = functools.partial(
                jax.ShapeDtypeStruct, dtype=jnp.float32, manual_axis_type=vary
            )
            call = pl.pallas_call(
                functools.partial(body, how=self.how, num_tiles=W),
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=2,
                    grid=(B, self.K, self.N // self.K, operands[0]),
                    in_specs=[blocks_of[name.split("_")[-1]] for name in arrays],
                    out_specs=[blocks_of[name] for name in results],
                    scratch_shapes=[pltpu.VMEM((1, self.R), jnp.float32) for _ in scratch],
                ),
                out_shape=[shape(shapes[name]) for name in results],
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
                ),
                interpret=interpret,
                name=f"splash_{body.__name__}",
            )
            return tuple(call(*operands[1:]))

        return jax.lax.platform_dependent(
            count,
            tiles_BW.reshape(-1),
            slope_N,
            *arrays.values(),
            tpu=functools.partial(run, interpret=False),
            default=functools.partial(_unchecked, functools.partial(run, interpret=True)),
        )

    def blocks(self, Z: int, W: int) -> dict[str, pl.BlockSpec]:
        """Blocks by their dims: of which shape, and where in [B, heads, ...]."""

        def block(shape, place, mode=None):
            def index(b, k, g, w, tiles_BW, slope_N):
                entry = tiles_BW[b * W + w]
                y, z = splash_tiles.query_block(entry), splash_tiles.key_block(entry)
                return b, *place(k, k * (self.N // self.K) + g, y, z)

            return pl.BlockSpec((None, *shape), index, pipeline_mode=mode)

        R, C, H = self.R, self.C, self.H
        return {
            "RH": block((None, R, H), lambda k, n, y, z: (n, y, 0)),
            "HR": block((None, H, R), lambda k, n, y, z: (n, 0, y)),
            "1R": block((None, 1, R), lambda k, n, y, z: (n, 0, y)),
            "8R": block((SUBLANES, R), lambda k, n, y, z: (0, y)),
            "CH": block((None, C, H), lambda k, n, y, z: (k, z, 0)),
            "HC": block((None, H, C), lambda k, n, y, z: (k, 0, z)),
            "8C": block((SUBLANES, C), lambda k, n, y, z: (0, z)),
            "ZCH": block((None, Z, C, H), lambda k, n, y, z: (k, 0, 0, 0), pl.Buffered(1)),
        }


def tile_list(
    mask: Mask, q_at_B8T: jax.Array, k_at_B8S: jax.Array, R: int, C: int
) -> tuple[jax.Array, jax.Array]:
    """(entries int32 [B, W], the most that a row has): tiles to visit, query block by query block.

    A query block that meets no key block visits one all the same: its result must be written.
    Rows with fewer tiles stay at their last one and do nothing.
    """
    q_at, k_at = _blocks_of(q_at_B8T, R), _blocks_of(k_at_B8S, C)
    (q_ends, q_whole_BY), (k_ends, k_whole_BZ) = _ends(q_at), _ends(k_at)
    q_ends = jax.tree.map(lambda x_BY: x_BY[:, :, None], q_ends)
    k_ends = jax.tree.map(lambda x_BZ: x_BZ[:, None, :], k_ends)
    meets_BYZ = blocks.meets(mask, q_ends, k_ends)
    whole_BYZ = blocks.covers(mask, q_ends, k_ends)
    whole_BYZ &= meets_BYZ & q_whole_BY[:, :, None] & k_whole_BZ[:, None, :]
    B, Y, Z = meets_BYZ.shape
    blind_BY1 = ~meets_BYZ.any(-1, keepdims=True)
    meets_BYZ |= blind_BY1 & (jnp.arange(Z) == 0)[None, None]
    place_BW = jnp.argsort(~meets_BYZ.reshape(B, -1), axis=1, stable=True)
    count_B1 = meets_BYZ.sum((1, 2))[:, None]
    step_1W = jnp.arange(Y * Z)[None]
    place_BW = jnp.take_along_axis(place_BW, jnp.minimum(step_1W, count_B1 - 1), 1)
    y_BW, z_BW = place_BW // Z, place_BW % Z
    changes_BW = y_BW[:, 1:] != y_BW[:, :-1]
    edge_B1 = jnp.ones_like(changes_BW, shape=(B, 1))
    first_BW = jnp.concatenate([edge_B1, changes_BW], 1)
    last_BW = jnp.concatenate([changes_BW, edge_B1], 1) | (step_1W == count_B1 - 1)
    whole_BW = jnp.take_along_axis(whole_BYZ.reshape(B, -1), place_BW, 1)
    flags_BW = jnp.where(whole_BW, splash_tiles.WHOLE, splash_tiles.PARTIAL)
    flags_BW += first_BW * splash_tiles.FIRST + last_BW * splash_tiles.LAST
    flags_BW = jnp.where(step_1W < count_B1, flags_BW, 0)
    return splash_tiles.entry(y_BW, z_BW, flags_BW), count_B1.max()


def _blocks_of(at_B8T: jax.Array, block: int) -> Where:
    B, _, T = at_B8T.shape
    return Where(*at_B8T[:, :2].reshape(B, 2, T // block, block).swapaxes(0, 1))


def _ends(at_BYR: Where) -> tuple[blocks.Ends, jax.Array]:
    """The ends of each block, [B, Y], and whether it is of one document, without padding."""
    B, Y, R = at_BYR.segments_BT.shape
    ends = blocks.ends(Where(*(x.reshape(B * Y, 1, R) for x in at_BYR)))
    low_BY, high_BY = at_BYR.segments_BT.min(2), at_BYR.segments_BT.max(2)
    whole_BY = (low_BY == high_BY) & (low_BY > 0)
    return jax.tree.map(lambda x: x.reshape(B, Y), ends), whole_BY


def _block(length: int, limit: int, mask: Mask) -> int:
    """Tokens of a block: about half of what a query can see, within the bounds."""
    extent = min(2 * mask.block or mask.near or length, length)
    block = max(MIN_BLOCK, min(limit, 2 ** (max(extent // 2, 1).bit_length() - 1)))
    return min(block, pl.cdiv(length, LANES) * LANES)


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


def _heads_first(x_BTNH: jax.Array, length: int) -> jax.Array:
    """[B, N, length, H], padded with zeros."""
    short = length - x_BTNH.shape[1]
    return jnp.pad(x_BTNH, ((0, 0), (0, short), (0, 0), (0, 0))).swapaxes(1, 2)


def _rows(at: Where, length: int) -> jax.Array:
    """[B, 8, length]: positions, segments, and zeros; padding is of segment 0, seen by nobody."""
    at_B2T = jnp.stack(at, 1)
    return jnp.pad(at_B2T, ((0, 0), (0, SUBLANES - 2), (0, length - at_B2T.shape[2])))


def _slopes(slope_N: jax.Array | None, N: int) -> jax.Array:
    return jnp.zeros(N, jnp.float32) if slope_N is None else slope_N


def _split(x_BNT: jax.Array, U: int) -> jax.Array:
    """[B, N, T, ...] -> [U, B, N, T / U, ...]."""
    B, N, T, *rest = x_BNT.shape
    return jnp.moveaxis(x_BNT.reshape(B, N, U, T // U, *rest), 2, 0)


def _join(x_UBNTH: jax.Array, length: int) -> jax.Array:
    """[U, B, N, T, H] -> [B, length, N, H]."""
    U, B, N, T, H = x_UBNTH.shape
    return x_UBNTH.transpose(1, 0, 3, 2, 4).reshape(B, U * T, N, H)[:, :length]


def _unchecked(run: Callable, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """`run` inside a shard_map, but without its check of varying axes: interpretation fails it.

    Its loops start from constants, which vary over no axis. With the check off a product forgets
    what its operands vary over; the results are told again.
    """
    axes = tuple(jax.typeof(operands[0]).manual_axis_type.varying)
    if not axes:
        return run(*operands)

    def forgetful(*operands):
        return run(*(x * jnp.ones((), x.dtype) for x in operands))

    spec = jax.P()
    unchecked = jax.shard_map(
        forgetful, in_specs=spec, out_specs=spec, axis_names=frozenset(), check_vma=False
    )
    return tuple(jax.lax.pcast(x, axes, to="varying") for x in unchecked(*operands))


def _vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """All varying over the mesh axes that any varies over (for shard_map)."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*axes)
    return [
        jax.lax.pcast(x, tuple(every - have), to="varying")
        for x, have in zip(arrays, axes, strict=True)
    ]
