"""FLOPs of attention on the device that has most of it: what a step waits for."""

import numpy as np

from model.attention.spec import AttentionSpec
from model.config import ModelConfig
from train.config import TrainConfig

FORWARD, BACKWARD = 4, 10  # FLOPs a (query, key) pair and unit of head_dim: 2 and 5 products


def busiest_device(
    model: ModelConfig, train: TrainConfig, mesh: tuple[int, int, int], order: np.ndarray
) -> float:
    """FLOPs of one step on a mesh (data, seq, model), one document a row.

    `order` is that of the tokens over the shards of the length (core/layout.py): in their own
    order the last shard has twice the mean of a causal row. remat="full" computes the forward
    pass again; the others keep its output.
    """
    data, seq, heads = mesh

    def pairs(spec: AttentionSpec) -> int:
        if model.attention_kernel == "reference":  # computes every score, then hides most
            return train.length // seq * train.length
        return spec.keys_seen(train.length)[order].reshape(seq, -1).sum(1).max()

    passes = FORWARD * (2 if train.remat == "full" else 1) + BACKWARD
    rows, each = train.batch_size / data, model.num_heads / heads
    layers = [(spec, layers) for slots, layers in model.stages for spec in slots]
    work = sum(layers * model.kv_shape(spec)[1] * pairs(spec) for spec, layers in layers)
    return passes * rows * each * work
