"""The cost model of `mesh.strategy=auto`: seconds of one layer, forward and backward.

With c tokens a device on P devices, B rows, N query and K kv heads of width H, and `pairs` (query,
key) that a device sees a head, at rates F FLOP/s (of which kernels reach EFFICIENCY) and L bytes/s
(one direction of one link):

    products     4 H N pairs / F forward, 10 H N pairs / F backward
    kv           2 B c K H bytes of one shard's keys and values; their gradients are float32
    ring         sends overlap with hops: the first, then (hops - 1) max(products / hops, kv / L),
                 or kv / 2 L both ways round
    allgather    products + (P - 1) kv / 2 L, both ways round; gradients scatter home like that
    ulysses      products + 2 q + kv exchanged, twice; on a torus a link is loaded P / 8 times

In order, the last shard of a causal row has (2 - 1 / P) times the mean of the pairs, and all
wait for it. A balanced ring in bfloat16 hides its forward sends from c = 2 (K / N) F / L on.
"""

from typing import NamedTuple

from core.compile.hardware import Chip
from model.attention.strategies import ulysses

EFFICIENCY = 0.5  # of the peak, in kernels
FORWARD, BACKWARD = 4, 10  # FLOPs a pair and unit of head width
GATHERED = 0.1  # of a device's memory, at most, for the keys and values that allgather holds


class Work(NamedTuple):
    """One layer on one device."""

    rows: int
    tokens: int
    shards: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    pairs: float  # a head, the mean of all devices
    hops: int  # shards that a query may see
    ways: int  # round the ring
    in_order: bool  # a contiguous layout
    reaches_all: bool  # of what is earlier: then later shards have more to do

    def kv(self, heads: int | None = None, itemsize: int | None = None) -> int:
        """Bytes of one shard's keys and values."""
        width = (heads or self.kv_heads) * self.head_dim * (itemsize or self.itemsize)
        return 2 * self.rows * self.tokens * width


def seconds(work: Work, chip: Chip) -> dict[str, float]:
    """Predicted seconds of each strategy that can do this `work`."""
    rate = chip.flops * EFFICIENCY
    products = [f * work.head_dim * work.heads * work.pairs / rate for f in (FORWARD, BACKWARD)]
    late = (
        [s * (2 - 1 / work.shards) for s in products]
        if work.in_order and work.reaches_all
        else products
    )
    found = {"ring": _ring(work, chip, late)}
    if work.shards * (work.kv() + work.kv(itemsize=4)) <= GATHERED * chip.hbm_bytes:
        found["allgather"] = _allgather(work, chip, late)
    deals = ulysses.deals(work.heads, work.kv_heads, work.shards)
    if deals and work.in_order:  # tiles of a permuted length would all be visited
        found["ulysses"] = _ulysses(work, chip, products)
    return found


def _link(chip: Chip) -> float:
    return chip.links / (2 * chip.ports)


def _ring(work: Work, chip: Chip, products: list[float]) -> float:
    # What leaves by a switch leaves by one port, wherever it goes.
    link, sends = _link(chip) * min(work.ways, chip.ports), work.hops - 1
    forward, backward = (s / work.hops for s in products)
    kv, dkv = work.kv() / link, work.kv(itemsize=4) / link
    home = work.kv() / link * min(sends, work.shards - sends)
    there = forward + sends * max(forward, kv)
    return there + backward + sends * max(backward, kv + dkv) + home


def _allgather(work: Work, chip: Chip, products: list[float]) -> float:
    both_ways = 2 * _link(chip)
    moved = (work.shards - 1) * (2 * work.kv() + work.kv(itemsize=4))
    return sum(products) + moved / both_ways


def _ulysses(work: Work, chip: Chip, products: list[float]) -> float:
    q = work.rows * work.tokens * work.heads * work.head_dim * work.itemsize
    moved = 2 * (2 * q + work.kv(max(work.kv_heads, work.shards)))
    crowding = max(1.0, work.shards / 8) if chip.ports > 1 else 1.0
    return sum(products) + moved * crowding / _link(chip)


def explain(found: dict[str, float]) -> str:
    """The prediction in one line."""
    return ", ".join(f"{name} {s * 1e3:.3g} ms" for name, s in found.items())
