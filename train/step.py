"""The jitted steps: one optimizer update with donated state, and one evaluation batch."""

from collections.abc import Callable

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


def loss_sums(
    model: Transformer, batch: Batch, z_loss: float, remat: Remat
) -> tuple[jax.Array, jax.Array]:
    """(loss, nll) summed over the weighted tokens of the batch, float32 nats."""
    hidden_BTD, _ = model(batch.tokens, batch.positions, batch.segments, remat=remat)
    how = dict(z_loss=z_loss, softcap=model.config.logit_softcap, rules=model.rules)
    return next_token_loss(hidden_BTD, model.head(), batch.targets, batch.weights, **how)


def make_train_step(
    config: TrainConfig, optimizer: optax.GradientTransformation, rules: Rules
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`step(state, batch) -> state, metrics`; the loss is a mean over weighted tokens, in nats."""
    rate = schedule(config)

    def gradient(model, batch, num_tokens):
        def mean_loss(model):
            loss, nll = loss_sums(model, batch, config.z_loss, config.remat)
            return loss / num_tokens, nll / num_tokens

        (_, nll), grads = jax.value_and_grad(mean_loss, has_aux=True)(model)
        return nll, grads

    def step(state: TrainState, batch: Batch):
        # Each microbatch is divided by the tokens of the whole batch: their sum is the mean.
        num_tokens = jnp.maximum(batch.weights.sum(), 1.0)
        if config.accumulation == 1:
            nll, grads = gradient(state.model, batch, num_tokens)
        else:

            def add(total, microbatch):
                return jax.tree.map(
                    jnp.add, total, gradient(state.model, microbatch, num_tokens)
                ), None

            zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.model)
            (nll, grads), _ = jax.lax.scan(add, zeros, _microbatches(batch, config, rules))
        parameters, grads = tree.named_leaves(state.model), tree.named_leaves(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, parameters)
        moves = trained(groups(config, parameters))
        model = tree.with_leaves(state.model, optax.apply_updates(parameters, updates))
        metrics = {
            "loss": nll,
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
    _, nll = loss_sums(model, batch, z_loss=0.0, remat="none")
    return nll, batch.weights.sum()
