"""Training speed beside a plain Hugging Face loop: same shape, same machine, steps in turn.

    python -m bench.train [--hf_python=PATH] [--rounds=7]

The peer is `LlamaForCausalLM` with AdamW and clipping in eager PyTorch, in a process of its own
(`pip install torch transformers`, here or in the environment of --hf_python). Each round runs a
step of ours, then one of theirs; medians count. Float32, 512 wide, 8 layers, batch 8 x 512.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

WIDTH, LAYERS, HEADS, MLP, VOCAB, ROWS, LENGTH = 512, 8, 8, 1408, 8192, 8, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hf_python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each, after one of warm-up")
    args = parser.parse_args()
    workers = {
        "cakrawala": Worker(sys.executable, "bench.train_ours"),
        "hugging face": Worker(args.hf_python, "bench.train_hf"),
        "matmul": Worker(sys.executable, "bench.matmul"),
    }
    seconds = {name: [] for name in workers}
    for turn in range(args.rounds + 1):
        for name, worker in workers.items():
            elapsed = worker.step()["seconds"]
            if turn:  # the first compiles, or warms caches up
                seconds[name].append(elapsed)
    show({name: statistics.median(s) for name, s in seconds.items()}, seconds, workers)


class Worker:
    """A process that runs one step a line of input and answers with JSON."""

    def __init__(self, python: str, module: str):
        command = [python, "-m", module]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> dict[str, float]:
        """{"seconds", "peak_bytes"} of one step; the other workers only wait meanwhile."""
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self.last = json.loads(self._process.stdout.readline() or "{}")
        if not self.last:
            sys.exit(f"{' '.join(self._process.args)} ended; its message is above")
        return self.last


def serve(step) -> None:
    """The worker's side: calls `step()` for each line of input."""
    import resource

    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"seconds": time.perf_counter() - began, "peak_bytes": peak}
        print(json.dumps(answer), flush=True)


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
    main()
