"""Time and memory of model.convert: a synthetic LLaMA of 1.1B parameters, in and out.

    python -m bench.convert [--directory=DIR] [--layers=22] [--vocabulary=32000]

Makes a directory of TinyLlama's sizes (bfloat16, 2.2 GB), imports it, exports the bundle again,
each in a process of its own, and compares what came out bit for bit. Needs 8 GB of disk.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from bench.sides.commands import call, whole
from core import lazy
from core.command import cli
from model import families
from model.io import checkpoint_files, safetensors
from model.io.safetensors import TensorWriter

MOST_SECONDS, MOST_BYTES = 120, 3.5 * 2**30
SHARD_GB = 2.0
IDLE = "import jax, model.convert; jax.config.update('jax_platforms', 'cpu'); jax.devices()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", help="where to work; a temporary directory")
    parser.add_argument("--layers", type=whole, default=22, help="of the model; TinyLlama has 22")
    parser.add_argument("--vocabulary", type=whole, default=32000, help="262144 makes 1 GiB of it")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=args.directory))
    try:
        run(work, args.layers, args.vocabulary)
    finally:
        shutil.rmtree(work)


def run(work: Path, layers: int, vocabulary: int) -> None:
    """Makes, imports, exports, compares; prints the figures."""
    there, bundle, back = work / "hf", work / "bundle", work / "back"
    largest = make(there, layers, vocabulary)
    _, idle = measure("-c", IDLE)
    print(f"idle process: {idle / 2**20:.0f} MiB; largest tensor {largest / 2**20:.0f} MiB")
    convert = "-m", "model.convert"
    for name, arguments, piece in (
        ("import", ("--from_hf", there, "--to_bundle", bundle), lazy.CHUNK),
        (
            "export",
            ("--from_bundle", bundle, "--to_hf", back, "--shard_gb", SHARD_GB),
            SHARD_GB * 1e9,
        ),
    ):
        seconds, peak = measure(*convert, *map(str, arguments))
        print(
            f"{name}: {seconds:.1f} s of {MOST_SECONDS}, {peak / 2**20:.0f} MiB of "
            f"{MOST_BYTES / 2**20:.0f}, {(peak - idle) / 2**20:.0f} MiB above idle "
            f"(1.3 largest tensors: {1.3 * largest / 2**20:.0f} MiB, "
            f"the piece or shard being written: {piece / 2**20:.0f} MiB)"
        )
        if seconds > MOST_SECONDS or peak > MOST_BYTES:
            sys.exit(f"{name} is over its bounds")
    compare(there, back)


def make(directory: Path, layers: int, vocabulary: int) -> int:
    """Writes the checkpoint, in one file; the bytes of its largest tensor."""
    config_json = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "num_hidden_layers": layers,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 5632,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json))
    tensors = families.tensors(families.read(config_json))
    dtype = np.dtype(jnp.bfloat16)
    shapes = {tensor.name: tensor.layout.shape for tensor in tensors}
    writer = TensorWriter(directory / checkpoint_files.WHOLE, shapes, dtype)
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.write(name, (0.02 * random.standard_normal(shape, np.float32)).astype(dtype))
    writer.close()
    return max(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize


# A process starts with its parent's peak, and ours is not small: a small one stands between.
SMALL = """
import resource, subprocess, sys, time
began = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
if status:
    sys.exit(status)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(time.perf_counter() - began, peak)
"""


def measure(*arguments: str) -> tuple[float, int]:
    """Seconds and peak bytes of a Python process."""
    command = [sys.executable, "-S", "-c", SMALL, sys.executable, *arguments]
    seconds, peak = call(command, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(seconds), int(peak)


def compare(one: Path, other: Path) -> None:
    """Exits with 1 unless both hold the same tensors bit for bit."""
    a, b = (checkpoint_files.find(path).entries for path in (one, other))
    differ = [name for name in a if not safetensors.same(a[name], b[name])]
    if a.keys() != b.keys() or differ:
        sys.exit(f"what came back is not what went in: {differ}")
    files = len({entry.path for entry in b.values()})
    print(f"{len(a)} tensors came back bit for bit, in {files} files")


if __name__ == "__main__":
    with cli.exits():
        main()
