"""Worker of bench.train: one of our training steps a line of input, as `train.pretrain` runs it."""

import jax
import numpy as np

from bench import train as bench
from bench.sides import turns
from core import backend, sharding, tree
from core.sharding import MeshConfig, make_mesh
from data.batch import Batch
from model import transformer
from model.config import ModelConfig
from train import optimizer, state
from train.config import TrainConfig
from train.loop.feed import BatchSharder
from train.step import make_train_step

MODEL = ModelConfig(
    vocab_size=bench.VOCAB,
    context=bench.LENGTH,
    num_layers=bench.LAYERS,
    embed_dim=bench.WIDTH,
    num_heads=bench.HEADS,
    num_kv_heads=bench.HEADS,
    head_dim=bench.WIDTH // bench.HEADS,
    mlp_dim=bench.MLP,
    tied_head=False,
    dtype="float32",
)
TRAIN = TrainConfig(steps=1000, batch_size=bench.ROWS, length=bench.LENGTH, learning_rate=3e-4)


def main() -> None:
    rules = sharding.training()
    rule = optimizer.make(TRAIN, tree.named_leaves(transformer.abstract(MODEL, rules)))
    train_step, feed = make_train_step(TRAIN, rule, rules), BatchSharder(TRAIN, rules)
    current = state.create(MODEL, rules, rule, TRAIN.seed)
    random = np.random.default_rng(0)

    def step(_):
        nonlocal current
        shape = (bench.ROWS, bench.LENGTH)
        tokens = random.integers(0, bench.VOCAB, (shape[0], shape[1] + 1), np.int32)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        segments = np.ones(shape, np.int32)
        weights = np.ones(shape, np.float32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], weights, positions, segments)
        current, metrics = train_step(current, feed(batch))
        float(metrics["loss"])

    turns.serve(step)


if __name__ == "__main__":
    backend.prepare()
    with jax.set_mesh(make_mesh(MeshConfig())):
        main()
