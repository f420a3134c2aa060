"""Training speed beside a plain Hugging Face loop: same shape, same machine, steps in turn.

    python -m bench.train [--hf_python=PATH] [--rounds=7]

The peer is `LlamaForCausalLM` with AdamW and clipping in eager PyTorch, in a process of its own
(`pip install torch transformers`, here or in the environment of --hf_python). Each round runs a
step of ours, then one of theirs; medians count. Float32, 512 wide, 8 layers, batch 8 x 512.
"""

import argparse
import statistics
import sys

from bench.sides.commands import whole
from bench.sides.turns import Worker
from core.command import cli

WIDTH, LAYERS, HEADS, MLP, VOCAB, ROWS, LENGTH = 512, 8, 8, 1408, 8192, 8, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hf_python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--rounds", type=whole, default=7, help="steps of each, after a first")
    args = parser.parse_args()
    workers = {
        "cakrawala": Worker(sys.executable, "bench.sides.train_ours"),
        "hugging face": Worker(args.hf_python, "bench.sides.train_hf"),
        "matmul": Worker(sys.executable, "bench.matmul"),
    }
    seconds = {name: [] for name in workers}
    for turn in range(args.rounds + 1):
        for name, worker in workers.items():
            elapsed = worker.run()["seconds"]
            if turn:  # the first compiles, or warms caches up
                seconds[name].append(elapsed)
    show({name: statistics.median(s) for name, s in seconds.items()}, seconds, workers)


def flops_per_token() -> float:
    """6 x matrix parameters + attention, causal pairs counted once."""
    matrices = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP) + VOCAB * WIDTH
    return 6 * matrices + 12 * LAYERS * WIDTH * (LENGTH + 1) / 2


def show(median: dict[str, float], seconds: dict[str, list[float]], workers: dict) -> None:
    """The table and the ratios, on stdout."""
    step_flops = flops_per_token() * ROWS * LENGTH
    peak = 2 * 2048**3 / median.pop("matmul") / 1e9
    print(f"{flops_per_token() / 1e6:.1f} MFLOP/token; matmul of 2048: {peak:.0f} GFLOP/s")
    for name, s in median.items():
        rate = step_flops / s / 1e9
        print(
            f"{name:>12}: {ROWS * LENGTH / s:6.0f} tokens/s  {rate:6.1f} GFLOP/s  "
            f"{rate / peak:.0%} of matmul  {workers[name].last['peak_bytes'] / 2**20:5.0f} MiB  "
            f"step {s:.2f} s ({min(seconds[name]):.2f} to {max(seconds[name]):.2f})"
        )
    ratio = median["hugging face"] / median["cakrawala"]
    print(f"cakrawala / hugging face: {ratio:.2f}x tokens/s")


if __name__ == "__main__":
    with cli.exits():
        main()
