"""Worker of bench.decode: `generate` of Hugging Face transformers on a cache filled at random."""

import functools
from collections.abc import Callable

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from bench import decode as bench
from bench.sides import turns


@functools.cache
def program(implementation: str, dtype: str, batch: int, context: int) -> Callable[[], None]:
    """A call that makes TOKENS tokens more in each row, always after the same context."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=bench.VOCAB,
        hidden_size=bench.WIDTH,
        intermediate_size=bench.MLP,
        num_hidden_layers=bench.LAYERS,
        num_attention_heads=bench.HEADS,
        num_key_value_heads=bench.HEADS,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    if implementation == "dynamic":
        cache = DynamicCache(config=config)
    else:
        cache = StaticCache(config=config, max_cache_len=context + bench.ROOM)
    shape = (batch, bench.HEADS, context, bench.WIDTH // bench.HEADS)
    with torch.no_grad():
        for layer in range(bench.LAYERS):
            cache.update(*torch.randn(2, *shape, dtype=model.dtype), layer)
    tokens = torch.zeros(batch, context + 1, dtype=torch.long)

    def run():
        nonlocal cache
        model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=bench.TOKENS,
            min_new_tokens=bench.TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        if implementation == "dynamic":
            cache.crop(-bench.TOKENS)
        else:
            for layer in cache.layers:
                layer.cumulative_length.fill_(context)

    return run


def main() -> None:
    def work(task):
        keys = ("implementation", "dtype", "batch", "context")
        program(*(task[key] for key in keys))()

    turns.serve(work)


if __name__ == "__main__":
    main()
