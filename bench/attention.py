"""Attention beside the best of PyTorch and JAX: one causal row of 8 heads.

    python -m bench.attention [--on=cpu] [--torch_python=PATH] [--rounds=5] [--lengths=2048,8192]

On a CPU heads of 64 in float32, on a GPU (--on=gpu) of 128 in bfloat16. Ours are the kernel for it
(`chunked`, `gpu`) and, over 4 simulated devices, `ring`; beside full attention also MoBA (4 blocks
of 512) and NSA (as in its paper), which see less. The peers are PyTorch's
scaled_dot_product_attention and compiled flex_attention (`pip install torch`, here or in the
environment of --torch_python) and jax.nn.dot_product_attention: on a GPU cuDNN's, on a CPU XLA's,
whose scores fill memory beyond 8K. All work in turns, each in a process of its own; medians count.
GFLOP/s are of useful work: pairs that the mask allows, 2 products forward and 5 backward; for MoBA
and NSA of the same pairs, which they need not compute: there the ratio says what is saved.
"""

import argparse
import os
import statistics
import sys
from typing import NamedTuple

from bench.sides.commands import several, whole
from bench.sides.turns import Worker
from core.command import cli

HEADS, WINDOW = 8, 1024
DENSE_LIMIT = 8192  # the scores of 32K would be 34 GB


class Machine(NamedTuple):
    width: int  # of a head
    dtype: str
    kernel: str
    lengths: str


MACHINES = {
    "cpu": Machine(64, "float32", "chunked", "2048,8192,32768"),
    "gpu": Machine(128, "bfloat16", "gpu", "8192,32768,131072"),
}
# (row of the table, module of the worker, which of its implementations)
IMPLEMENTATIONS = (
    ("ours", "bench.sides.attention_ours", "ours"),
    ("ring x4", "bench.sides.attention_ring", "ring"),
    ("moba", "bench.sides.attention_ours", "moba"),
    ("nsa", "bench.sides.attention_ours", "nsa"),
    ("jax.nn", "bench.sides.attention_ours", "jax"),
    ("torch sdpa", "bench.sides.attention_torch", "sdpa"),
    ("torch flex", "bench.sides.attention_torch", "flex"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--on", choices=MACHINES, default="cpu", help="what runs it")
    parser.add_argument("--torch_python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--rounds", type=whole, default=5, help="runs of each, after the first")
    parser.add_argument(
        "--lengths",
        type=several(whole),
        help="tokens, with commas; from 2K on, on a GPU from 8K on",
    )
    args = parser.parse_args()
    machine = MACHINES[args.on]
    if args.on == "gpu":  # JAX would take three quarters of the memory that the others need too
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    pythons = {"bench.sides.attention_torch": args.torch_python}
    for length in args.lengths or several(whole)(machine.lengths):
        for window in (0, WINDOW):
            for backward in (False, True):
                task = dict(on=args.on, length=length, window=window, backward=backward)
                # Fresh processes for each task: peak memory is then of this task alone.
                workers = {
                    name: (Worker(pythons.get(module, sys.executable), module), implementation)
                    for name, module, implementation in IMPLEMENTATIONS
                    if can(implementation, **task)
                }
                show(task, measure(workers, task, args.rounds), workers)
                for worker, _ in workers.values():
                    worker.close()


def can(implementation: str, on: str, length: int, window: int, backward: bool) -> bool:
    """Whether a peer has this case, and whether it fits."""
    if implementation == "ring":  # of simulated devices
        return on == "cpu"
    if implementation == "jax":
        return on == "gpu" or (length <= DENSE_LIMIT and not window)
    if implementation == "flex":  # its CPU backward raises NotImplementedError
        return bool(window) and (on == "gpu" or not backward)
    if implementation in ("sdpa", "moba", "nsa"):
        return not window  # for sdpa only a dense mask would do
    return True


def measure(workers: dict, task: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each implementation, in turns; the first run compiles and does not count."""
    seconds = {name: [] for name in workers}
    for turn in range(rounds + 1):
        for name, (worker, implementation) in workers.items():
            elapsed = worker.run({**task, "implementation": implementation})["seconds"]
            if turn:
                seconds[name].append(elapsed)
    return seconds


def useful_flops(on: str, length: int, window: int, backward: bool) -> float:
    """4 H a pair and head forward, 10 H more backward (Dao et al., 2022)."""
    reach = min(window or length, length)
    pairs = reach * (reach + 1) / 2 + (length - reach) * reach
    return HEADS * MACHINES[on].width * pairs * (14 if backward else 4)


def show(task: dict, seconds: dict[str, list[float]], workers: dict) -> None:
    """One line an implementation, on stdout; ratios are of speed, to ours."""
    what = f"window {task['window']}" if task["window"] else "causal"
    print(f"{task['length']} tokens, {what}, forward{' + backward' * task['backward']}")
    ours = statistics.median(seconds["ours"])
    for name, s in seconds.items():
        median, peak = statistics.median(s), workers[name][0].last["peak_bytes"]
        print(
            f"  {name:>10}: {median * 1e3:8.1f} ms ({min(s) * 1e3:.1f} to {max(s) * 1e3:.1f})  "
            f"{useful_flops(**task) / median / 1e9:6.1f} GFLOP/s  {peak / 2**20:6.0f} MiB  "
            f"ours is {median / ours:.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    with cli.exits():
        main()
