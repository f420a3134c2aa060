"""The calls of the kernels of gpu_tiles.py: their grids, their blocks, their lists of tiles.

    out_BTNH, lse_BTN = FORWARD(how, q_BTNH, k_BSKH, v_BSKH, q_at, k_at, slope_N)

The kernel or its interpretation is chosen by the platform that a program is lowered for, so that a
machine without GPUs can compile for them. Letters as in gpu_tiles.py; G query heads share a head
of keys.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from core.config import Unsupported
from model.attention.kernels import gpu_tiles, pallas, tiles
from model.attention.kernels.tiles import KernelParams
from model.attention.mask import Positions

SMALLEST = 16  # rows, columns and width that a product on tensor cores takes
WIDTH = 256  # bytes of a head for which the blocks below hold: wider ones have smaller blocks
MAX_TILES = 2**28  # of one list: 1 GiB


class Kernel(NamedTuple):
    """A body and the blocks that it is called with, for the dims in the names of its arguments."""

    body: Callable
    R: int
    C: int
    num_warps: int
    num_stages: int
    by_keys: bool
    results: tuple[str, ...]

    def __call__(
        self,
        how: KernelParams,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        q_at: Positions,
        k_at: Positions,
        slope_N: jax.Array | None,
        *done_BTN: jax.Array,
    ) -> tuple[jax.Array, ...]:
        """`done` is (dout, lse, delta) in a backward pass."""
        (_, T, N, H), S = q_BTNH.shape, k_BSKH.shape[1]
        wide = pl.cdiv(H * q_BTNH.dtype.itemsize, WIDTH)
        R, C = _block(T, self.R, wide), _block(S, self.C, wide)
        q_at, k_at = (
            jax.tree.map(lambda x, n=n: _pad(x, n), at) for at, n in ((q_at, R), (k_at, C))
        )
        listed = tile_lists(how.mask, q_at, k_at, R, C, self.by_keys)
        found = pallas.call(
            "cuda",
            functools.partial(self.run, how, R, C),
            *(_pad(x, n) for x, n in ((q_BTNH, R), (k_BSKH, C), (v_BSKH, C))),
            *(at.stacked(1) for at in (q_at, k_at)),
            tiles.slopes(slope_N, N),
            *listed,
            *(_pad(x_BTN, R) for x_BTN in done_BTN),
        )
        length = S if self.by_keys else T
        return tuple(x[:, :length, :, :H] if x.ndim == 4 else x[:, :length] for x in found)

    def run(
        self, how: KernelParams, R: int, C: int, *operands, interpret: bool
    ) -> tuple[jax.Array, ...]:
        q_BTNH, k_BSKH, *_ = operands
        specs = by_keys if self.by_keys else by_queries
        grid, inputs, blocks = specs(q_BTNH.shape, k_BSKH.shape, R, C)
        shapes = {"RH": q_BTNH.shape, "R": q_BTNH.shape[:3], "CH": k_BSKH.shape}
        call = pl.pallas_call(
            functools.partial(self.body, how=how, R=R, C=C),
            grid=grid,
            in_specs=[blocks[name] for name in inputs[: len(operands)]],
            out_specs=[blocks[name] for name in self.results],
            out_shape=[pallas.result(shapes[name], q_BTNH) for name in self.results],
            compiler_params=plgpu.CompilerParams(
                num_warps=self.num_warps, num_stages=self.num_stages
            ),
            interpret=interpret,
            name=f"gpu_{self.body.__name__}",
        )
        return tuple(call(*operands))


# Not measured. Compiled for compute capability 8.0 and 9.0 in bfloat16, next to nothing spills from
# registers, and two tiles in flight fit the 99 KiB of shared memory of 8.6 and 8.9 (docs/gpu.md).
FORWARD = Kernel(gpu_tiles.forward, 128, 32, 8, 3, False, ("RH", "R"))
BACKWARD_QUERIES = Kernel(gpu_tiles.backward_queries, 64, 32, 4, 3, False, ("RH",))
BACKWARD_KEYS = Kernel(gpu_tiles.backward_keys, 32, 64, 8, 3, True, ("CH", "CH"))


def by_queries(q_shape, k_shape, R: int, C: int):
    """(grid, names of the inputs, blocks by name) of a kernel that has a block of queries."""
    (B, T, N, H), (_, S, K, _) = q_shape, k_shape
    Y, Z, G = T // R, S // C, N // K

    def block(shape, place):
        # Causal rows have the longest lists at their end: these go first.
        return pl.BlockSpec(shape, lambda i, n, b: place(b, Y - 1 - i, n))

    blocks = {
        "RH": block((None, R, None, H), lambda b, y, n: (b, y, n, 0)),
        "R": block((None, R, None), lambda b, y, n: (b, y, n)),
        "SH": block((None, S, None, H), lambda b, y, n: (b, 0, n // G, 0)),
        "3R": block((None, 3, R), lambda b, y, n: (b, 0, y)),
        "3S": block((None, 3, S), lambda b, y, n: (b, 0, 0)),
        "1": block((1,), lambda b, y, n: (n,)),
        "Z": block((None, None, Z), lambda b, y, n: (b, y, 0)),
        "2": block((None, None, 2), lambda b, y, n: (b, y, 0)),
    }
    inputs = "RH", "SH", "SH", "3R", "3S", "1", "Z", "2", "RH", "R", "R"
    return (Y, N, B), inputs, blocks


def by_keys(q_shape, k_shape, R: int, C: int):
    """The same of one that has a block of keys, for all query heads that share it."""
    (B, T, N, H), (_, S, K, _) = q_shape, k_shape
    Y, Z, G = T // R, S // C, N // K

    def block(shape, place):
        return pl.BlockSpec(shape, lambda z, k, b: place(b, z, k))

    blocks = {
        "TGH": block((None, T, G, H), lambda b, z, k: (b, 0, k, 0)),
        "TG": block((None, T, G), lambda b, z, k: (b, 0, k)),
        "CH": block((None, C, None, H), lambda b, z, k: (b, z, k, 0)),
        "3T": block((None, 3, T), lambda b, z, k: (b, 0, 0)),
        "3C": block((None, 3, C), lambda b, z, k: (b, 0, z)),
        "G": block((G,), lambda b, z, k: (k,)),
        "Y": block((None, None, Y), lambda b, z, k: (b, z, 0)),
        "2": block((None, None, 2), lambda b, z, k: (b, z, 0)),
    }
    inputs = "TGH", "CH", "CH", "3T", "3C", "G", "Y", "2", "TGH", "TG", "TG"
    return (Z, K, B), inputs, blocks


def tile_lists(
    mask, q_at: Positions, k_at: Positions, R: int, C: int, by_keys: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the key blocks of each query block, int32 [B, Y, Z]: first those seen whole.

    And how many those are, and how many count at all: [B, Y, 2]. Turned for lists by keys.
    """
    seen_BYZ, whole_BYZ = tiles.met(mask, tiles.cut(q_at, R), tiles.cut(k_at, C))
    if by_keys:
        seen_BYZ, whole_BYZ = seen_BYZ.swapaxes(1, 2), whole_BYZ.swapaxes(1, 2)
    Z = seen_BYZ.shape[2]
    if seen_BYZ.size > MAX_TILES:
        raise Unsupported(
            "attention_kernel='gpu' with so many tokens on one device: its list of tiles would "
            f"have {seen_BYZ.size} entries, more than {MAX_TILES}. Cut the length over more "
            "devices (mesh.seq), or the rows (mesh.data, train.accumulation), or use "
            "attention_kernel='chunked'"
        )
    rank_BYZ = 2 - seen_BYZ.astype(jnp.int32) - whole_BYZ
    tiles_BYZ = jnp.sort(rank_BYZ * Z + jnp.arange(Z)[None, None], axis=2) % Z
    return tiles_BYZ, jnp.stack((whole_BYZ.sum(2), seen_BYZ.sum(2)), axis=2)


def _block(length: int, limit: int, wide: int) -> int:
    return min(limit, max(SMALLEST, min(limit // wide, pl.next_power_of_2(length))))


def _pad(x_BTNH: jax.Array, block: int) -> jax.Array:
    """Zeros to whole blocks, hence of segment 0, and of heads to a power of two."""
    _, T, *rest = x_BTNH.shape
    short = [0, -T % block, 0, 0][: x_BTNH.ndim]
    if len(rest) == 2:
        short[3] = max(SMALLEST, pl.next_power_of_2(rest[1])) - rest[1]
    return jnp.pad(x_BTNH, [(0, n) for n in short])
