"""A model from its bundle, placed for decoding.

found = find("runs/quickstart")  # config and tokenizer, no weights yet
with jax.set_mesh(make_mesh(MeshConfig())):
    model = restore(found, prefilling())
"""

from pathlib import Path
from typing import NamedTuple

import jax

from core import tree
from core.checkpoint import Bundle
from core.config import UserError
from core.sharding import Rules, prefilling
from data import tokenizer as tokenizers
from data.tokenizer_base import Tokenizer
from infer import layout
from model import transformer
from model.config import ModelConfig
from model.transformer import Transformer


class Found(NamedTuple):
    """What a bundle tells before its weights are read."""

    path: Path
    step: int
    config: ModelConfig
    tokenizer: Tokenizer | None


def find(path: str | Path, step: int | None = None) -> Found:
    """Opens the bundle at `path`; UserError if there is none, or no such complete step."""
    bundle = Bundle(path)
    try:
        config = bundle.config(model=ModelConfig).model
        tokenizer = tokenizers.load(bundle.tokenizer) if bundle.tokenizer else None
        found = Found(bundle.path, bundle.choose(step), config, tokenizer)
    finally:
        bundle.close()
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"but the model only {config.vocab_size}"
        )
    return found


def restore(found: Found, rules: Rules) -> Transformer:
    """The weights in the compute dtype, placed by `rules` on the mesh in use for decoding."""
    bundle = Bundle(found.path)
    try:
        abstract = transformer.abstract(found.config, rules)
        abstract = in_compute_dtype(abstract, found.config)
        model = bundle.restore(found.step, model=abstract).pop("model")
        weights = tree.named_leaves(model)
        del model
        return layout.place(found.config, rules, weights)
    finally:
        bundle.close()


def load(
    path: str | Path, step: int | None = None
) -> tuple[Transformer, Tokenizer | None, ModelConfig, int]:
    """(model, tokenizer, config, step) of a bundle, on the mesh in use."""
    found = find(path, step)
    return restore(found, prefilling()), found.tokenizer, found.config, found.step


def in_compute_dtype(model: Transformer, config: ModelConfig) -> Transformer:
    """Weights as they are multiplied: same numbers, fewer bytes a token. Norms stay."""

    def cast(name, x):
        if "norm" in name:
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, config.compute_dtype, sharding=x.sharding)
        return x.astype(config.compute_dtype)

    leaves = tree.named_leaves(model)
    return tree.with_leaves(model, {name: cast(name, x) for name, x in leaves.items()})
