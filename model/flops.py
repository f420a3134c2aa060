"""Floating-point operations of a training step, by two conventions for attention.

A multiply-add is 2 FLOPs; a training step is 3 forward passes (backward counts twice). Per token:

    matrices   6 x parameters that multiply it (the head counts, the embedding's lookup does not)
    attention  12 x N x H x keys, for q k^T and p v

`seen` counts the keys that the mask lets a token see (causal counted once, as MaxText does);
`dense` counts all T keys in every layer (PaLM, arXiv 2204.02311, appendix B; most GPU papers).
"""

from typing import Literal

import numpy as np

from model.attention.spec import AttentionSpec, Mask
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


def keys_seen(spec: AttentionSpec, length: int) -> np.ndarray:
    """Keys that each token of a document of `length` attends to, int [length].

    Those of the three branches of NSA add up; what it costs to choose blocks is not counted.
    """
    if not spec.top:
        return keys_allowed(spec.mask, length)
    q = np.arange(length)
    chosen = q % spec.block + 1 + np.minimum(q // spec.block, spec.top - 1) * spec.block
    if spec.kind == "moba":
        return chosen
    compressed = np.maximum((q + 1 - spec.compress) // spec.step + 1, 0)
    return chosen + compressed + np.minimum(q + 1, spec.window)


def keys_allowed(mask: Mask, length: int) -> np.ndarray:
    """Keys that the mask lets each token of a document of `length` see, int [length]."""
    if not mask.causal:
        return np.full(length, length)
    q = np.arange(length)
    near = q + 1
    if mask.window:
        near = np.minimum(near, mask.window)
    elif mask.chunk:
        near = q % mask.chunk + 1
    elif mask.block:
        near = np.minimum(near, q % mask.block + 1 + (mask.local - 1) * mask.block)
    far = np.minimum(mask.sinks, q + 1 - near)
    if mask.stride:
        block = q // mask.block
        far += (block // mask.stride - (mask.local - 1) // mask.stride).clip(0) * mask.block
        for first in range(0, mask.sinks, mask.block):  # both a sink and on the stride
            back = block - first // mask.block
            both = (back >= mask.local) & (back % mask.stride == 0)
            far -= both * min(mask.block, mask.sinks - first)
    return np.maximum(near + far, min(mask.prefix, length))


def training_flops_per_token(config: ModelConfig, length: int, convention: Convention) -> float:
    """FLOPs of forward and backward for one token of rows of `length`, rematerialising nothing."""
    keys = sum(
        layers * (length if convention == "dense" else keys_seen(spec, length).mean())
        for slots, layers in config.stages
        for spec in slots
    )
    return 6 * matrix_parameters(config) + 12 * config.num_heads * config.head_dim * keys
