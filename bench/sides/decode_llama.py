"""Worker of bench.decode: llama.cpp on a model of the same shape, written as GGUF at the start."""

import ctypes
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from bench import decode as bench
from bench.sides import turns

TYPES = {"f16": gguf.GGMLQuantizationType.F16, "q8_0": gguf.GGMLQuantizationType.Q8_0}


def write(path: Path, implementation: str) -> None:
    """Random weights of the shape of the benchmark."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2**20)
    writer.add_embedding_length(bench.WIDTH)
    writer.add_block_count(bench.LAYERS)
    writer.add_feed_forward_length(bench.MLP)
    writer.add_head_count(bench.HEADS)
    writer.add_head_count_kv(bench.HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(bench.WIDTH // bench.HEADS)
    writer.add_vocab_size(bench.VOCAB)
    writer.add_tokenizer_model("no_vocab")
    random, kind = np.random.default_rng(0), TYPES[implementation]

    def matrix(name: str, outputs: int, inputs: int) -> None:
        weight = 0.02 * random.standard_normal((outputs, inputs), np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(bench.WIDTH, np.float32))

    matrix("token_embd", bench.VOCAB, bench.WIDTH)  # the head is tied to it
    for layer in range(bench.LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}", bench.WIDTH, bench.WIDTH)
        matrix(f"blk.{layer}.ffn_gate", bench.MLP, bench.WIDTH)
        matrix(f"blk.{layer}.ffn_up", bench.MLP, bench.WIDTH)
        matrix(f"blk.{layer}.ffn_down", bench.WIDTH, bench.MLP)
        norm(f"blk.{layer}.attn_norm")
        norm(f"blk.{layer}.ffn_norm")
    norm("output_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def program(implementation: str, batch: int, context: int) -> Callable[[], None]:
    """A call that makes TOKENS tokens more in each row, always after the same context."""
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write(path, implementation)
        how = llama_cpp.llama_model_default_params()
        how.use_mmap = False
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
    how = llama_cpp.llama_context_default_params()
    how.n_ctx, how.n_batch, how.n_seq_max = batch * (context + bench.ROOM), 512, batch
    how.n_threads = how.n_threads_batch = os.cpu_count()
    run_on = llama_cpp.llama_init_from_model(model, how)
    memory = llama_cpp.llama_get_memory(run_on)
    tokens = llama_cpp.llama_batch_init(512, 0, 1)

    def decode(entries: list[tuple[int, int, bool]]) -> None:
        """(row, position, whether its logits are wanted) of each token."""
        tokens.n_tokens = len(entries)
        for i, (row, position, wanted) in enumerate(entries):
            tokens.token[i], tokens.pos[i], tokens.logits[i] = 1, position, wanted
            tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, row
        if llama_cpp.llama_decode(run_on, tokens):
            raise RuntimeError("llama_decode failed")

    for row in range(batch):
        for start in range(0, context, 512):
            decode([(row, p, False) for p in range(start, min(start + 512, context))])

    def run(keep=(silent, model)):
        for step in range(bench.TOKENS):
            decode([(row, context + step, True) for row in range(batch)])
            for i in range(batch):
                logits = llama_cpp.llama_get_logits_ith(run_on, i)
                np.ctypeslib.as_array(logits, (bench.VOCAB,)).argmax()
        for row in range(batch):
            llama_cpp.llama_memory_seq_rm(memory, row, context, -1)

    return run


def main() -> None:
    turns.serve(lambda task: program(task["implementation"], task["batch"], task["context"])())


if __name__ == "__main__":
    main()
