"""The calls of the kernels of picked_kernel.py: sizes, grid, blocks and memory.

    call = Call.of(pair, G=4, tile=128, block=64, alibi=False)
    out_YRH, lse_Y1R = call(picked_kernel.forward, place_2, steps, {"q_RH": q_YRH, ...})

Letters as in picked_tpu.py and picked_kernel.py. Keys stand in groups of A, so that a copy may
begin at any group: the last two dims of an array in HBM can be cut only where its tiles are.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from core.config import Unsupported
from model.attention.block_topk import picked_kernel
from model.attention.block_topk.picked_kernel import GatheredParams
from model.attention.block_topk.picked_steps import TileSchedule
from model.attention.blocks import MaskedKernel
from model.attention.kernels import pallas

LANES, SUBLANES = 128, 8  # of a TPU register
ALIGN = 16  # rows of a tile of bfloat16 in memory; of float32 two tiles
# Not measured: scores of 512 keys x 512 rows are 1 MiB, and the backward pass holds about four.
KEYS = 512
MEMORY = 16 * 2**20  # of vector memory, where no more is asked for
MOST_MEMORY = 96 * 2**20
RESULTS = {"forward": ("out_RH", "lse_1R"), "backward": ("dq_RH", "dk", "dv")}


def groups(x_BKSH: jax.Array) -> jax.Array:
    """[B, K, groups, A, H]."""
    B, K, _, H = x_BKSH.shape
    return x_BKSH.reshape(B, K, -1, ALIGN, H)


def positions(x_BS: jax.Array) -> jax.Array:
    """[B, groups, 8, E]: as rows of registers, all alike."""
    x_BJ1E = x_BS.reshape(len(x_BS), -1, 1, LANES)
    return jnp.broadcast_to(x_BJ1E, (*x_BJ1E.shape[:2], SUBLANES, LANES))


class GatheredCall(NamedTuple):
    """A pallas_call; its grid is as long as the list of steps."""

    how: GatheredParams
    R: int
    Z: int  # groups of a block and what is around it

    @staticmethod
    def of(pair: MaskedKernel, G: int, tile: int, block: int, *, alibi: bool) -> "GatheredCall":
        """Builds the call for tiles of `tile` pairs."""
        parts = pl.cdiv(block, KEYS)
        around = pl.cdiv(block + ALIGN - 1, ALIGN)
        how = GatheredParams(pair.scale, pair.softcap, alibi, G, tile, parts)
        return GatheredCall(how, pl.cdiv(tile * G, LANES) * LANES, pl.cdiv(around, parts) * parts)

    @property
    def J(self) -> int:
        """Groups of positions around a block."""
        return pl.cdiv(self.Z * ALIGN + LANES - ALIGN, LANES)

    def padding(self, S: int) -> int:
        """Keys behind the others: a block that begins with the last key can be fetched."""
        return -S % LANES + self.J * LANES

    def __call__(
        self,
        body: Callable,
        place_2: jax.Array,
        steps: TileSchedule,
        arrays: dict[str, jax.Array],
        totals: Sequence[jax.Array] = (),
    ) -> tuple[jax.Array, ...]:
        """Names of `arrays` end in the block that the body sees; `totals` are added to in place.

        `place_2` is the row and the kv head.
        """
        Y, _, H = arrays["q_RH"].shape
        shapes = {"RH": (Y, self.R, H), "1R": (Y, 1, self.R)}
        names = RESULTS[body.__name__]
        scalars = place_2, *steps[1:]
        scratch = self.scratch(body, H)

        def run(count, *operands, interpret):
            blocks = self.blocks(H)
            in_blocks = [blocks[name.split("_")[-1]] for name in arrays]
            whole = [pl.BlockSpec(memory_space=pl.ANY)] * len(totals)
            results = [name.split("_")[-1] for name in names[: len(names) - len(totals)]]
            first = len(scalars) + len(arrays)
            call = pl.pallas_call(
                self.kernel(body, arrays, scratch, len(totals)),
                grid_spec=pltpu.PrefetchScalarGridSpec(
                    num_scalar_prefetch=len(scalars),
                    grid=(count,),
                    in_specs=in_blocks + whole,
                    out_specs=[blocks[name] for name in results] + whole,
                    scratch_shapes=list(scratch.values()),
                ),
                out_shape=[
                    pallas.result(shape, operands[0])
                    for shape in [*(shapes[name] for name in results), *(x.shape for x in totals)]
                ],
                input_output_aliases={first + i: len(results) + i for i in range(len(totals))},
                compiler_params=pltpu.CompilerParams(
                    dimension_semantics=("arbitrary",), vmem_limit_bytes=self.memory(body, arrays)
                ),
                cost_estimate=self.cost(body, arrays),
                interpret=interpret,
                name=f"picked_{body.__name__}",
            )
            return tuple(call(*operands))

        return pallas.call("tpu", run, steps.count, *scalars, *arrays.values(), *totals)

    def kernel(self, body: Callable, arrays, scratch, num_totals: int) -> Callable:
        """`body` with its references by name."""
        names = ["place", "begin_W", "low_W", "high_W", *arrays]
        names += [f"total{i}" for i in range(num_totals)]  # those among the results are the same
        names += [*RESULTS[body.__name__], *scratch]

        def kernel(*refs):
            body(self.how, SimpleNamespace(**dict(zip(names, refs, strict=True))))

        return kernel

    def scratch(self, body: Callable, H: int) -> dict:
        sums = {
            "k_at_S8": pltpu.VMEM((self.J * LANES, SUBLANES), jnp.int32),
            "sum_HR": pltpu.VMEM((H, self.R), jnp.float32),
        }
        if body is picked_kernel.forward:
            row = pltpu.VMEM((1, self.R), jnp.float32)
            return sums | {"high_1R": row, "total_1R": row}
        keys = pltpu.VMEM((self.Z, ALIGN, H), jnp.float32)
        return sums | {"dk_ZAH": keys, "dv_ZAH": keys, "sent": pltpu.SemaphoreType.DMA((2,))}

    def blocks(self, H: int) -> dict[str, pl.BlockSpec]:
        """Blocks by their dims: of which shape, and where."""

        def tile(w, place, begin_W, low_W, high_W):
            return jax.lax.div(begin_W[w], self.how.pairs), 0, 0

        def keys(w, place, begin_W, low_W, high_W):
            return place[0], place[1], jax.lax.div(low_W[w], ALIGN), 0, 0

        def positions(w, place, begin_W, low_W, high_W):
            return place[0], jax.lax.div(low_W[w], LANES), 0, 0

        def around(*shape):  # from any group on
            return map(pl.Element, shape)

        one = pl.Squeezed()
        return {
            "RH": pl.BlockSpec((None, self.R, H), tile),
            "1R": pl.BlockSpec((None, 1, self.R), tile),
            "ZAH": pl.BlockSpec((one, one, *around(self.Z, ALIGN, H)), keys),
            "J8E": pl.BlockSpec((one, *around(self.J, SUBLANES, LANES)), positions),
        }

    def memory(self, body: Callable, arrays: dict[str, jax.Array]) -> int:
        """Vector memory to ask for, generously: what comes and goes is there twice."""
        H, itemsize = arrays["q_RH"].shape[2], arrays["q_RH"].dtype.itemsize
        H = max(H, LANES)
        keys, C = self.Z * ALIGN * H, self.Z // self.how.parts * ALIGN
        is_backward = body is picked_kernel.backward
        scores = (4 + 2 * is_backward) * 4 * max(C, LANES) * self.R
        tiles = 4 * self.R * H * (itemsize * (1 + is_backward) + 4)
        positions = 4 * self.J * LANES * (LANES + 2 * SUBLANES)
        needed = keys * (4 * itemsize + 8 * is_backward) + tiles + scores + positions
        if needed > MOST_MEMORY:
            raise Unsupported(
                f"blocks of {self.Z * ALIGN} keys and {H} dims would take {needed} bytes "
                f"of a TPU's vector memory, and {MOST_MEMORY} are there: choose a smaller block, "
                "or use attention_kernel='chunked'"
            )
        return max(MEMORY, needed)

    def cost(self, body: Callable, arrays: dict[str, jax.Array]) -> pl.CostEstimate:
        """Estimates the cost as if every pair had a whole block, and each tile met one block."""
        Y, R, H = arrays["q_RH"].shape
        keys = self.Z * ALIGN
        moved = {"RH": R * H, "1R": R, "ZAH": keys * H, "J8E": keys * SUBLANES}
        moved |= dict.fromkeys(("dk", "dv"), 2 * keys * H)
        sizes = [(name.split("_")[-1], x.dtype.itemsize) for name, x in arrays.items()]
        sizes += [(name.split("_")[-1], 4) for name in RESULTS[body.__name__]]
        return pl.CostEstimate(
            flops=2 * picked_kernel.PRODUCTS[body.__name__] * Y * R * keys * H,
            transcendentals=Y * R * keys,
            bytes_accessed=Y * sum(size * moved[dims] for dims, size in sizes),
        )
