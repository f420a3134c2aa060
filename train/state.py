"""`TrainState`: all that a step changes."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from core import tree
from core.sharding import Rules
from model import transformer
from model.config import ModelConfig
from model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts finished optimizer steps, int32."""

    step: jax.Array
    model: Transformer
    opt_state: optax.OptState


def create(
    config: ModelConfig, rules: Rules, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """A fresh state of random weights; every array is born where `rules` put it."""
    return begin(transformer.create(config, rules, jax.random.key(seed)), optimizer)


def begin(model: Transformer, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step of a run that begins with `model`."""
    opt_state = jax.jit(optimizer.init)(tree.named_leaves(model))
    return TrainState(jnp.int32(0), model, opt_state)


def abstract(
    config: ModelConfig, rules: Rules, optimizer: optax.GradientTransformation
) -> TrainState:
    """The same with shapes, dtypes and shardings in place of arrays."""
    model = transformer.abstract(config, rules)
    opt_state = jax.eval_shape(optimizer.init, tree.named_leaves(model))
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), model, opt_state)
