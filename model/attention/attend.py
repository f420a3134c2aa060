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
    gather,
    local,
    reference,
    ring,
    select,
    ulysses,
)
from model.attention.blocks import Pair, Part
from model.attention.pairs import Pairs
from model.attention.picked import Picked
from model.attention.spec import AttentionSpec, Heads, Where
from model.flops import keys_seen

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
    heads: Heads = Heads(),  # noqa: B008 (immutable)
) -> jax.Array:
    """out [B, T, N, H]: the tokens of each row attend to each other as `spec` says.

    Arguments are sharded by `rules`; N is a multiple of K, and both divide over act_heads.
    """
    attention = Call.of(q_BTNH, k_BTKH, spec, kernel, rules).way.attention
    q_spec = rules("batch", "length", "act_heads", None)
    kv_spec = rules("batch", "length", "act_kv_heads", None)
    at_spec = Where(rules("batch", "length"), rules("batch", "length"))
    heads_spec = heads_sharding(heads, rules)

    def of_device(q_BTNH, k_BTKH, v_BTKH, heads, at):
        if spec.kind == "moba":
            axes = rules.axes("length")
            chosen_BTNC = select.moba(q_BTNH, k_BTKH, at, spec.block, spec.top, axes)
            heads = heads._replace(chosen=chosen_BTNC)
        # The gradient of what all shards share is summed where it is made to vary.
        heads = jax.tree.map(lambda x_N: blocks.vary(x_N, q_BTNH), heads)
        return attention(q_BTNH, k_BTKH, v_BTKH, heads, at, at)

    return jax.shard_map(
        of_device, in_specs=(q_spec, kv_spec, kv_spec, heads_spec, at_spec), out_specs=q_spec
    )(q_BTNH, k_BTKH, v_BTKH, heads, at)


def heads_sharding(heads: Heads, rules: Rules) -> Heads:
    """The PartitionSpec of each field that is there."""
    head = rules("act_heads")
    specs = Heads(head, head, rules("batch", "length", "act_heads", None))
    return Heads(*(None if x is None else spec for x, spec in zip(heads, specs, strict=True)))


def kernel_of(name: str) -> ModuleType:
    """The kernel that is meant; `auto` is logged."""
    if name == "auto":
        _log_once("attention_kernel=auto: chunked")
        return chunked
    if name not in KERNELS:
        raise UserError(f"attention_kernel={name!r} is not one of auto, {', '.join(KERNELS)}")
    return KERNELS[name]


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
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device else "a mesh without devices"
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

    @classmethod
    def of(
        cls, q_BTNH: jax.Array, k_BTKH: jax.Array, spec: AttentionSpec, kernel: str, rules: Rules
    ) -> "Call":
        """The call for these arrays."""
        how = kernel_of(kernel)
        return cls(how, spec, rules, q_BTNH.shape, k_BTKH.shape[2], q_BTNH.dtype.itemsize)

    @property
    def way(self) -> "Way":
        """What the strategy that `rules` ask for, or that is chosen for them, does."""
        return STRATEGIES[_strategy(self)](self)

    @property
    def pair(self) -> Pair | Picked:
        pair = Pair(self.kernel, self.spec.mask, self.q_shape[-1] ** -0.5, self.spec.softcap)
        return Picked(pair, self.spec.block) if self.spec.top else pair

    def once_sorted(self, way: "Way") -> "Way":
        """`way`, its queries' choices sorted before: once for all hops."""

        def sorting(f, q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at):
            heads = heads._replace(chosen=Pairs.of(heads.chosen, q_at))
            return f(q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at)

        return Way(*(functools.partial(sorting, f) for f in way)) if self.spec.top else way

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
            rows * tokens * float(keys_seen(self.spec, T).mean()),
            self.hops,
            rules.layout == "contiguous",
            not self.spec.mask.reach,
        )


class Way(NamedTuple):
    """A strategy at work on one device: f(q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at) of its tokens.

    `attention` gives out in q's dtype, the sinks counted in, and can be differentiated; `part`
    gives (out, lse) in float32 without sinks, to be merged with what else the tokens see.
    """

    attention: Callable[..., jax.Array]
    part: Callable[..., Part]


def _local(call: Call) -> Way:
    return call.once_sorted(Way(functools.partial(local.attention, call.pair), call.pair.forward))


def _allgather(call: Call) -> Way:
    axes = call.rules.axes("length")
    functions = gather.attention, gather.forward
    return call.once_sorted(Way(*(functools.partial(f, axes, call.pair) for f in functions)))


def _ring(call: Call) -> Way:
    rules = call.rules
    size = rules.ring_size()
    places = ring.Ring(rules.axes("length"), size, rules.ulysses, call.hops)
    way = Way(*(functools.partial(f, places, call.pair) for f in (ring.attention, ring.forward)))
    way = call.once_sorted(way)
    return way if rules.ulysses == 1 else _exchange(call, rules.ulysses, way)


def _ulysses(call: Call) -> Way:
    return _exchange(call, call.rules.size("length"), _local(call))


def _exchange(call: Call, degree: int, inner: Way) -> Way:
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
    exchanged = functools.partial(ulysses.attention, rules.axes("length"), groups)
    return Way(*(functools.partial(exchanged, f) for f in inner))


STRATEGIES: dict[str, Callable[[Call], Way]] = {
    "local": _local,
    "allgather": _allgather,
    "ring": _ring,
    "ulysses": _ulysses,
}


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)
