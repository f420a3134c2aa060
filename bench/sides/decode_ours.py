"""Worker of bench.decode: our decode loop at a depth, on a cache that says it is full so far."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bench import decode as bench
from bench.sides import turns
from core import backend, sharding
from core.sharding import MeshConfig, make_mesh
from infer import load
from infer.engine import Engine, Plan
from infer.sampling.params import Sampling, pack
from infer.steps import STEPS
from model import transformer
from model.cache.kv_cache import KVCache
from model.config import ModelConfig
from model.sizes import weights


def model_config(dtype: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=bench.VOCAB,
        context=2**20,
        num_layers=bench.LAYERS,
        embed_dim=bench.WIDTH,
        num_heads=bench.HEADS,
        num_kv_heads=bench.HEADS,
        head_dim=bench.WIDTH // bench.HEADS,
        mlp_dim=bench.MLP,
        dtype=dtype,
    )


def filled(cache: KVCache, context: int) -> KVCache:
    """Returns the cache as if it had read `context` tokens, whose keys and values are zeros."""
    slots = []
    for slot in cache.slots:
        at_S = jnp.arange(slot.positions_BS.shape[1])
        at_BS = jnp.where(at_S < context, at_S, -1)[None] + 0 * slot.positions_BS
        slots.append(dataclasses.replace(slot, positions_BS=at_BS))
    return KVCache(tuple(slots), cache.seen_B + context)


@functools.cache
def program(dtype: str, batch: int, context: int, implementation: str = "") -> Callable[[], None]:
    """A call that makes TOKENS tokens more in each row; `implementation` may be int8 or int4."""
    config, rules = model_config(dtype), sharding.prefilling()
    numbers = implementation if implementation in weights.BITS else "compute"
    form = weights.rounding(config, rules, numbers, group=None)
    model = load.held(transformer.create(config, rules, jax.random.key(0)), form)
    engine = Engine(model, Plan(batch, context + bench.ROOM, 16, bench.ROOM))
    now = engine.empty()
    kv = jax.jit(functools.partial(filled, context=context), donate_argnums=0)(now.cache)
    prompts = [np.zeros(context, np.int32)] * batch
    hows = pack([Sampling(temperature=0, max_tokens=bench.ROOM)] * batch)
    state = engine.start(dataclasses.replace(now, cache=kv), prompts, [0] * batch, hows)
    stopped_B = np.zeros(batch, bool)

    def run():
        nonlocal state
        for _ in range(bench.TOKENS // STEPS):
            state, made = engine.advance(state, stopped_B)
        jax.block_until_ready(made)

    return run


def main() -> None:
    turns.serve(lambda task: program(**task)())


if __name__ == "__main__":
    backend.prepare()
    with jax.set_mesh(make_mesh(MeshConfig())):
        main()
