"""WHERE, by name: what each `mesh.strategy` does with a kernel, and which one `auto` means.

call = Call.of(q_BTNH, k_BTKH, at, full(), "chunked", rules)
out_BTNH = call.way.attention(q_BTNH, k_BTKH, v_BTKH, heads, at, at)        inside shard_map
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np

from core import layout
from core.compile import hardware
from core.config import Unsupported
from core.sharding import Rules, device_kind
from model.attention.block_topk.pairs import RoutingPairs
from model.attention.block_topk.picked import GatheredBlocks
from model.attention.block_topk.picked_tpu import GatheredBlocksTpu
from model.attention.blocks import MaskedKernel, PartialSoftmax
from model.attention.kernels import splash
from model.attention.kernels.table import kernel_of, log_once
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec
from model.attention.strategies import cost, gather, local, ring, ulysses

# Kernels that go to chosen blocks in a way of their own; to the others these are tiles.
PICKED: dict[ModuleType, type] = {splash: GatheredBlocksTpu}


def _strategy(call: "AttentionCall") -> str:
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


def _choose(call: "AttentionCall", shards: int) -> str:
    """Chooses the strategy of `auto` for this layer and logs it; the ring on an unknown chip."""
    kind = device_kind()
    chip = hardware.chip(kind)
    found = cost.seconds(call.work(), chip) if chip else {"ring": 0.0}
    choice = min(found, key=found.get)
    reason = cost.explain(found) if chip else f"no figures of {kind!r} to compare by"
    log_once(
        f"mesh.strategy=auto: {choice} for kind={call.spec.kind!r} over {shards} shards; {reason}"
    )
    return choice


class AttentionCall(NamedTuple):
    """The properties of a call that a strategy is made from; shapes are those of whole arrays."""

    kernel: ModuleType
    spec: AttentionSpec
    rules: Rules
    q_shape: tuple[int, int, int, int]
    num_kv_heads: int
    itemsize: int
    looks_ahead: bool = False  # queries see later tokens, up to their `until`

    @classmethod
    def of(
        cls,
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        at: Positions,
        spec: AttentionSpec,
        kernel: str,
        rules: Rules,
    ) -> "AttentionCall":
        """The call for these arrays."""
        looks_ahead = at.until_BT is not None
        if looks_ahead and (spec.top or spec.kind == "stream"):
            raise Unsupported(
                f"kind={spec.kind!r} with tokens that see later ones (until): it chooses from what "
                "is past; take 'full', 'sliding', 'chunked', 'block_sparse' or 'dilated'"
            )
        how = kernel_of(kernel, q_BTNH.shape[1] // rules.size("length"))
        sizes = q_BTNH.shape, k_BTKH.shape[2], q_BTNH.dtype.itemsize
        return cls(how, spec, rules, *sizes, looks_ahead)

    @property
    def way(self) -> "DistributedAttention":
        """The strategy that `rules` ask for, or that is chosen for them, made for this call."""
        return STRATEGIES[_strategy(self)](self)

    @property
    def pair(self) -> MaskedKernel | GatheredBlocks | GatheredBlocksTpu:
        pair = MaskedKernel(
            self.kernel, self.spec.mask, self.q_shape[-1] ** -0.5, self.spec.softcap
        )
        if not self.spec.top:
            return pair
        return PICKED.get(self.kernel, GatheredBlocks)(pair, self.spec.block, self.q_shape[1])

    def once_sorted(self, way: "DistributedAttention") -> "DistributedAttention":
        """`way`, its queries' choices sorted before: once for all hops."""

        def sorting(f, q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at):
            heads = heads._replace(chosen=RoutingPairs.of(heads.chosen, q_at))
            return f(q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at)

        return (
            DistributedAttention(*(functools.partial(sorting, f) for f in way))
            if self.spec.top
            else way
        )

    @property
    def reach(self) -> tuple[int, int]:
        """Shards before and after its own that a token may see; a ring is all before.

        How far `until` lies ahead is not known here: then a window goes round the whole ring too.
        """
        size, window = self.rules.ring_size(), self.spec.mask.reach
        if not window or self.looks_ahead or self.rules.layout == "dealt":
            return size - 1, 0
        return layout.reach(self.rules.layout, self.q_shape[1], size, window)

    @property
    def ways(self) -> int:
        """Round the ring; one that ends early has no other half to send."""
        return 1 + (self.rules.both_ways and self.reach == (self.rules.ring_size() - 1, 0))

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
            rows * tokens * float(self.spec.keys_seen(T).mean()),
            1 + sum(self.reach),
            self.ways,
            rules.layout == "contiguous",
            not self.spec.mask.reach,
        )


class DistributedAttention(NamedTuple):
    """A strategy at work on one device: f(q_BTNH, k_BTKH, v_BTKH, heads, q_at, k_at) of its tokens.

    `attention` gives out in q's dtype, the sinks counted in, and can be differentiated; `part`
    gives (out, lse) in float32 without sinks, to be merged with what else the tokens see.
    """

    attention: Callable[..., jax.Array]
    part: Callable[..., PartialSoftmax]


def _local(call: AttentionCall) -> DistributedAttention:
    return call.once_sorted(
        DistributedAttention(functools.partial(local.attention, call.pair), call.pair.forward)
    )


def _allgather(call: AttentionCall) -> DistributedAttention:
    axes = call.rules.axes("length")
    functions = gather.attention, gather.forward
    return call.once_sorted(
        DistributedAttention(*(functools.partial(f, axes, call.pair) for f in functions))
    )


def _ring(call: AttentionCall) -> DistributedAttention:
    rules = call.rules
    place = rules.axes("length"), rules.ring_size(), rules.ulysses
    places = ring.Ring(*place, *call.reach, both_ways=call.ways == 2)
    way = DistributedAttention(
        *(functools.partial(f, places, call.pair) for f in (ring.attention, ring.forward))
    )
    way = call.once_sorted(way)
    return way if rules.ulysses == 1 else _exchange(call, rules.ulysses, way)


def _ulysses(call: AttentionCall) -> DistributedAttention:
    return _exchange(call, call.rules.size("length"), _local(call))


def _exchange(
    call: AttentionCall, degree: int, inner: DistributedAttention
) -> DistributedAttention:
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
    return DistributedAttention(*(functools.partial(exchanged, f) for f in inner))


STRATEGIES: dict[str, Callable[[AttentionCall], DistributedAttention]] = {
    "local": _local,
    "allgather": _allgather,
    "ring": _ring,
    "ulysses": _ulysses,
}
