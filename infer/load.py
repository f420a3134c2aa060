"""A model from its bundle, placed for decoding.

found = find("runs/quickstart")  # config and tokenizer, no weights yet
with jax.set_mesh(make_mesh(MeshConfig())):
    model = restore(found, prefilling())
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core import checkpoint, tree
from core.checkpoint import Bundle
from core.config import UserError
from core.lazy import StoredArray
from core.sharding import Rules, prefilling
from data.tokenizer import load as tokenizers
from data.tokenizer.base import Tokenizer
from infer import layout
from model import transformer
from model.config import ModelConfig
from model.ops import quantised
from model.ops.quantised import QuantConfig, Quantised, Table
from model.sizes import parts, weights
from model.transformer import Transformer


class BundleInfo(NamedTuple):
    """The properties of a bundle, known before its weights are read."""

    path: Path
    step: int
    config: ModelConfig
    tokenizer: Tokenizer | None

    def files(self, field: str) -> list[tuple[str, Path]]:
        """Returns what the bundle is made of, under its field: no output may go there."""
        names = checkpoint.CONFIG, checkpoint.TOKENIZER, "metrics.jsonl", str(self.step)
        return [(field, self.path / name) for name in names]


def find(path: str | Path, step: int | None = None, dtype: str = "") -> BundleInfo:
    """Opens the bundle at `path`, to compute in `dtype`; in what the bundle says if that is empty.

    UserError if there is none, or no such complete step.
    """
    bundle = Bundle(path)
    try:
        config = bundle.config(model=ModelConfig).model
        config = dataclasses.replace(config, dtype=dtype or config.dtype)
        tokenizer = tokenizers.load(bundle.tokenizer) if bundle.tokenizer else None
        found = BundleInfo(bundle.path, bundle.choose(step), config, tokenizer)
    finally:
        bundle.close()
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"but the model only {config.vocab_size}"
        )
    return found


def computing(
    config: ModelConfig, section: str, dtype: str, else_by: str = "as the bundle says"
) -> str:
    """The part of a header that tells the compute dtype, and what chose it.

    That is the field `dtype` of a section of the experiment, where it is not empty.
    """
    return f"computing in {config.dtype} ({f'{section}.dtype' if dtype else else_by})"


def restore(found: BundleInfo, rules: Rules, form: QuantConfig | None = None) -> Transformer:
    """The weights in the compute dtype, placed by `rules` on the mesh in use for decoding.

    Those that `form` rounds are read and rounded one after the other: few are ever floats.
    """
    abstract = in_compute_dtype(transformer.abstract(found.config, rules), found.config)
    bundle = Bundle(found.path)
    try:
        if form is None:
            model = bundle.restore(found.step, model=abstract).pop("model")
            leaves = tree.named_leaves(model)
            del model
            return layout.place(found.config, rules, leaves)
        bundle.check(found.step, model=abstract)
    finally:
        bundle.close()
    folder = found.path / str(found.step) / "model"
    leaves = {}
    for name, planned in tree.named_leaves(abstract).items():
        stored = StoredArray(folder, name)
        place = jax.NamedSharding(jax.sharding.get_mesh(), planned.sharding.spec)
        count, step = stored.shape[0], stored.shape[0]
        if parts.PLACE.match(name):  # layers, as many as are stored together
            step = stored.rows_at_once
        pieces = []
        for first in range(0, count, step):
            values = stored.read(first, min(first + step, count))
            pieces.append(_used_up(name, jax.device_put(values, place), found.config, form))
            del values  # before the next are read
        leaves[name] = jax.tree.map(lambda *x: jnp.concatenate(x), *pieces)
    return layout.place(found.config, rules, leaves)


def held(model: Transformer, form: QuantConfig | None = None) -> Transformer:
    """The same weights as `restore` gives them; each is used up as soon as it is rounded."""
    leaves = tree.named_leaves(model).items()
    leaves = {name: _used_up(name, x, model.config, form) for name, x in leaves}
    return layout.place(model.config, model.rules, leaves)


def shapes(config: ModelConfig, rules: Rules, form: QuantConfig | None = None) -> Transformer:
    """The model with shapes in place of arrays."""
    model = transformer.abstract(config, rules)
    if form is None:
        return in_compute_dtype(model, config)

    def leaf(name: str, x: jax.ShapeDtypeStruct) -> Any:
        return jax.eval_shape(lambda x: rounded_weight(name, x, config, form), x)

    leaves = tree.named_leaves(model).items()
    return tree.with_leaves(model, {name: leaf(name, x) for name, x in leaves})


def _used_up(name: str, x: jax.Array, config: ModelConfig, form: QuantConfig) -> Any:
    few_bits = rounded_weight(name, x, config, form)
    if isinstance(few_bits, Quantised | Table):
        x.delete()
    return few_bits


def rounded_weight(name: str, x: jax.Array, config: ModelConfig, form: QuantConfig | None) -> Any:
    """The parameter `name` as a model holds it whose weights are in `form`."""
    if form is None:
        return _cast(name, x, config)
    matrix = parts.matrices(config).get(name)
    if matrix is not None:
        return _quantise(x, matrix.input_dims, form, True)
    return _quantise_table(x) if weights.is_table(name) else _cast(name, x, config)


_quantise = jax.jit(quantised.quantise, static_argnums=(1, 2, 3))
_quantise_table = jax.jit(quantised.quantise_table)


def load(
    path: str | Path, step: int | None = None
) -> tuple[Transformer, Tokenizer | None, ModelConfig, int]:
    """(model, tokenizer, config, step) of a bundle, on the mesh in use."""
    found = find(path, step)
    return restore(found, prefilling()), found.tokenizer, found.config, found.step


def in_compute_dtype(model: Transformer, config: ModelConfig) -> Transformer:
    """Weights as they are multiplied: same numbers, fewer bytes a token. Norms stay."""
    leaves = tree.named_leaves(model)
    return tree.with_leaves(model, {name: _cast(name, x, config) for name, x in leaves.items()})


def _cast(name: str, x: Any, config: ModelConfig) -> Any:
    if "norm" in name:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, config.compute_dtype, sharding=x.sharding)
    return x.astype(config.compute_dtype)
