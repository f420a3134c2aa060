"""The attention kernels for GPUs through Triton's own compiler and ptxas, without a GPU.

    pip install triton && python -m bench.gpu_compile

The modules are taken out of the program for CUDA that JAX writes; XLA, which compiles them on a
machine with a GPU, has a Triton of its own, so figures may differ there. A Markdown table of the
registers of a thread, the bytes it spills, and the shared memory of a block (docs/gpu.md).
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import triton
from jax._src.lib.mlir import ir
from jax._src.pallas.triton import lowering  # alone knows the dialects to read a module with
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

from core.command import cli
from model.attention import blocks
from model.attention.kernels import gpu
from model.attention.mask import BlockSparse, Full, Mask, Positions, Window

LENGTH, QUERY_HEADS, KEY_HEADS = 4096, 8, 2
CAPABILITIES = 80, 90
WIDTHS = (64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (64, "float32"), (128, "float32")
KINDS = {
    "causal": (Full(), 0.0, False),
    "window, sinks, soft-cap": (Window(700, sinks=5), 30.0, False),
    "block-sparse, ALiBi": (BlockSparse(96, 2, 3, sinks=4), 0.0, True),
}
PTXAS = Path(nvidia.__file__).parent / "bin" / "ptxas-blackwell"  # the newest it brings


def modules(width: int, dtype: str, mask: Mask, softcap: float, alibi: bool) -> Iterator:
    """(name, Triton's module as text, options) of each kernel."""
    shape = (1, LENGTH)
    q, k = (jax.ShapeDtypeStruct((*shape, n, width), dtype) for n in (QUERY_HEADS, KEY_HEADS))
    at = Positions(*[jax.ShapeDtypeStruct(shape, jnp.int32)] * 2)
    slope = jax.ShapeDtypeStruct((QUERY_HEADS,), jnp.float32) if alibi else None

    def run(q, k, v, dout, at, slope_N):
        how = dict(scale=width**-0.5, softcap=softcap, slope_N=slope_N)
        out, lse = gpu.forward(q, k, v, at, at, mask, **how)
        done = dout, lse, blocks.delta(out, dout)
        return out, gpu.backward(q, k, v, at, at, mask, *done, **how)

    traced = jax.jit(run).trace(q, k, k, q, at, slope)
    program = traced.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    for call in custom_calls(program.operation):
        config = call.attributes["mhlo.backend_config"]
        options = {name: ir.IntegerAttr(config[name]).value for name in ("num_warps", "num_stages")}
        with lowering._new_ir_context(), ir.Location.unknown():
            module = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
            yield ir.StringAttr(config["name"]).value, module.operation.get_asm(), options


def custom_calls(operation) -> Iterator:
    if operation.name == "stablehlo.custom_call" and "mhlo.backend_config" in operation.attributes:
        yield operation
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from custom_calls(inner.operation)


def compiled(text: str, options: dict, capability: int) -> dict[str, int]:
    """Returns what ptxas reports of a kernel: registers, spills and shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        source, ptx = Path(folder) / "kernel.ttir", Path(folder) / "kernel.ptx"
        source.write_text(text)
        target = GPUTarget("cuda", capability, 32)
        kernel = triton.compile(str(source), target=target, options=options)
        ptx.write_text(kernel.asm["ptx"])
        architecture = re.search(r"\.target (\w+)", kernel.asm["ptx"]).group(1)
        command = PTXAS, "-v", f"-arch={architecture}", ptx, "-o", ptx.with_suffix(".cubin")
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said).group(1)),
        "spilled": int(re.search(r"(\d+) bytes spill stores", said).group(1)),
        "shared": kernel.metadata.shared,
    }


def main() -> None:
    targets = " | ".join(f"{c / 10}: registers, spilled, shared KiB" for c in CAPABILITIES)
    print(f"| width | dtype | kind | kernel | {targets} |")
    print("|---|---|---|---|" + "---|" * len(CAPABILITIES))
    for width, dtype in WIDTHS:
        for kind, how in KINDS.items() if dtype == "bfloat16" else [("causal", KINDS["causal"])]:
            for name, text, options in modules(width, dtype, *how):
                found = [compiled(text, options, capability) for capability in CAPABILITIES]
                cells = [
                    f"{f['registers']}, {f['spilled']}, {f['shared'] / 1024:.0f}" for f in found
                ]
                row = width, dtype, kind, name.removeprefix("gpu_"), *cells
                print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    with cli.exits():
        jax.config.update("jax_platforms", "cpu")
        main()
