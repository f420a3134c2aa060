"""The jitted steps: one optimizer update with donated state, and one evaluation batch."""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from core import tree
from core.sharding import Rules
from data.batch import Batch
from model.transformer import Remat, Transformer
from train.config import TrainConfig
from train.loss import next_token_loss
from train.optimizer import groups, schedule, trained
from train.state import TrainState

Metrics = dict[str, jax.Array]


class Objective(Protocol):
    """A function of the model and a batch that a step minimises, most often of token_logprobs."""

    def __call__(self, model: Transformer, batch: Batch, remat: Remat) -> tuple[jax.Array, Metrics]:
        """Returns the loss and metrics, float32 sums over the weighted tokens of the batch.

        The step divides both by the number of these tokens, over all microbatches. Only the loss
        is differentiated; "loss" is the metric that is logged and evaluated.
        """
        ...


def next_token(
    model: Transformer, batch: Batch, remat: Remat, z_loss: float = 0.0
) -> tuple[jax.Array, Metrics]:
    """The objective of pre-training: negative log-likelihood of the next token, in nats."""
    hidden_BTD, _ = model(batch.tokens, batch.positions, batch.segments, remat=remat)
    how = dict(z_loss=z_loss, softcap=model.config.logit_softcap, rules=model.rules)
    loss, nll = next_token_loss(hidden_BTD, model.head(), batch.targets, batch.weights, **how)
    return loss, {"loss": nll}


def make_train_step(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    rules: Rules,
    objective: Objective | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`step(state, batch) -> state, metrics`; losses are means over weighted tokens.

    `objective` is `next_token` with `config.z_loss` if there is none.
    """
    rate = schedule(config)
    objective = objective or functools.partial(next_token, z_loss=config.z_loss)

    def gradient(model, batch, num_tokens):
        def mean_loss(model):
            loss, sums = objective(model, batch, config.remat)
            return loss / num_tokens, jax.tree.map(lambda x: x / num_tokens, sums)

        (_, means), grads = jax.value_and_grad(mean_loss, has_aux=True)(model)
        return means, grads

    def step(state: TrainState, batch: Batch):
        # Each microbatch is divided by the tokens of the whole batch: their sum is the mean.
        num_tokens = jnp.maximum(batch.weights.sum(), 1.0)
        if config.accumulation == 1:
            means, grads = gradient(state.model, batch, num_tokens)
        else:

            def add(total, microbatch):
                return jax.tree.map(
                    jnp.add, total, gradient(state.model, microbatch, num_tokens)
                ), None

            _, sums = jax.eval_shape(lambda m: objective(m, batch, config.remat), state.model)
            zeros = dict.fromkeys(sums, jnp.float32(0))
            start = zeros, jax.tree.map(jnp.zeros_like, state.model)
            (means, grads), _ = jax.lax.scan(add, start, _microbatches(batch, config, rules))
        parameters, grads = tree.named_leaves(state.model), tree.named_leaves(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, parameters)
        moves = trained(groups(config, parameters))
        model = tree.with_leaves(state.model, optax.apply_updates(parameters, updates))
        metrics = {
            **means,
            # The norm that clipping bounds: frozen parameters take no part in either.
            "grad_norm": optax.global_norm({name: g for name, g in grads.items() if moves[name]}),
            "learning_rate": rate(state.step),
            "tokens": num_tokens,
            "tokens_read": (batch.segments > 0).sum(),
        }
        return TrainState(state.step + 1, model, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


def _microbatches(batch: Batch, config: TrainConfig, rules: Rules) -> Batch:
    """[B, T] -> [A, B / A, T]; microbatch a takes rows a, a + A, ...: each stays on its device."""

    def split(x_BT):
        B, T = x_BT.shape
        shape = B // config.accumulation, config.accumulation, T
        x_bAT = x_BT.reshape(shape, out_sharding=rules("batch", None, "length"))
        return jnp.moveaxis(x_bAT, 1, 0)

    return jax.tree.map(split, batch)


@jax.jit
def eval_step(model: Transformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(nll, tokens): sums over the weighted tokens of the batch, float32."""
    _, sums = next_token(model, batch, remat="none")
    return sums["loss"], batch.weights.sum()
