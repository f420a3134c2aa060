"""Worker of bench.train: one Hugging Face training step a line of input."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import train as bench
from bench.sides import turns


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=bench.VOCAB,
        hidden_size=bench.WIDTH,
        intermediate_size=bench.MLP,
        num_hidden_layers=bench.LAYERS,
        num_attention_heads=bench.HEADS,
        num_key_value_heads=bench.HEADS,
        max_position_embeddings=bench.LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.1)

    def step(_):
        tokens = torch.randint(0, bench.VOCAB, (bench.ROWS, bench.LENGTH))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    turns.serve(step)


if __name__ == "__main__":
    main()
