"""The one entry of attention: picks where (strategy) and how (kernel), or raises with the reason.

attend(q_BTNH, k_BTKH, v_BTKH, at, full(), kernel="chunked", rules=training())
"""

import functools
import logging
from types import ModuleType

import jax

from core.config import UserError
from core.sharding import Rules
from model.attention import blocks, chunked, decode, gather, local, reference
from model.attention.spec import AttentionSpec, Where

log = logging.getLogger("cakrawala")

KERNELS: dict[str, ModuleType] = {"reference": reference, "chunked": chunked}


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    at: Where,
    spec: AttentionSpec,
    *,
    kernel: str,
    rules: Rules,
) -> jax.Array:
    """out [B, T, N, H]: the tokens of each row attend to each other as `spec` says.

    Arguments are sharded by `rules`; N is a multiple of K, and both divide over act_heads.
    """
    scale = q_BTNH.shape[-1] ** -0.5
    static = (KERNELS[_kernel(kernel)], spec.mask, scale, spec.softcap)
    if _strategy(rules) == "local":
        local_attention = functools.partial(local.attention, *static)
    else:
        local_attention = functools.partial(gather.attention, rules.axes("length"), *static)
    q_spec = rules("batch", "length", "act_heads", None)
    kv_spec = rules("batch", "length", "act_kv_heads", None)
    at_spec = Where(rules("batch", "length"), rules("batch", "length"))
    return jax.shard_map(
        local_attention, in_specs=(q_spec, kv_spec, kv_spec, at_spec, at_spec), out_specs=q_spec
    )(q_BTNH, k_BTKH, v_BTKH, at, at)


def attend_cached(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    at: Where,
    cache: decode.Stored,
    spec: AttentionSpec,
    *,
    kernel: str,
    rules: Rules,
) -> jax.Array:
    """out [B, T, N, H]: new tokens attend to what `cache` holds and to each other.

    The cache is only read: the caller writes the new keys and values after the last layer, so
    that a ring buffer never loses a key that a token of the same chunk still sees.
    """
    scale = q_BTNH.shape[-1] ** -0.5
    block = KERNELS[_kernel(kernel)]

    def merged(q_BTNH, k_BTKH, v_BTKH, at, cache):
        old = decode.forward(q_BTNH, cache, at, spec.mask, scale=scale, softcap=spec.softcap)
        new = block.forward(
            q_BTNH, k_BTKH, v_BTKH, at, at, spec.mask, scale=scale, softcap=spec.softcap
        )
        return blocks.merge(old, new)[0].astype(q_BTNH.dtype)

    q_spec = rules("batch", None, "act_heads", None)
    kv_spec = rules("batch", None, "act_kv_heads", None)
    at_spec = Where(rules("batch", None), rules("batch", None))
    cache_spec = decode.Stored.sharding(rules)
    return jax.shard_map(
        merged, in_specs=(q_spec, kv_spec, kv_spec, at_spec, cache_spec), out_specs=q_spec
    )(q_BTNH, k_BTKH, v_BTKH, at, cache)


def _kernel(name: str) -> str:
    if name == "auto":
        _log_once("attention_kernel=auto: chunked")
        return "chunked"
    if name not in KERNELS:
        raise UserError(f"attention_kernel={name!r} is not one of auto, {', '.join(KERNELS)}")
    return name


def _strategy(rules: Rules) -> str:
    shards = rules.size("length")
    if rules.strategy == "auto":
        choice = "allgather" if shards > 1 else "local"
        _log_once(f"mesh.strategy=auto: {choice}, the length has {shards} shard(s)")
        return choice
    if rules.strategy == "local" and shards > 1:
        raise NotImplementedError(
            f"mesh.strategy='local' needs whole rows, but the length has {shards} shards: "
            "use 'allgather', or mesh.seq=1"
        )
    return rules.strategy


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)
