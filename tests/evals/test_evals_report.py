"""Arithmetic of the report: bytes, FLOPs and rates against numbers worked out by hand."""

import dataclasses

import infer_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh

from core import tree
from core.compile.hardware import GIB
from core.config import Unsupported, UserError
from evals.config import BenchConfig
from evals.report import cases as variants
from evals.report import predict, progress, rows
from evals.report.measuring import measure, peaks
from evals.report.measuring.measure import Measured
from evals.report.measuring.peaks import Peaks
from evals.report.progress import Bar, ProgressStep
from evals.report.show import plots
from infer import layout
from infer.engine import Engine, Plan
from model.attention.spec import full, moba, sliding
from model.cache.form import CacheConfig

# Two layers of full attention: D 16, N 4, K 2, H 8, F 32, V 320, tied, float32.
TWO = cases.model_config(num_layers=2, pattern=(full(),))
MATRICES = 2 * (16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 32)  # q, k and v, out, MLP
HEAD = 320 * 16
NORMS = 2 * 2 * 16 + 16
BEST = Peaks(bandwidth=1e9, flops=1e10)


def case(config=TWO):
    return variants.of(cases.random_model(config))[0]


def test_flops_by_hand():
    # Token t of 10 sees t + 1 keys: 55 in all; 4 N H for each, in two layers.
    attention = 2 * 4 * 4 * 8 * 55
    assert predict.prefill_flops(TWO, 1, 10) == 2 * MATRICES * 10 + attention
    assert predict.prefill_flops(TWO, 3, 10) == 3 * (2 * MATRICES * 10 + attention)
    step = 2 * (MATRICES + HEAD) + 2 * 4 * 4 * 8 * 11
    assert predict.decode_flops(TWO, 1, 10) == step
    assert predict.decode_flops(TWO, 3, 10) == 3 * step


def test_bytes_by_hand(one_device):
    weights = 4 * (MATRICES + HEAD + NORMS)
    need = predict.memory(case(), Plan(3, 10, 4))
    token = 2 * 2 * 2 * 8 * 4  # layers, k and v, kv heads, head dim, bytes
    assert need.weights == predict.weight_bytes_read(case().model) == weights
    kv, positions, seen = 3 * 10 * token, 3 * 10 * 4, 3 * 4
    assert need.kv == kv + positions + seen
    assert predict.kv_bytes_read(case(), 3, 10) == kv
    assert need.total == need.weights + need.kv + need.temporaries
    untied = case(dataclasses.replace(TWO, tied_head=False, learned_positions=True))
    assert predict.weight_bytes_read(untied.model) == weights  # no table that is looked up in


def test_kinds_read_what_a_token_sees(one_device):
    token = 2 * 2 * 8 * 4
    ring = case(cases.model_config(num_layers=1, pattern=(sliding(6),)))
    assert predict.kv_bytes_read(ring, 1, 40) == 6 * token
    chooses = case(cases.model_config(num_layers=1, pattern=(moba(block=8, top=2),)))
    means = 5 * 2 * 8 * 4  # of 5 whole blocks, keys alone in float32
    assert predict.kv_bytes_read(chooses, 1, 40) == 16 * token + means


def test_kinds_of_cache_are_a_line_each(one_device):
    """Full attention of 2 layers, 2 kv heads of 8: bytes of 40 tokens that a step reads."""
    model = cases.random_model(TWO)
    kinds = ("int8", "k8v4", "stream", "quest")
    found = {case.kv: case for case in variants.of(model, CacheConfig(), (*kinds, "plain"))}
    assert list(found) == ["plain", "int8", "k8v4", "stream 1024+4", "quest 128x16"]
    assert {case.name for case in found.values()} >= {"full", "full, int8"}
    vectors = 40 * 2 * 2  # tokens, layers, heads; of keys, and as many of values
    read = {kv: predict.kv_bytes_read(case, 1, 40) for kv, case in found.items()}
    assert read["plain"] == read["stream 1024+4"] == vectors * 2 * 8 * 4
    stored = predict.create(found["int8"], 1, 40).slots[0].k_LBKSH
    scale = sum(x.dtype.itemsize for x in jax.tree.leaves(stored)) - 1
    assert read["int8"] == vectors * 2 * (8 + scale)
    assert read["int8"] - read["k8v4"] == vectors * 4
    assert predict.kv_bytes_read(found["stream 1024+4"], 1, 5000) == 1028 * 4 * 2 * 8 * 4
    pages = 5008 // 16 * 2 * 2 * 2 * 8 * 4  # lowest and highest key of each page
    assert predict.kv_bytes_read(found["quest 128x16"], 1, 5008) == 2048 * 4 * 2 * 8 * 4 + pages
    with pytest.raises(UserError, match="bench.kv names 'int2', which is not one of plain, int8"):
        variants.of(model, CacheConfig(), ("int2",))
    with pytest.raises(Unsupported, match="cache_window"):
        learned = dataclasses.replace(TWO, learned_positions=True)
        variants.of(cases.random_model(learned), CacheConfig(), ("stream",))


def test_a_device_has_two_layers_of_what_the_host_keeps(one_device):
    six = cases.random_model(dataclasses.replace(TWO, num_layers=6))
    plain, host = (
        predict.create(case, 1, 40) for case in variants.of(six, CacheConfig(), ("host",))
    )
    of_layer = 40 * 2 * 2 * 8 * 4  # tokens, k and v, kv heads, head dim, bytes
    others = 40 * 4 + 4  # positions, tokens seen
    assert predict.cache_bytes(plain) == 6 * of_layer + others
    assert predict.cache_bytes(host) == 2 * of_layer + others


def test_a_table_that_is_the_head_counts_once(one_device):
    """As decoding on a CPU holds it: an array a layer, the embedding under two names."""
    model = cases.random_model(TWO)
    placed = layout.place(TWO, model.rules, tree.named_leaves(model))
    weights = 4 * (MATRICES + HEAD + NORMS)
    assert predict.device_bytes(placed) == predict.weight_bytes_read(placed) == weights


def test_bytes_are_of_one_device_of_the_mesh():
    whole = 2 * 2 * 10 * 2 * 8 * 4
    with jax.set_mesh(make_mesh((1, 2, 2))):
        need = predict.memory(case(), Plan(1, 10, 4))
        assert need.kv == whole // 4 + 10 * 4 // 2 + 4
        split = 4 * (MATRICES + HEAD) // 2 + 4 * NORMS
        assert need.weights == split
        assert predict.kv_bytes_read(case(), 1, 10) == whole // 4


@pytest.mark.parametrize("fields", [{}, dict(mlp_dim=512), dict(num_heads=16, num_kv_heads=8)])
def test_work_is_predicted_within_a_factor(one_device, fields):
    config = cases.model_config(
        num_layers=2, embed_dim=64, vocab_size=512, attention_kernel="chunked", **fields
    )
    plan = Plan(2, 640, 128, 32)
    one = variants.of(cases.random_model(config))[0]
    engine = Engine(one.model, plan)
    tokens_BT = np.zeros((2, 128), np.int32)
    measure._advance(engine, measure._start(engine, engine.prefill(tokens_BT), tokens_BT, 8))
    compiled = engine.temporary_bytes()
    assert compiled / 3 < predict.memory(one, plan).temporaries < compiled * 3


def row_of(**fields):
    config = BenchConfig(**{**dict(contexts=(10,), decode_samples=1, repeats=1), **fields})
    return rows.plan(case(), 10, config, None), config


def test_rates_by_hand(one_device):
    row, config = row_of(price_per_hour=36.0)
    found = Measured(0.5, [(10, 0.5)], 0.6, 0.002, [0.002, 0.004, 0.009], 99, 88, 77, 66, 1.0)
    got = rows.measured(row, config, found, BEST, devices=1)
    weights, kv = 4 * (MATRICES + HEAD + NORMS), 10 * 256
    assert got["prefill_tokens_per_second"] == 20
    assert got["mfu"] == pytest.approx(predict.prefill_flops(TWO, 1, 10) / (0.5 * 1e10))
    assert got["mbu_weights"] == pytest.approx(weights / (0.002 * 1e9))
    assert got["mbu_total"] == pytest.approx((weights + kv) / (0.002 * 1e9))
    assert got["roofline_ms"] == pytest.approx(1e3 * (weights + kv) / 1e9)
    assert got["roofline_fraction"] == pytest.approx((weights + kv) / 1e9 / 0.002)
    assert got["decode_single_ms"] == 4.0 and got["decode_p99_ms"] is None
    assert got["cost_per_1k_tokens"] == pytest.approx(0.01 * 0.002 * 1000)
    assert got["cost_per_1k_prefill_tokens"] == pytest.approx(0.01 * 0.5 * 1000 / 10)
    assert got["kv_bytes_live"] == 88 and got["peak_bytes_measured"] == 66
    slow = Peaks(1e12, 1e6)  # where products are what limits
    floor = rows.measured(row, config, found, slow, devices=2)["roofline_ms"]
    assert floor == pytest.approx(1e3 * predict.decode_flops(TWO, 1, 10) / 2 / 1e6)
    sheet = Peaks(1e9, 1e10, sheet_bandwidth=4e9, sheet_flops=2e10)
    shares = rows.measured(row, config, found, sheet, devices=1)
    assert shares["mfu"] == got["mfu"] / 2 and shares["mbu_total"] == got["mbu_total"] / 4
    assert shares["roofline_fraction"] == got["roofline_fraction"]


def test_a_batch_shares_the_step_and_its_cost(one_device):
    row, config = row_of(price_per_hour=36.0, batch_size=4)
    found = Measured(0.5, [(10, 0.5)], 0.6, 0.002, [0.002], 99, 88, 77, None, 1.0)
    got = rows.measured(row, config, found, BEST, devices=1)
    assert got["prefill_tokens_per_second"] == 80
    assert got["cost_per_1k_tokens"] == pytest.approx(0.01 * 0.002 * 1000 / 4)


def test_capacity(one_device, monkeypatch):
    assert predict.capacity(1.5, held=7) == 1.5 * GIB
    monkeypatch.setattr(predict, "_host_bytes", lambda: 800)
    assert predict.capacity(0, held=7) == 800 // jax.local_device_count() + 7
    monkeypatch.undo()
    assert 2**20 < predict._host_bytes() < 2**45


def test_the_mark_of_memory_is_of_what_came_after(one_device):
    before = np.ones(2**22)  # 32 MiB, gone before
    del before
    peak = measure.PeakMemory(held=5)
    kept = np.ones(2**24)  # 128 MiB
    del kept
    found = peak.bytes()
    assert 0.8 * 2**27 / jax.local_device_count() < found - 5 < 2 * 2**27


def test_peaks_are_rates_of_one_device(monkeypatch):
    monkeypatch.setattr(peaks, "SECONDS", 0.05)
    with jax.set_mesh(make_mesh((2, 1, 1))):
        found = peaks.measure(jnp.dtype("float32"))
    assert 1e8 < found.bandwidth < 1e13 and 1e8 < found.flops < 1e15
    assert found.mfu_flops == found.flops and found.mbu_bandwidth == found.bandwidth


def test_time_left_learns_from_what_was_slow(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    steps = [
        ProgressStep("a", "speed", 1.0),
        ProgressStep("b", "task", 3.0),
        ProgressStep("c", "speed", 2.0),
    ]
    with Bar(steps) as bar:
        assert bar.seconds_left() == 6
        with bar.step(steps[0]):
            now[0] += 10
        assert bar.seconds_left() == 50
        with bar.step(steps[1]):
            now[0] += 6
        assert bar.seconds_left() == 20  # as its kind, which is slower than the other
        with bar.step(steps[2]):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[1/3] a; about 6 s left", "[2/3] b; about 50 s left", "[3/3] c; about 20 s left"
    ]  # fmt: skip
    words = [progress.duration(n) for n in (99, 100, 7200)]
    assert words == ["99 s", "2 min", "2.0 h"]


def test_exponents():
    points = [(n, 3 * n**1.5) for n in (16, 64, 256)]
    assert plots.exponent(points) == pytest.approx(1.5)
    assert plots.exponent(points[:1]) is None and plots.fitted([]) == ""
    bent = [(n, n if n <= 64 else n**2 / 64) for n in (16, 32, 64, 128, 256, 512)]
    assert "from 128 on $n^{2.00}$" in plots.fitted(bent)
