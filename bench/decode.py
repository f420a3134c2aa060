"""Decoding beside Hugging Face transformers and llama.cpp: one shape, contexts in memory, in turns.

    python -m bench.decode [--hf_python=PATH] [--llama_python=PATH] [--contexts=128,2048,8192,32768]

A LLaMA of 110 M parameters with random weights, greedy; beside bfloat16 ours is there with weights
of int8 and int4 too. Peers: `generate` of transformers with its dynamic and its static cache (`pip
install torch transformers`, here or in the environment of --hf_python), and llama.cpp with its
cache in float16 (`pip install llama-cpp-python gguf`, at --llama_python; nothing runs it if that is
not given). Each works in a process of its own; a round is 32 tokens of each, in turns, and medians
count. Caches are filled without reading a text, except llama.cpp's, which reads up to 8192 tokens.
Beside milliseconds a token (of every row): the bytes of weights, in the dtype that is named, and of
the keys and values that a token needs, over that time, as a share of what the machine reads from
memory.
"""

import argparse
import statistics
import sys
from typing import NamedTuple

from bench.sides.commands import choice, several, whole
from bench.sides.turns import Worker
from core.command import cli

WIDTH, LAYERS, HEADS, MLP, VOCAB = 768, 12, 12, 2048, 32000
WEIGHTS = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP) + VOCAB * WIDTH  # head and table are one
INT4 = 1 - (1 - 33 / 64) * (1 - VOCAB * WIDTH / WEIGHTS)  # bytes; tables are int8
TOKENS = 32  # a round
ROOM = 256  # tokens behind the context that caches have room for
LLAMA_LONGEST = 8192  # llama.cpp has to read its context
MEMORY = 5e9  # bytes of one cache: four of them are there at a time


class Peer(NamedTuple):
    name: str
    module: str
    implementation: str
    weight_bytes: float  # a parameter
    kv_bytes: float  # a number in the cache


PEERS = {
    "float32": (
        Peer("ours", "bench.sides.decode_ours", "float32", 4, 4),
        Peer("hf dynamic", "bench.sides.decode_hf", "dynamic", 4, 4),
        Peer("hf static", "bench.sides.decode_hf", "static", 4, 4),
    ),
    "bfloat16": (
        Peer("ours", "bench.sides.decode_ours", "bfloat16", 2, 2),
        Peer("ours int8", "bench.sides.decode_ours", "int8", 1, 2),
        Peer("ours int4", "bench.sides.decode_ours", "int4", INT4, 2),
        Peer("hf dynamic", "bench.sides.decode_hf", "dynamic", 2, 2),
        Peer("hf static", "bench.sides.decode_hf", "static", 2, 2),
        Peer("llama f16", "bench.sides.decode_llama", "f16", 2, 2),
        Peer("llama q8_0", "bench.sides.decode_llama", "q8_0", 34 / 32, 2),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hf_python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--llama_python", help="a Python that has llama-cpp-python")
    parser.add_argument("--rounds", type=whole, default=5, help="runs of each, after the first")
    numbers, dtypes = several(whole), several(choice(*PEERS))
    parser.add_argument(
        "--contexts", type=numbers, default="128,2048,8192,32768", help="tokens, with commas"
    )
    parser.add_argument("--batches", type=numbers, default="1,8", help="rows, with commas")
    parser.add_argument("--dtypes", type=dtypes, default="float32,bfloat16", help="with commas")
    args = parser.parse_args()
    pythons = {
        "bench.sides.decode_hf": args.hf_python,
        "bench.sides.decode_llama": args.llama_python,
    }
    for dtype in args.dtypes:
        for batch in args.batches:
            for context in args.contexts:
                task = dict(dtype=dtype, batch=batch, context=context)
                if kv_numbers(batch, context) * PEERS[dtype][0].kv_bytes > MEMORY:
                    print(f"{dtype}, batch {batch}, {context} tokens: caches beyond {MEMORY:.0e} B")
                    continue
                run(task, pythons, args.rounds)


def run(task: dict, pythons: dict[str, str | None], rounds: int) -> None:
    """One case, printed; processes are fresh, so that memory is of this case alone."""
    workers = {"memory": Worker(sys.executable, "bench.read")}
    peers = {peer.name: peer for peer in PEERS[task["dtype"]] if can(peer, pythons, **task)}
    for name, peer in peers.items():
        workers[name] = Worker(pythons.get(peer.module, sys.executable), peer.module)
    seconds = {name: [] for name in workers}
    for turn in range(rounds + 1):
        for name, worker in workers.items():
            implementation = peers[name].implementation if name in peers else ""
            elapsed = worker.run({**task, "implementation": implementation})["seconds"]
            if turn:  # the first compiles and fills the cache
                seconds[name].append(elapsed)
    for worker in workers.values():
        worker.close()
    show(task, peers, seconds)


def can(peer: Peer, pythons: dict[str, str | None], dtype: str, batch: int, context: int) -> bool:
    """Whether the peer is there and has this case."""
    if peer.module == "bench.sides.decode_llama":
        return bool(pythons[peer.module]) and context * batch <= LLAMA_LONGEST
    return True


def kv_numbers(batch: int, context: int) -> int:
    """Numbers in the keys and values of a context."""
    return 2 * LAYERS * WIDTH * batch * context


def show(task: dict, peers: dict[str, Peer], seconds: dict[str, list[float]]) -> None:
    """One line a peer; ratios are of speed."""
    memory = 2**30 / statistics.median(seconds["memory"])
    print(
        f"{task['dtype']}, batch {task['batch']}, {task['context']} tokens; "
        f"memory is read at {memory / 1e9:.1f} GB/s"
    )
    ours = statistics.median(seconds["ours"])
    for name, peer in peers.items():
        token = statistics.median(seconds[name]) / TOKENS
        low, high = (1e3 * f(seconds[name]) / TOKENS for f in (min, max))
        read = WEIGHTS * peer.weight_bytes
        read += kv_numbers(task["batch"], task["context"]) * peer.kv_bytes
        print(
            f"  {name:>10}: {1e3 * token:8.2f} ms/token ({low:.2f} to {high:.2f})  "
            f"{task['batch'] / token:6.1f} tokens/s  {read / token / 1e9:5.1f} GB/s, "
            f"{read / token / memory:4.0%} of memory's  ours is {token * TOKENS / ours:.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    with cli.exits():
        main()
