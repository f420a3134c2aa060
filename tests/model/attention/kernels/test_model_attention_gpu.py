"""What is of the kernel for GPUs alone: its lists of tiles, its programs for CUDA, its limits."""

import logging

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import documents
from jax.sharding import AbstractDevice

from core import sharding
from model.attention import attend, blocks
from model.attention.blocks import MaskedKernel
from model.attention.kernels import gpu, gpu_call
from model.attention.kernels import table as kernels
from model.attention.mask import Bidirectional, BlockSparse, Chunk, Full, Positions, Prefix, Window
from model.attention.spec import Heads, sliding

MASKS = (
    Full(),
    Bidirectional(),
    Window(17, sinks=6),
    Bidirectional(9),
    Chunk(9),
    BlockSparse(3, 2, 3, sinks=4),
    Prefix(11),
)


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_lists_hold_what_the_mask_allows(mask, by_keys):
    """Each pair that counts is in a tile of the list, and no mask is left out where it rules."""
    R, C, wholes = 4, 2, 0
    listed = jax.jit(gpu_call.tile_lists, static_argnums=(0, 3, 4, 5))
    for layout in ("one", "packed", "padded", "shuffled", "zigzag"):
        tokens = attention_cases.LAYOUTS[layout]()
        at = Positions(tokens.q_positions, tokens.q_segments)
        q_at, k_at = (x[:, :, None] for x in at[:2]), (x[:, None, :] for x in at[:2])
        allowed = np.asarray(mask.pairs(Positions(*q_at), Positions(*k_at)))
        allowed = allowed.reshape(len(allowed), attention_cases.T // R, R, -1, C).swapaxes(2, 3)
        tiles_BYZ, counts_BY2 = (np.asarray(x) for x in listed(mask, at, at, R, C, by_keys))
        if by_keys:
            allowed = allowed.swapaxes(1, 2)
        for row, y in np.ndindex(*counts_BY2.shape[:2]):
            whole, every = counts_BY2[row, y]
            found = tiles_BYZ[row, y]
            assert sorted(found) == list(range(len(found))), "no tile twice"
            assert allowed[row, y, found[:whole]].all()
            assert not allowed[row, y, found[every:]].any()
            wholes += whole
    assert wholes or 0 < mask.extent < 7, "tiles where no mask is needed exist"


def test_the_lists_grow_with_what_is_seen():
    """Causal rows visit half of the tiles, and need the mask on the diagonal alone."""
    num_blocks, block = 32, 16
    at = Positions(*map(jnp.asarray, documents((num_blocks * block,), length=num_blocks * block)))
    for by_keys in (False, True):
        _, counts_BY2 = gpu_call.tile_lists(Full(), at, at, block, block, by_keys)
        assert counts_BY2[0, :, 1].sum() == num_blocks * (num_blocks + 1) / 2
        assert (counts_BY2[0, :, 1] - counts_BY2[0, :, 0] == 1).all()
        _, counts_BY2 = gpu_call.tile_lists(Window(2 * block), at, at, block, block, by_keys)
        assert counts_BY2[..., 1].sum() == 3 * num_blocks - 3


def mesh_of_gpus(seq: int = 1):
    """In use: a mesh of GPUs that are not there; newer versions of JAX ask it which they are."""
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    explicit = (jax.sharding.AxisType.Explicit,) * len(sharding.AXES)
    mesh = jax.sharding.AbstractMesh((1, seq, 1), sharding.AXES, explicit, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def both(pair: MaskedKernel, q, k, v, dout, at, heads):
    out, lse = pair.forward(q, k, v, heads, at, at)
    return out, lse, *pair.backward(q, k, v, heads, at, at, dout, lse, blocks.delta(out, dout))


def program(mask, H, dtype, alibi=False, softcap=0.0, T=200):
    """Of forward and backward for CUDA, as text; no GPU is needed to write it."""
    q, k = (jax.ShapeDtypeStruct((2, T, n, H), dtype) for n in (8, 2))
    at = Positions(*[jax.ShapeDtypeStruct((2, T), jnp.int32)] * 2)
    heads = Heads(None, jax.ShapeDtypeStruct((8,), jnp.float32) if alibi else None)
    run = jax.jit(both, static_argnums=0)
    with mesh_of_gpus():
        traced = run.trace(MaskedKernel(gpu, mask, 0.1, softcap), q, k, k, q, at, heads)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("H", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (64, "float32")])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_each_kind_is_a_program_for_cuda(mask, H, dtype):
    """Three kernels for Triton, and outside of them neither a product nor a loop."""
    check(program(mask, H, dtype))


@pytest.mark.parametrize(
    "how",
    [
        dict(H=128, dtype="float32"),
        dict(H=80, dtype="bfloat16"),
        dict(H=256, dtype="bfloat16"),
        dict(H=8, dtype="float16", T=5),
        dict(H=64, dtype="bfloat16", softcap=30.0),
        dict(H=64, dtype="bfloat16", alibi=True),
    ],
    ids=str,
)
def test_each_width_is_a_program_for_cuda(how):
    check(program(Full(), **how))


def check(text: str, times: int = 1, loops: bool = False) -> None:
    names = [f"gpu_{body}" for body in ("forward", "backward_queries", "backward_keys")]
    assert text.count("__gpu$xla.gpu.triton") == 3 * times
    assert all(text.count(f'name = "{name}"') == times for name in names)
    for operation in ("dot_general", "tanh") if loops else ("dot_general", "tanh", "while"):
        assert f"stablehlo.{operation}" not in text


def test_a_ring_is_a_program_for_cuda():
    """Every hop is kernels, none is interpreted; the first and the last are one function."""
    with mesh_of_gpus(seq=4):
        rules = sharding.training("ring")

        def shaped(shape, dtype, *names):
            place = jax.NamedSharding(jax.sharding.get_abstract_mesh(), rules(*names))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        names = "batch", "length", "act_heads", None
        q, k = (shaped((1, 512, n, 64), jnp.bfloat16, *names) for n in (8, 2))
        at = Positions(*[shaped((1, 512), jnp.int32, "batch", "length")] * 2)

        @jax.jit
        def run(q, k, v, dout, at):
            def out(q, k, v):
                return attend.attend(q, k, v, at, sliding(70), kernel="gpu", rules=rules)

            result, pull = jax.vjp(out, q, k, v)
            return result, pull(dout)

        text = run.trace(q, k, k, q, at).lower(lowering_platforms=("cuda",)).as_text()
    check(text, times=2, loops=True)


def test_a_list_too_long_is_refused(monkeypatch):
    """Two rows of 2 x 7 tiles; no other test has this length, whose program JAX would keep."""
    monkeypatch.setattr(gpu_call, "MAX_TILES", 27)
    with pytest.raises(NotImplementedError, match=r"(?s)'gpu'.*28 entries.*mesh.seq.*'chunked'"):
        program(Full(), 64, "bfloat16", T=199)


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("NVIDIA A100-SXM4-80GB", "gpu"),
        ("NVIDIA H100 80GB HBM3", "gpu"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "gpu"),
        ("Tesla V100-SXM2-16GB", "chunked"),
        ("AMD Instinct MI300X", "chunked"),
        ("TPU v5 lite", "splash"),
        ("cpu", "chunked"),
    ],
)
def test_what_auto_means(kind, kernel, monkeypatch, caplog):
    kernels.log_once.cache_clear()
    monkeypatch.setattr(kernels, "device_kind", lambda: kind)
    with caplog.at_level(logging.INFO, "cakrawala"):
        assert kernels.kernel_of("auto", 4096) is kernels.KERNELS[kernel]
    assert f"attention_kernel=auto: {kernel} for {kind}" in caplog.text
