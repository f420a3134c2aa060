"""Floating-point operations of a token, by two conventions for attention.

A multiply-add is 2 FLOPs. Forward, per token:

    matrices   2 x parameters that multiply it (the head counts, the embedding's lookup does not)
    attention  4 x N x H x keys, for q k^T and p v

A training step is 3 forward passes (backward counts twice).

`seen` counts the keys that the mask lets a token see (causal counted once, as MaxText does);
`dense` counts all T keys in every layer (PaLM, arXiv 2204.02311, appendix B; most GPU papers).
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from model.config import ModelConfig
from model.sizes import parts

Convention = Literal["seen", "dense"]


def matrix_parameters(config: ModelConfig) -> int:
    """Parameters that each token is multiplied by; compressors of NSA see blocks, not tokens."""
    layers = sum(math.prod(matrix[:3]) for matrix in parts.matrices(config).values())
    return layers + config.vocab_size * config.embed_dim


def training_flops_per_token(config: ModelConfig, length: int, convention: Convention) -> float:
    """FLOPs of forward and backward for one token of rows of `length`, rematerialising nothing."""
    return 3 * forward_flops_per_token(config, length, convention)


def forward_flops_per_token(config: ModelConfig, length: int, convention: Convention) -> float:
    """FLOPs of one token of rows of `length`, its logits included."""
    attention = _attention(config, length, convention, np.mean)
    return 2 * matrix_parameters(config) + attention


def decode_flops_per_token(config: ModelConfig, context: int, convention: Convention) -> float:
    """FLOPs of the last of `context` tokens, those before it in a cache."""
    attention = _attention(config, context, convention, lambda seen: seen[-1])
    return 2 * matrix_parameters(config) + attention


def _attention(
    config: ModelConfig, length: int, convention: Convention, of: Callable[[np.ndarray], float]
) -> float:
    """FLOPs over all layers: `of` the keys that each token sees, or all."""
    specs = set(config.pattern)
    keys = dict.fromkeys(specs, length)
    if convention == "seen":
        keys = {spec: float(of(spec.keys_seen(length))) for spec in specs}
    each = {spec: 4 * config.num_heads * config.kv_shape(spec)[1] * keys[spec] for spec in specs}
    return sum(layers * each[spec] for slots, layers in config.stages for spec in slots)
