"""Floating-point operations of a training step, by two conventions for attention.

A multiply-add is 2 FLOPs; a training step is 3 forward passes (backward counts twice). Per token:

    matrices   6 x parameters that multiply it (the head counts, the embedding's lookup does not)
    attention  12 x N x H x keys, for q k^T and p v

`seen` counts the keys that the mask lets a token see (causal counted once, as MaxText does);
`dense` counts all T keys in every layer (PaLM, arXiv 2204.02311, appendix B; most GPU papers).
"""

from typing import Literal

from model.attention.seen import keys_seen
from model.config import ModelConfig

Convention = Literal["seen", "dense"]


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that each token is multiplied by; compressors of NSA see blocks, not tokens."""
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    attention = D * H * (N + 2 * K) + N * H * D
    mlp = D * config.mlp_dim * (3 if config.mlp == "gated" else 2)
    gates = sum(
        layers * D * N * 3
        for slots, layers in config.stages
        for spec in slots
        if spec.kind == "nsa"
    )
    return config.num_layers * (attention + mlp) + gates + config.vocab_size * D


def training_flops_per_token(config: ModelConfig, length: int, convention: Convention) -> float:
    """FLOPs of forward and backward for one token of rows of `length`, rematerialising nothing."""
    keys = sum(
        layers * (length if convention == "dense" else keys_seen(spec, length).mean())
        for slots, layers in config.stages
        for spec in slots
    )
    return 6 * matrix_parameters(config) + 12 * config.num_heads * config.head_dim * keys
