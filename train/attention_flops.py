"""FLOPs of attention on the device that has most of it: what a step waits for."""

from model.config import ModelConfig
from model.flops import mean_keys
from train.config import TrainConfig

FORWARD, BACKWARD = 4, 10  # FLOPs a (query, key) pair and unit of head_dim: 2 and 5 products


def busiest_device(model: ModelConfig, train: TrainConfig, mesh: tuple[int, int, int]) -> float:
    """FLOPs of one step on a mesh (data, seq, model), one document a row.

    The length is cut in order, so the last shard of `seq` has the queries that see most keys: twice
    the mean of a causal row. remat="full" computes the forward pass again; "dots" keeps its output.
    """
    data, seq, heads = mesh
    first = train.length - train.length // seq
    pairs = sum(
        layers * (pairs_before(train.length, spec.window) - pairs_before(first, spec.window))
        for slots, layers in model.stages
        for spec in slots
    )
    if model.attention_kernel == "reference":  # computes every score, then hides most
        pairs = model.num_layers * (train.length // seq) * train.length
    passes = FORWARD * (2 if train.remat == "full" else 1) + BACKWARD
    rows, width = train.batch_size / data, model.num_heads / heads * model.head_dim
    return passes * width * rows * pairs


def pairs_before(position: int, window: int) -> float:
    """(query, key) pairs that the first `position` queries of a row see."""
    return position * mean_keys(window, position) if position else 0.0
