"""splash through the compiler of TPUs that are not there: every kind, width and strategy."""

import jax
import jax.numpy as jnp
import pytest
from conftest import tpu_kernels

from core.compile.aot import slice_devices
from core.sharding import MeshConfig, make_mesh, training
from model.attention import attend
from model.attention.mask import Positions
from model.attention.spec import (
    Heads,
    bidirectional,
    block_sparse,
    chunked,
    dilated,
    full,
    prefix,
    sliding,
)

pytestmark = pytest.mark.usefixtures("compile_only")


def kernels(topology, spec, T, H=128, dtype="bfloat16", mesh=(1, 1, 1), strategy="auto"):
    """Names of the kernels in the program of forward and backward, 8 query heads and 2 of keys."""
    size = mesh[0] * mesh[1] * mesh[2]
    config = MeshConfig(data=mesh[0], seq=mesh[1], model=mesh[2])
    with jax.set_mesh(make_mesh(config, slice_devices(topology)[:size])):
        rules = training(strategy)

        def shaped(shape, dtype, *names):
            place = jax.NamedSharding(jax.sharding.get_mesh(), rules(*names))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        q = shaped((2, T, 8, H), dtype, "batch", "length", "act_heads", None)
        k = shaped((2, T, 2, H), dtype, "batch", "length", "act_kv_heads", None)
        at = Positions(*[shaped((2, T), jnp.int32, "batch", "length")] * 2)
        slope = shaped((8,), jnp.float32, "act_heads") if spec.alibi else None

        def run(q, k, v, dout, at, heads):
            def out(q, k, v):
                return attend.attend(q, k, v, at, spec, kernel="splash", rules=rules, heads=heads)

            result, pull = jax.vjp(out, q, k, v)
            return result, pull(dout)

        traced = jax.jit(run).trace(q, k, k, q, at, Heads(None, slope))
        return tpu_kernels(traced, "splash")


BOTH = ["splash_backward", "splash_forward"]


@pytest.mark.parametrize(
    "topology",
    ["v6e:1x1", *(pytest.param(t, marks=pytest.mark.slow) for t in ("v5e:1x1", "v5p:1x1x1"))],
)
def test_each_chip_has_a_program(topology):
    assert kernels(topology, full(), 1024) == BOTH


@pytest.mark.parametrize(
    "topology",
    ["v5e:2x2", *(pytest.param(t, marks=pytest.mark.slow) for t in ("v5p:2x2x1", "v6e:2x2"))],
)
def test_a_ring_of_each_chip(topology):
    """The first hop, those between and the last are kernels; none is interpreted."""
    found = kernels(topology, sliding(700), 1024, mesh=(1, 4, 1), strategy="ring")
    assert found == sorted(BOTH * 3)


@pytest.mark.parametrize(
    "spec",
    [
        full(softcap=30.0),
        full(alibi=1.0),
        bidirectional(),
        sliding(100, sinks=5, alibi=1.0),
        chunked(100),
        dilated(30, 3),
        block_sparse(96, 2, stride=3, sinks=4),
        prefix(100),
    ],
    ids=lambda spec: spec.kind,
)
def test_each_kind_compiles(spec):
    assert kernels("v5e:1x1", spec, 200, H=64) == BOTH


@pytest.mark.parametrize(
    ("H", "dtype"), [(64, "float32"), (80, "bfloat16"), (8, "bfloat16"), (256, "bfloat16")]
)
def test_each_width_compiles(H, dtype):
    assert kernels("v5e:1x1", full(), 200, H, dtype) == BOTH


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:1x1x1", "v5e:1x1"])
@pytest.mark.parametrize(("H", "dtype"), [(128, "bfloat16"), (128, "float32"), (256, "float32")])
@pytest.mark.parametrize("spec", [full(softcap=30.0), block_sparse(2048, 2, 3, alibi=1.0)])
def test_the_largest_blocks_fit_the_vector_memory(topology, H, dtype, spec):
    """A v4 has 16 MiB, and others leave as much to a kernel, a v6e more."""
    assert set(kernels(topology, spec, 16384, H, dtype)) == set(BOTH)
