"""The report for TPUs that are not there, by their real compiler."""

import dataclasses
import json

import infer_cases as cases
import jax
import pytest

from core.compile.hardware import GIB, chip
from core.config import UserError
from core.sharding import MeshConfig
from evals import bench
from evals.config import BenchConfig
from evals.report import predict, rows, sweep, topology
from model.attention.spec import full

pytestmark = pytest.mark.usefixtures("compile_only")

# Sizes at which the compiler pads little, so that bytes are those of the shapes.
SIZES = dict(
    vocab_size=512, context=2**23, num_layers=2, embed_dim=256, num_heads=2, num_kv_heads=2,
    head_dim=128, mlp_dim=512, pattern=(full(),), dtype="bfloat16", attention_kernel="chunked",
)  # fmt: skip


def case(workdir, mesh=None, **fields):
    model = cases.model_config(**SIZES)
    config = BenchConfig(**{**dict(decode_samples=8, repeats=1, prefill_chunk=128), **fields})
    return cases.experiment(workdir, model, bench=config, mesh=mesh or MeshConfig())


@pytest.fixture(scope="module")
def predicted(compile_only, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("topology")
    fields = dict(topology="v5e:1x1", contexts=(1024, 2**16, 2**23), price_per_hour=1.2)
    return workdir, bench.main(case(workdir, **fields))


def test_rows_of_a_slice_that_is_not_there(predicted):
    workdir, report = predicted
    assert json.loads((workdir / "bench/report.json").read_text()) == json.loads(json.dumps(report))
    assert report["device"] == "v5e:1x1, 1 x TPU v5 lite, not run"
    short, long, _ = report["rows"]
    for row in (short, long):
        assert row["fits"] and row["peak_bytes"] < 15.75 * GIB
        assert row["peak_bytes"] > row["weight_bytes"] + row["kv_bytes_allocated"]
        assert 0 < row["mfu"] <= 1 and 0 < row["mbu_weights"] < row["mbu_total"] <= 1
        assert row["peak_bytes_measured"] is None and row["roofline_fraction"] is None
        assert row["cost_per_1k_tokens"] == pytest.approx(row["decode_ms_per_token"] * 1.2 / 3600)
    assert long["prefill_seconds"] > 64 * short["prefill_seconds"]
    names = {path.name for path in (workdir / "bench").iterdir()}
    assert {"report.md", "decode.png", "prefill.png", "memory.png"} <= names


def test_a_long_cache_is_read_once_a_step(predicted):
    """At best: weights, and 64K keys and values of two layers, at the chip's bandwidth."""
    _, long, _ = predicted[1]["rows"]
    bandwidth = chip("TPU v5 lite").hbm_bandwidth
    kv = 2 * 2 * 2 * 128 * 2 * 2**16
    floor = 1e3 * (kv + long["weight_bytes"]) / bandwidth
    assert long["decode_bytes"] == kv + long["weight_bytes"]
    assert floor <= long["decode_ms_per_token"] < 1.2 * floor


def test_what_does_not_fit_says_how_much_it_needs(predicted):
    refused = predicted[1]["rows"][2]
    assert refused["fits"] is False and refused["prefill_seconds"] is None
    assert "GiB a device (weights" in refused["reason"]

    # Weights and cache fit, and what the compiler answers does not.
    devices = topology.aot.slice_devices("v5e:1x1")
    small = dataclasses.replace(chip("TPU v5 lite"), hbm_bytes=2.0**20)
    with jax.set_mesh(topology.make_mesh(MeshConfig(), devices)):
        experiment = case("nowhere", topology="v5e:1x1", contexts=(1024,))
        model = topology.source.find(experiment).model
        (planned,) = sweep.plan(
            topology.source.cases_of(model, experiment.bench), experiment.bench, None
        )
        planned = dataclasses.replace(planned, need=predict.Memory(0, 0, 0))
        row = topology.row(planned, experiment.bench, small, 1)
    assert not row["fits"] and row["decode_ms_per_token"] is None
    assert f"needs {rows.shown(row['peak_bytes'])} a device as compiled" in row["reason"]


def test_a_mesh_of_the_slice(tmp_path):
    mesh = MeshConfig(seq=2, model=2)
    fields = dict(topology="v5e:2x2", contexts=(2**14,))
    (row,) = bench.main(case(tmp_path, mesh, **fields))["rows"]
    assert row["fits"] and row["kv_bytes_per_device"] == row["kv_bytes_theory"] // 4
    assert row["decode_ms_per_token"] > 0


def test_a_slice_that_nobody_knows(tmp_path):
    with pytest.raises(UserError, match=r"bench\.topology='v5e:9x' is no slice"):
        bench.main(case(tmp_path, topology="v5e:9x"))
