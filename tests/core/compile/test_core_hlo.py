"""core.compile.hlo against programs whose FLOPs and collectives are known, compiled for the CPU."""

import jax
import jax.numpy as jnp
import pytest
from conftest import make_mesh
from jax.sharding import PartitionSpec

from core.compile import hlo
from core.compile.hlo_text import parse

M, K, LAYERS = 64, 32, 5
PRODUCT = 2 * M * K * K


def counted(function, *shapes, scope="nowhere"):
    arguments = [jax.ShapeDtypeStruct(*s) if isinstance(s, tuple) else s for s in shapes]
    return hlo.count(jax.jit(function).lower(*arguments).compile().as_text(), scope)


def layers(x_MK, w_LKK):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_MK, w_LKK)[0]


X, W = ((M, K), jnp.float32), ((LAYERS, K, K), jnp.float32)


def test_a_scan_counts_as_often_as_it_runs():
    program = counted(layers, X, W)
    assert program.flops == LAYERS * PRODUCT
    assert program.loop_flops == program.scope_flops == 0
    compiled = jax.jit(layers).lower(*(jax.ShapeDtypeStruct(*s) for s in (X, W))).compile()
    assert compiled.cost_analysis()["flops"] < 2 * PRODUCT, (
        "XLA counts it now: drop core.compile.hlo"
    )


def test_loops_that_data_decides_are_counted_apart_one_trip_each():
    def until(x_MK, w_LKK, trips):
        x_MK = x_MK @ w_LKK[0]
        return jax.lax.fori_loop(0, trips, lambda _, x: jnp.tanh(x @ w_LKK[1]), x_MK)

    program = counted(until, X, W, ((), jnp.int32))
    assert (program.flops, program.loop_flops) == (PRODUCT, PRODUCT)


def test_products_in_the_scope_are_counted_apart():
    def scoped(x_MK, w_LKK):
        with jax.named_scope("kernel"):
            x_MK = layers(x_MK, w_LKK)
        return x_MK @ w_LKK[0]

    program = counted(scoped, X, W, scope="/kernel/")
    assert (program.flops, program.scope_flops) == (PRODUCT, LAYERS * PRODUCT)


def test_traffic_of_a_scan_reads_each_layer_once():
    """At least weights and activations; far less than the whole stack in every trip."""
    program = counted(layers, ((1, 256), jnp.float32), ((16, 256, 256), jnp.float32))
    weights = 16 * 256 * 256 * 4
    assert weights <= program.bytes < 4 * weights


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "collective-permute"])
def test_collectives_in_a_scan(kind):
    def body(x_MK, _):
        if kind == "all-gather":
            full = jax.lax.all_gather(x_MK, "data", axis=0, tiled=True)
            return jnp.tanh(full[:M] + full[-M:]), None
        if kind == "all-reduce":
            return jnp.tanh(jax.lax.pcast(jax.lax.psum(x_MK, "data"), "data", to="varying")), None
        return jnp.tanh(jax.lax.ppermute(x_MK, "data", [(i, (i + 1) % 4) for i in range(4)])), None

    with jax.set_mesh(make_mesh((4, 1, 1))):
        rows = PartitionSpec("data")
        run = jax.shard_map(
            lambda x: jax.lax.scan(body, x, None, length=3)[0], in_specs=rows, out_specs=rows
        )
        x_MK = jax.ShapeDtypeStruct(
            (4 * M, K), jnp.float32, sharding=jax.NamedSharding(jax.sharding.get_mesh(), rows)
        )
        program = counted(run, x_MK)
    (found,) = program.collectives
    larger = M * K * 4 * (4 if kind == "all-gather" else 1)
    assert (found.kind, found.count, found.bytes) == (kind, 3, 3 * larger)


LINE = """\
ENTRY %main (a: bf16[2,512,8]) -> f32[2,512,16] {
  %a = bf16[2,512,8]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[2,8,16]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = (f32[2,512,16]{2,1,0}, pred[], s4[3]{0}) convolution(%a, /*index=1*/%b), \
window={size=2 stride=1 pad=0_0 lhs_dilate=2}, dim_labels=0bf_0io->0bf, metadata={op_name="x/y"}
}
"""


def test_text_of_shapes_tuples_and_memory_spaces():
    entry, computations = parse(f"HloModule m\n\n{LINE}")
    a, b, c = computations[entry].values()
    assert (a.shapes[0].dims, a.shapes[0].bytes, a.shapes[0].in_hbm) == ((2, 512, 8), 16384, False)
    assert b.shapes[0].in_hbm and c.root and c.operands == ("a", "b")
    assert [shape.bytes for shape in c.shapes] == [65536, 1, 2]
    assert c.window() == {"pad": [0], "stride": [1], "lhs_dilate": [2], "rhs_dilate": [1]}


def test_a_window_over_batch_dims_counts_each_batch_once():
    """What TPUs make of a batched product: [2, 512, 8] x [2, 8, 16]; a hole is no product."""
    assert hlo.count(f"HloModule m\n\n{LINE}", "nowhere").flops == 2 * 2 * 512 * 8 * 16


def test_a_kernel_counts_as_it_says():
    """With the loops, whose trips are not known either; its operands are in its estimate."""
    call = 'custom-call(%a, %b), custom_call_target="tpu_custom_call", backend_config={'
    call += '"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"640","x":"7",'
    call += '"bytes_accessed":"96"}}}\n}\n'
    text = LINE[: LINE.index("convolution")] + call
    program = hlo.count(f"HloModule m\n\n{text}", "nowhere")
    assert (program.loop_flops, program.loop_bytes) == (640, 96)
    assert (program.flops, program.bytes) == (0, 0)


def test_a_prefetch_of_a_slice_reads_the_slice():
    """As TPUs write it: an eighth of 32 MiB to their vector memory."""
    text = "HloModule m\n\nENTRY %main (p: s8[33554432]) -> s8[4194304] {\n"
    text += "  %p = s8[33554432]{0} parameter(0)\n"
    text += "  %s = ((s8[33554432]{0}), s8[4194304]{0:S(1)}, s32[]{:S(2)}) slice-start(%p), "
    text += "slice={[0:4194304]}\n  ROOT %d = s8[4194304]{0:S(1)} slice-done(%s)\n}\n"
    assert hlo.count(text, "nowhere").bytes == 4194304


def test_a_scatter_in_place_writes_what_is_new():
    text = """HloModule m

%write (x: f32[1000,8], at: s32[2,1], new: f32[2,8]) -> f32[1000,8] {
  %x = f32[1000,8]{1,0} parameter(0)
  %at = s32[2,1]{1,0} parameter(1)
  %new = f32[2,8]{1,0} parameter(2)
  ROOT %scatter = f32[1000,8]{1,0} scatter(%x, %at, %new), update_window_dims={1}, to_apply=%add
}

ENTRY %main (x: f32[1000,8], at: s32[2,1], new: f32[2,8]) -> f32[1000,8] {
  %x = f32[1000,8]{1,0} parameter(0)
  %at = s32[2,1]{1,0} parameter(1)
  %new = f32[2,8]{1,0} parameter(2)
  ROOT %fusion = f32[1000,8]{1,0} fusion(%x, %at, %new), kind=kCustom, calls=%write
}
"""
    assert hlo.count(text, "nowhere").bytes == 8 + 64 + 64  # places, what is read, what is written
