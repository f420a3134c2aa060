"""The context-window report: its keys, its bytes, its files."""

import json

import infer_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh

from core.config import Unsupported, UserError
from core.sharding import MeshConfig
from infer import bench
from infer.config import BenchConfig
from infer.engine import Engine, Plan
from model import cache
from model.attention.spec import full

KEYS = {
    "context", "attention", "phase", "prefill_seconds", "prefill_tokens_per_second",
    "decode_ms_per_token", "kv_bytes_theory", "kv_bytes_live",
    "kv_bytes_per_device", "peak_bytes", "mfu", "mbu_weights",
    "mbu_total", "roofline_fraction", "quality", "cost_per_1k_tokens", "fits",
}  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(workdir, the report) of a sweep from a bundle, beyond the trained context of 64.

    Two devices share the length.
    """
    workdir = tmp_path_factory.mktemp("bench")
    with jax.set_mesh(make_mesh((1, 1, 1))), pytest.MonkeyPatch.context() as patch:
        cases.save(workdir)
        patch.setattr(bench, "make_mesh", lambda _: make_mesh((1, 2, 1)))
        config = BenchConfig(contexts=(96, 16, 40), repeats=1)
        mesh = MeshConfig(strategy="allgather")  # compiled faster than the ring of auto
        return workdir, bench.main(cases.experiment(workdir, bench=config, mesh=mesh))


def test_rows_have_every_key_and_positive_numbers(swept):
    _, report = swept
    assert {"device", "config", "rows"} <= set(report)
    pairs = [(row["attention"], row["context"]) for row in report["rows"]]
    assert pairs == [(a, c) for a in ("sliding", "full") for c in (16, 40, 96)]
    for row in report["rows"]:
        assert set(row) == KEYS
        for key in KEYS - {"attention", "phase", "quality"}:
            assert row[key] is None or row[key] > 0, key
        assert row["peak_bytes"] > row["kv_bytes_theory"]
    assert report["weights"].endswith(f"step {cases.STEP}")
    assert report["measured_peak_bytes"] > 1e6


def test_the_cache_holds_what_theory_says(swept):
    _, report = swept
    token = 2 * 2 * 8 * 4  # k and v, kv heads, head dim, bytes
    for row in report["rows"]:
        kept = 6 if row["attention"] == "sliding" else row["context"]
        expected = token * 2 * (kept + row["context"])  # two layers of each kind
        assert row["kv_bytes_live"] == row["kv_bytes_theory"] == expected
        assert row["kv_bytes_per_device"] == expected // 2


def test_files(swept):
    workdir, report = swept
    output = workdir / "bench"
    assert json.loads((output / "report.json").read_text()) == report
    assert (output / "context.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    text = (output / "report.md").read_text()
    assert "| 96 | full |" in text and "](context.png)" in text and f"step {cases.STEP}" in text
    assert {path.name for path in output.iterdir()} == {"report.json", "report.md", "context.png"}


def test_full_variant_keeps_the_weights_and_drops_the_windows(one_device):
    model = cases.random_model()
    both = bench.variants(model)
    assert both["sliding"] is model
    assert both["full"].config.pattern == (full(), full())
    weights = (jax.tree.leaves(m) for m in both.values())
    assert all(a is b for a, b in zip(*weights, strict=True))
    only = cases.model_config(pattern=(full(),))
    model = cases.random_model(only)
    assert list(bench.variants(model)) == ["full"]


def test_without_a_bundle_the_weights_are_random(one_device, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.transformer, "create", lambda config, *_: cases.random_model(config))
    model, weights = bench.open_model(cases.experiment(tmp_path))
    assert weights.startswith("random") and model.config == cases.model_config()
    with pytest.raises(UserError, match="is no bundle"):
        bench.open_model(cases.experiment(tmp_path, bench=BenchConfig(checkpoint="nowhere")))


def test_contexts_beyond_learned_positions_are_refused(one_device):
    model = cases.random_model(cases.model_config(learned_positions=True))
    with pytest.raises(UserError, match=r"tokens decoded=1\d\d is more than model.context=64"):
        next(bench.sweep(model, "full", BenchConfig(contexts=(32, 96))))


def test_mesh_strategy_is_followed(swept, monkeypatch):
    monkeypatch.setattr(bench, "make_mesh", lambda _: make_mesh((1, 2, 1)))
    case = cases.experiment(swept[0], mesh=MeshConfig(strategy="local"))
    with pytest.raises(Unsupported, match="mesh.strategy='local' needs whole rows"):
        bench.main(case)


def test_measuring_a_decode_leaves_the_cache_as_it_is(one_device):
    model = cases.random_model()
    engine = Engine(model, Plan(1, 48, 16))
    tokens_BT = np.arange(16, dtype=np.int32)[None]
    now = engine.prefill(tokens_BT)
    before = jax.device_get(jax.tree.map(jnp.copy, now))  # a view of `now` would forbid donation
    assert bench.time_decode(engine, now, tokens_BT, repeats=1) > 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(now))
    assert bench.live_bytes(now.cache) == cache.kv_bytes(model.config, 1, 16, model.rules)
