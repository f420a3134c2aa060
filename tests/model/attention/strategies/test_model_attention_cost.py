"""The cost model: formulas by hand, known crossings, and what `auto` makes of them."""

import dataclasses
import logging

import jax
import pytest
from conftest import make_mesh
from test_model_attention_strategies import call

from core import sharding
from core.compile import hardware
from model.attention.kernels import table as kernels
from model.attention.spec import full, sliding
from model.attention.strategies import cost

V5P = hardware.CHIPS["TPU v5"]
LINK = 1e11  # bytes/s of one direction of one v5p link


def work(tokens=8192, shards=8, heads=32, kv_heads=8, hops=None, ways=1, in_order=False, far=True):
    """A causal layer of bfloat16, head width 128."""
    length = tokens * shards
    pairs = tokens * (length + 1) / 2
    hops = shards if hops is None else hops
    return cost.Work(1, tokens, shards, heads, kv_heads, 128, 2, pairs, hops, ways, in_order, far)


def test_ring_by_hand():
    one = work()
    forward = 4 * 128 * 32 * one.pairs / (V5P.flops / 2)
    kv = 2 * 8192 * 8 * 128 * 2 / LINK
    hop, hop_back = forward / 8, 2.5 * forward / 8
    assert hop > kv and hop_back > 3 * kv, "hidden: only products and the way home are left"
    assert cost.seconds(one, V5P)["ring"] == pytest.approx(3.5 * forward + kv)
    few = cost.seconds(work(tokens=128), V5P)["ring"]
    kv, products = kv / 64, 4 * 128 * 32 * work(tokens=128).pairs / (V5P.flops / 2) / 8
    assert few == pytest.approx(3.5 * products + 7 * kv + 7 * 3 * kv + kv), "sends are all"


def test_a_torus_sends_both_ways_in_half_the_time():
    """8 tokens a device: sends are all, but for products of the first hops and the way home."""
    one_way, both = (cost.seconds(work(tokens=8, ways=ways), V5P)["ring"] for ways in (1, 2))
    assert both == pytest.approx(one_way / 2, rel=0.01)
    switch = hardware.CHIPS["NVIDIA H100 80GB HBM3"]
    assert cost.seconds(work(ways=2), switch) == cost.seconds(work(), switch)


def test_a_ring_in_order_waits_for_its_last_shard():
    balanced, in_order = work(), work(in_order=True)
    forward = 4 * 128 * 32 * balanced.pairs / (V5P.flops / 2)
    more = cost.seconds(in_order, V5P)["ring"] - cost.seconds(balanced, V5P)["ring"]
    assert more == pytest.approx(3.5 * forward * (1 - 1 / 8))


def test_who_can():
    assert set(cost.seconds(work(in_order=True), V5P)) == {"ring", "allgather", "ulysses"}
    assert "ulysses" not in cost.seconds(work(), V5P), "the length is permuted"
    assert "ulysses" not in cost.seconds(work(heads=20, kv_heads=20, in_order=True), V5P)
    assert "allgather" not in cost.seconds(work(tokens=2**18), V5P), "keys of 2M tokens"


def test_short_shards_gather_and_long_ones_go_round():
    """2K tokens a device, MHA: MaxText measured the same on v5p (maxtext#4687)."""
    short = cost.seconds(work(tokens=2048, shards=16, heads=32, kv_heads=32), V5P)
    assert short["allgather"] < short["ring"]
    long = cost.seconds(work(tokens=32768, shards=16, heads=32, kv_heads=8), V5P)
    assert long["ring"] < long["allgather"]


def test_a_window_in_order_is_a_ring_of_two_hops():
    near = work(hops=2, in_order=True, far=False)
    near = near._replace(pairs=8192 * 1024.0)
    found = cost.seconds(near, V5P)
    assert min(found, key=found.get) == "ring"


@pytest.mark.parametrize(("kind", "spec"), [("full", full()), ("sliding", sliding(8))])
def test_auto_logs_what_it_chose_and_why(monkeypatch, caplog, kind, spec):
    kernels.log_once.cache_clear()
    monkeypatch.setattr(hardware, "chip", lambda name: dataclasses.replace(V5P, flops=1e20))
    with jax.set_mesh(make_mesh((1, 4, 1))), caplog.at_level(logging.INFO, "cakrawala"):
        function, arguments = call(sharding.training(), spec, heads=(4, 4))
        jax.jit(function).lower(*arguments)
    assert f"for kind='{kind}' over 4 shards; ring" in caplog.text
    assert all(name in caplog.text for name in ("allgather", "ulysses"))


def test_auto_is_the_ring_where_nothing_is_known(caplog):
    kernels.log_once.cache_clear()
    with jax.set_mesh(make_mesh((1, 4, 1))), caplog.at_level(logging.INFO, "cakrawala"):
        function, arguments = call(sharding.training(), full())
        jax.jit(function).lower(*arguments)
    assert "mesh.strategy=auto: ring for kind='full'" in caplog.text
    assert "no figures of 'cpu'" in caplog.text
