"""Tiny bundles and a slow, obvious decoder for the tests of infer."""

import json

import jax
import numpy as np

from core import checkpoint, sharding, tree
from core.config import Experiment, to_json
from core.sharding import MeshConfig
from data.tokenizer import trained
from evals.config import BenchConfig
from infer.config import DecodeConfig, ScoreConfig
from model import transformer
from model.attention.spec import full, sliding
from model.config import ModelConfig

TEXTS = ["the cat sat on the mat\n", "a na\u00efve caf\u00e9 \u2603 costs 12 \u20ac\n"] * 4
STEP = 7


def model_config(**fields) -> ModelConfig:
    """Sliding and full layers in turn; weights large enough for decided logits."""
    values = dict(
        vocab_size=320,
        context=64,
        num_layers=4,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=32,
        pattern=(sliding(6), full()),
        dtype="float32",
        attention_kernel="reference",  # the quickest to compile
        init_scale=0.3,
    )
    return ModelConfig(**{**values, **fields})


def experiment(workdir, model=None, **sections) -> Experiment:
    """An experiment as a config file would give it."""
    sections = {
        "decode": DecodeConfig(),
        "score": ScoreConfig(),
        "bench": BenchConfig(),
        **sections,
    }
    return Experiment(
        name="case",
        workdir=str(workdir),
        model=model or model_config(),
        mesh=sections.pop("mesh", MeshConfig()),
        **sections,
    )


def random_model(config=None) -> transformer.Transformer:
    """Weights by NumPy, on the mesh in use: `transformer.create` would be compiled first."""
    config = config or model_config()
    rng = np.random.default_rng(1)

    def make(path, x):
        scale = config.init_scale * ("norm" not in tree.name(path))
        value = rng.normal("norm" in tree.name(path), scale, x.shape).astype(x.dtype)
        return jax.device_put(value, x.sharding.spec)

    abstract = transformer.abstract(config, sharding.prefilling())
    return jax.tree_util.tree_map_with_path(make, abstract)


def save(workdir, model=None, with_tokenizer=True) -> None:
    """A bundle of random weights at STEP; needs a mesh in use."""
    run = experiment(workdir, model)
    if with_tokenizer:
        trained.train(TEXTS, 290, workdir / "vocabulary")
    checkpoint.create(workdir, to_json(run), workdir / "vocabulary" if with_tokenizer else None)
    bundle = checkpoint.Bundle(workdir)
    bundle.save(STEP, {"model": random_model(run.model)}, {})
    bundle.close()


@jax.jit
def _forward(model, tokens_BT, positions_BT, segments_BT, until_BT):
    return model.logits(model(tokens_BT, positions_BT, segments_BT, until_BT=until_BT)[0])


def full_logits(model, tokens, until=None) -> np.ndarray:
    """Logits [T, V] of one forward pass over all tokens at once, without a cache.

    Padding up to the context keeps it to one shape.
    """
    tokens_1T = np.zeros((1, model.config.context), np.int32)
    tokens_1T[0, : len(tokens)] = tokens
    positions_1T = np.arange(tokens_1T.shape[1], dtype=np.int32)[None]
    segments_1T = (positions_1T < len(tokens)).astype(np.int32)
    until_1T = None
    if until is not None:
        until_1T = positions_1T.copy()
        until_1T[0, : len(tokens)] = until
    args = (tokens_1T, positions_1T, segments_1T, until_1T)
    placed = jax.device_put(args, model.rules("batch", "length"))
    return np.asarray(_forward(model, *placed))[0, : len(tokens)]


def greedy(model, tokens, num_new: int, vocab_size: int) -> list[int]:
    """Argmax, one whole forward pass a token."""
    tokens, start = list(map(int, tokens)), len(tokens)
    for _ in range(num_new):
        tokens.append(int(full_logits(model, tokens)[-1, :vocab_size].argmax()))
    return tokens[start:]


def write_jsonl(path, rows) -> str:
    """One JSON object a line; the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
