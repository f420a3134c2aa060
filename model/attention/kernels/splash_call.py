"""The calls of the kernels of splash_tiles.py: their grid, their blocks, their list of tiles.

    call = Call(How(mask, scale, 0.0, False), N=8, K=2, H=128, R=1024, C=512)
    out_BNHT, lse_BN1T = call(forward, slope_N, {"q_RH": q_BNTH, ...}, q_at, k_at, ("HR", "1R"))

Letters as in splash.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.attention.kernels import pallas, splash_tiles, tiles
from model.attention.kernels.tiles import KernelParams
from model.attention.mask import FAR, Mask, Positions

SUBLANES = 8  # of a TPU register: positions and segments stand in so many rows


class SplashCall(NamedTuple):
    """A pallas_call: its grid is (rows, kv heads, query heads of each, entries of the list)."""

    how: KernelParams
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
    ) -> tuple[jax.Array, ...]:
        """`arrays` by their names in the body, which end in the block seen; so do `results`."""
        tiles_BW, count = tile_list(self.how.mask, q_at_B8T, k_at_B8S, self.R, self.C)
        (B, W), S, T = tiles_BW.shape, k_at_B8S.shape[2], q_at_B8T.shape[2]
        arrays = {**arrays, "q_at_8R": q_at_B8T, "k_at_8C": k_at_B8S}
        shapes = {
            "HR": (B, self.N, self.H, T),
            "1R": (B, self.N, 1, T),
            "ZCH": (B, self.K, S // self.C, self.C, self.H),
        }
        blocks_of = self.blocks(S // self.C, W)
        num_rows = splash_tiles.SCRATCH[body.__name__]

        def kernel(tiles_W, slope_N, *refs):
            inputs = dict(zip(arrays, refs, strict=False))
            rest = refs[len(arrays) :]
            body(tiles_W, slope_N, *rest, **inputs, how=self.how, num_tiles=W)

        def run(count, *operands, interpret):
            call = pl.pallas_call(
                kernel,
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=2,
                    grid=(B, self.K, self.N // self.K, count),
                    in_specs=[blocks_of[name.split("_")[-1]] for name in arrays],
                    out_specs=[blocks_of[name] for name in results],
                    scratch_shapes=[pltpu.VMEM((1, self.R), jnp.float32)] * num_rows,
                ),
                out_shape=[pallas.result(shapes[name], operands[0]) for name in results],
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
                ),
                cost_estimate=self.cost(body, arrays, results, B, T, S),
                interpret=interpret,
                name=f"splash_{body.__name__}",
            )
            return tuple(call(*operands))

        return pallas.call("tpu", run, count, tiles_BW.reshape(-1), slope_N, *arrays.values())

    def cost(self, body, arrays, results, B: int, T: int, S: int) -> pl.CostEstimate:
        """Estimates the cost as if every tile were visited; core/compile/hlo.py reads it."""
        Y, Z = T // self.R, S // self.C
        sizes = {"R": self.R, "C": self.C, "H": self.H, "8": SUBLANES, "1": 1}
        blocks = [(name.split("_")[-1], x.dtype.itemsize) for name, x in arrays.items()]
        moved = 0
        for dims, itemsize in blocks + [(name, 4) for name in results]:
            # Blocks of keys change with each tile, those of queries after the last key block.
            times = B * self.K if "Z" in dims else B * self.N * Y * (Z if "C" in dims else 1)
            moved += times * itemsize * math.prod(sizes.get(dim, Z) for dim in dims)
        pairs = B * self.N * T * S
        return pl.CostEstimate(
            flops=2 * splash_tiles.PRODUCTS[body.__name__] * pairs * self.H,
            transcendentals=pairs,
            bytes_accessed=moved,
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
    q_at, k_at = (Positions(*(at_B8[:, i] for i in range(3))) for at_B8 in (q_at_B8T, k_at_B8S))
    seen_BYZ, whole_BYZ = tiles.met(mask, tiles.cut(q_at, R), tiles.cut(k_at, C))
    B, Y, Z = seen_BYZ.shape
    y_1Y1, z_11Z = jnp.arange(Y)[None, :, None], jnp.arange(Z)[None, None]
    visits_BYZ = seen_BYZ | (~seen_BYZ.any(2, keepdims=True) & (z_11Z == 0))
    flags_BYZ = jnp.where(whole_BYZ, splash_tiles.WHOLE, splash_tiles.PARTIAL)
    first_BY1 = visits_BYZ.argmax(2, keepdims=True)
    last_BY1 = Z - 1 - visits_BYZ[:, :, ::-1].argmax(2, keepdims=True)
    flags_BYZ += (z_11Z == first_BY1) * splash_tiles.FIRST + (z_11Z == last_BY1) * splash_tiles.LAST
    place_1YZ = splash_tiles.entry(y_1Y1, z_11Z, 0)
    tiles_BYZ = jnp.where(visits_BYZ, place_1YZ + flags_BYZ, FAR)
    end_B1 = jnp.where(visits_BYZ, place_1YZ, 0).max((1, 2))[:, None]
    tiles_BW = jnp.sort(tiles_BYZ.reshape(B, Y * Z), axis=1)
    tiles_BW = jnp.where(tiles_BW == FAR, end_B1, tiles_BW)
    return tiles_BW, visits_BYZ.sum((1, 2)).max()
