"""The kernels for chosen blocks through the compiler of TPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest
from conftest import tpu_kernels

from core.compile.aot import slice_devices
from core.sharding import MeshConfig, make_mesh
from model.attention.block_topk.pairs import RoutingPairs
from model.attention.block_topk.picked_tpu import GatheredBlocksTpu
from model.attention.blocks import MaskedKernel
from model.attention.kernels import reference
from model.attention.mask import Full, Positions
from model.attention.spec import Heads

pytestmark = pytest.mark.usefixtures("compile_only")

# NSA: a group of 4 heads chooses, of one kv head. MoBA: each of 4 heads, of 2 kv heads.
NSA = dict(M=1, K=1, block=64, softcap=2.0)
MOBA = dict(M=4, K=2, block=512, alibi=True)


def kernels(topology, M, K, block, softcap=0.0, alibi=False, T=256, H=128, dtype="bfloat16"):
    """Names of the kernels in the program of forward and backward, of 4 query heads."""
    picked = GatheredBlocksTpu(MaskedKernel(reference, Full(), H**-0.5, softcap), block, length=T)

    def both(q, k, v, heads, at, *done):
        args = q, k, v, heads._replace(chosen=RoutingPairs.of(heads.chosen, at)), at, at
        return picked.forward(*args), picked.backward(*args, *done)

    with jax.set_mesh(make_mesh(MeshConfig(), slice_devices(topology)[:1])):

        def shaped(shape, dtype):
            place = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        q, k = (shaped((1, T, n, H), dtype) for n in (4, K))
        slope = shaped((4,), jnp.float32) if alibi else None
        heads = Heads(slope_N=slope, chosen=shaped((1, T, M, 3), jnp.int32))
        at = Positions(*[shaped((1, T), jnp.int32)] * 2)
        lse = shaped((1, T, 4), jnp.float32)
        run = jax.shard_map(both, in_specs=jax.P(), out_specs=jax.P())
        traced = jax.jit(run).trace(q, k, k, heads, at, q, lse, lse)
        return tpu_kernels(traced, "picked")


BOTH = ["picked_backward", "picked_forward"]


@pytest.mark.parametrize(
    "topology",
    ["v5e:1x1", *(pytest.param(x, marks=pytest.mark.slow) for x in ("v5p:1x1x1", "v6e:1x1"))],
)
def test_each_chip_has_a_program(topology):
    assert kernels(topology, **NSA) == BOTH


@pytest.mark.parametrize(
    "topology",
    ["v5e:1x1", *(pytest.param(t, marks=pytest.mark.slow) for t in ("v5p:1x1x1", "v6e:1x1"))],
)
def test_moba_on_each_chip(topology):
    assert kernels(topology, **MOBA) == BOTH


@pytest.mark.slow
@pytest.mark.parametrize(
    ("H", "dtype"), [(64, "float32"), (80, "bfloat16"), (8, "bfloat16"), (256, "bfloat16")]
)
def test_each_width_compiles(H, dtype):
    assert kernels("v5e:1x1", **NSA, H=H, dtype=dtype) == BOTH


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "dtype"),
    [("v4:1x1x1", "bfloat16"), ("v5e:1x1", "bfloat16"), ("v5e:1x1", "float32")],
)
def test_the_blocks_of_the_paper_fit_the_vector_memory(topology, dtype):
    """4096 tokens (MoBA); a v4 has 16 MiB, too few for float32."""
    assert kernels(topology, 4, 2, 4096, T=8192, dtype=dtype) == BOTH
