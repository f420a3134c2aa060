"""The one entry of attention: picks where (strategy) and how (kernel), or raises with the reason.

attend(q_BTNH, k_BTKH, v_BTKH, at, full(), kernel="chunked", rules=training())
"""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np

from core import hardware
from core.config import Unsupported, UserError
from core.sharding import Rules
from model.attention import (
    blocks,
    chunked,
    cost,
    decode,
    gather,
    local,
    reference,
    ring,
    splash,
    ulysses,
)
from model.attention.blocks import Pair
from model.attention.spec import AttentionSpec, Heads, Where
from model.flops import keys_seen

log = logging.getLogger("cakrawala")

KERNELS: dict[str, ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "splash": splash,
}


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    at: Where,
    spec: AttentionSpec,
    *,
    kernel: str,
    rules: Rules,
    heads: Heads = Heads(),  # noqa: B008 (immutable)
) -> jax.Array:
    """out [B, T, N, H]: the tokens of each row attend to each other as `spec` says.

    Arguments are sharded by `rules`; N is a multiple of K, and both divide over act_heads.
    """
    kernel = _kernel(kernel, q_BTNH.shape[1] // rules.size("length"))
    call = Call(KERNELS[kernel], spec, rules, q_BTNH.shape, k_BTKH.shape[2], q_BTNH.dtype.itemsize)
    attention = STRATEGIES[_strategy(call)](call)
    q_spec = rules("batch", "length", "act_heads", None)
    kv_spec = rules("batch", "length", "act_kv_heads", None)
    at_spec = Where(rules("batch", "length"), rules("batch", "length"))
    heads_spec = jax.tree.map(lambda _: rules("act_heads"), heads)

    def of_device(q_BTNH, k_BTKH, v_BTKH, heads, at):
        # The gradient of what all shards share is summed where it is made to vary.
        heads = jax.tree.map(lambda x_N: blocks.vary(x_N, q_BTNH), heads)
        return attention(q_BTNH, k_BTKH, v_BTKH, heads, at, at)

    return jax.shard_map(
        of_device, in_specs=(q_spec, kv_spec, kv_spec, heads_spec, at_spec), out_specs=q_spec
    )(q_BTNH, k_BTKH, v_BTKH, heads, at)


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
    heads: Heads = Heads(),  # noqa: B008 (immutable)
) -> jax.Array:
    """out [B, T, N, H]: new tokens attend to what `cache` holds and to each other.

    The cache is only read: the caller writes the new keys and values after the last layer, so
    that a ring buffer never loses a key that a token of the same chunk still sees.
    """
    _check_cached(spec, q_BTNH.shape[1])
    kernel = _kernel(kernel, q_BTNH.shape[1])
    pair = Pair(KERNELS[kernel], spec.mask, q_BTNH.shape[-1] ** -0.5, spec.softcap)

    def merged(q_BTNH, k_BTKH, v_BTKH, heads, at, cache):
        old = decode.forward(q_BTNH, cache, heads, at, pair)
        new = pair.forward(q_BTNH, k_BTKH, v_BTKH, heads, at, at)
        return blocks.add_sink(blocks.merge(old, new), heads)[0].astype(q_BTNH.dtype)

    q_spec = rules("batch", None, "act_heads", None)
    kv_spec = rules("batch", None, "act_kv_heads", None)
    at_spec = Where(rules("batch", None), rules("batch", None))
    heads_spec = jax.tree.map(lambda _: rules("act_heads"), heads)
    cache_spec = decode.Stored.sharding(rules)
    in_specs = q_spec, kv_spec, kv_spec, heads_spec, at_spec, cache_spec
    return jax.shard_map(merged, in_specs=in_specs, out_specs=q_spec)(
        q_BTNH, k_BTKH, v_BTKH, heads, at, cache
    )


def _check_cached(spec: AttentionSpec, tokens: int) -> None:
    """Unsupported where what a token sees is not there yet when it is read."""
    if spec.kind == "bidirectional":
        raise Unsupported(
            "kind='bidirectional' sees what comes later, so it cannot be decoded token by token: "
            "run it without a cache, or take kind='full' or 'prefix'"
        )
    if 1 < tokens < spec.prefix:
        raise Unsupported(
            f"kind='prefix' with prefix={spec.prefix} in prefill chunks of {tokens} tokens: a "
            "chunk must hold the whole prefix; raise the chunk, or shorten the prefix"
        )


def _kernel(name: str, tokens: int) -> str:
    """The kernel for so many queries of a device; what `auto` means and why is logged."""
    kind = _device_kind()
    on_tpu = kind.startswith("TPU")
    if name == "auto":
        name = "splash" if on_tpu and tokens >= splash.LANES else "chunked"
        few = f": {tokens} tokens a device do not fill the {splash.LANES} lanes of splash"
        reason = few if on_tpu and name == "chunked" else ""
        _log_once(f"attention_kernel=auto: {name} for {kind}{reason}")
    elif name not in KERNELS:
        raise UserError(f"attention_kernel={name!r} is not one of auto, {', '.join(KERNELS)}")
    elif name == "splash" and not on_tpu:
        _log_once(
            f"attention_kernel=splash is for TPUs: on {kind} it is interpreted, right but slow"
        )
    return name


def _device_kind() -> str:
    """Of the mesh in use, which under train.aot is not that of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else "a mesh without devices"


def _strategy(call: "Call") -> str:
    shards, choice = call.rules.size("length"), call.rules.strategy
    if shards == 1:
        return "local"  # whole rows: every strategy is this one
    if choice == "auto":
        return _choose(call, shards)
    if choice == "local":
        raise Unsupported(
            f"mesh.strategy='local' needs whole rows, but the length has {shards} shards: "
            "use 'ring', 'allgather' or 'ulysses', or mesh.seq=1"
        )
    return choice


def _choose(call: "Call", shards: int) -> str:
    """What strategy=auto means for this layer, logged; the ring where the chip is not known."""
    kind = _device_kind()
    chip = hardware.chip(kind)
    found = cost.seconds(call.work(), chip) if chip else {"ring": 0.0}
    choice = min(found, key=found.get)
    reason = cost.explain(found) if chip else f"no figures of {kind!r} to compare by"
    _log_once(
        f"mesh.strategy=auto: {choice} for kind={call.spec.kind!r} over {shards} shards; {reason}"
    )
    return choice


class Call(NamedTuple):
    """What a strategy is made from; shapes are those of whole arrays."""

    kernel: ModuleType
    spec: AttentionSpec
    rules: Rules
    q_shape: tuple[int, int, int, int]
    num_kv_heads: int
    itemsize: int

    @property
    def pair(self) -> Pair:
        return Pair(self.kernel, self.spec.mask, self.q_shape[-1] ** -0.5, self.spec.softcap)

    @property
    def hops(self) -> int:
        size = self.rules.ring_size()
        contiguous = self.rules.layout == "contiguous"
        return ring.hops(self.spec.mask, size, self.q_shape[1] // size, contiguous)

    def work(self) -> cost.Work:
        """One device's part, for the cost model; documents are taken to fill their rows."""
        rules, (B, T, N, H) = self.rules, self.q_shape
        shards = rules.size("length")
        rows, tokens = B // rules.size("batch"), T // shards
        return cost.Work(
            rows,
            tokens,
            shards,
            N // rules.size("act_heads"),
            self.num_kv_heads // rules.size("act_kv_heads"),
            H,
            self.itemsize,
            rows * tokens * float(keys_seen(self.spec.mask, T).mean()),
            self.hops,
            rules.layout == "contiguous",
            not self.spec.mask.reach,
        )


# attention(q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at) -> out_BTNH of the tokens of one device.
Attention = Callable[[jax.Array, jax.Array, jax.Array, Heads, Where, Where], jax.Array]


def _local(call: Call) -> Attention:
    return functools.partial(local.attention, call.pair)


def _allgather(call: Call) -> Attention:
    return functools.partial(gather.attention, call.rules.axes("length"), call.pair)


def _ring(call: Call) -> Attention:
    rules = call.rules
    size = rules.ring_size()
    places = ring.Ring(rules.axes("length"), size, rules.ulysses, call.hops)
    inner = functools.partial(ring.attention, places, call.pair)
    return inner if rules.ulysses == 1 else _exchange(call, rules.ulysses, inner)


def _ulysses(call: Call) -> Attention:
    return _exchange(call, call.rules.size("length"), _local(call))


def _exchange(call: Call, degree: int, inner: Attention) -> Attention:
    rules = call.rules
    N = call.q_shape[2] // rules.size("act_heads")
    K = call.num_kv_heads // rules.size("act_kv_heads")
    if not ulysses.deals(N, K, degree):
        raise Unsupported(
            f"kind={call.spec.kind!r} with mesh.strategy={rules.strategy!r} exchanges heads "
            f"between {degree} devices, but there are {N} query heads and {K} kv heads to deal: "
            f"{degree} must divide {N}, and divide {K} or be a multiple of it. "
            "Use mesh.strategy='ring' with mesh.ulysses=1, or 'allgather', for any heads"
        )
    groups = np.arange(rules.size("length")).reshape(-1, degree).tolist()
    return functools.partial(ulysses.attention, rules.axes("length"), groups, inner)


STRATEGIES: dict[str, Callable[[Call], Attention]] = {
    "local": _local,
    "allgather": _allgather,
    "ring": _ring,
    "ulysses": _ulysses,
}


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)
