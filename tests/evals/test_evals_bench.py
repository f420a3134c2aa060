"""The context-window report as a command: its rows, its files, what resumes, what is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from core.config import Unsupported, UserError
from core.sharding import MeshConfig
from evals import bench
from evals.config import BenchConfig
from evals.report import cases as variants
from evals.report import sweep
from evals.report.measuring import measure, peaks
from evals.report.store import Store
from infer import load
from infer.programs import bucket

TOKEN = 2 * 2 * 8 * 4  # k and v, kv heads, head dim, bytes


def run(workdir, monkeypatch, sizes=(1, 1, 1), mesh=None, **fields):
    """The report of a bundle with these fields of `bench`."""
    monkeypatch.setattr(bench, "make_mesh", lambda _: make_mesh(sizes))
    for name in ("SECONDS", "TURN"):
        monkeypatch.setattr(peaks, name, 1e-3)
    config = BenchConfig(**{**dict(repeats=1, decode_samples=3, loss_rows=0), **fields})
    case = cases.experiment(workdir, bench=config, mesh=mesh or MeshConfig())
    return bench.main(case)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("bundle")
    with jax.set_mesh(make_mesh((1, 1, 1))):
        cases.save(workdir)
    return workdir


@pytest.fixture(scope="module")
def swept(bundle):
    """The report of a sweep from a bundle; two devices share the length."""
    with pytest.MonkeyPatch.context() as patch:
        mesh = MeshConfig(strategy="allgather")  # compiled faster than the ring of auto
        fields = dict(
            contexts=(40, 2**20),
            beyond=True,
            decode_samples=100,
            price_per_hour=3.6,
            memory_gib=0.05,
        )
        return run(bundle, patch, (1, 2, 1), mesh, **fields)


def test_rows_have_every_key_and_what_was_measured(swept):
    assert {"device", "config", "rows", "peaks", "effective_length"} <= set(swept)
    pairs = [(row["attention"], row["context"]) for row in swept["rows"]]
    assert pairs == [(a, c) for a in ("sliding", "full") for c in (40, 2**20)]
    assert len({tuple(row) for row in swept["rows"]}) == 1, "every row has the same keys"
    for row in swept["rows"]:
        if row["context"] == 2**20:
            continue
        assert row["fits"] and row["reason"] is None and row["decode_samples"] == 100
        unknown = {key for key, value in row.items() if value is None}
        assert unknown <= {"reason", "peak_bytes_measured"}
        assert row["decode_p99_ms"] >= row["decode_single_ms"] > 0
        assert row["ttft_seconds"] > row["prefill_seconds"]
        assert row["prefill_curve"][-1] == [row["context"], row["prefill_seconds"]]
        assert row["peak_bytes"] > row["weight_bytes"] + row["temporary_bytes"]
        assert 0 < row["mbu_weights"] < row["mbu_total"]
        assert row["cost_per_1k_tokens"] == pytest.approx(row["decode_ms_per_token"] / 1e3)
    assert swept["weights"].endswith(f"step {cases.STEP}")


def test_the_cache_holds_what_theory_says(swept):
    for row in swept["rows"][::2]:
        kept = 6 if row["attention"] == "sliding" else row["context"]
        expected = TOKEN * 2 * (kept + row["context"])  # two layers of each kind
        assert row["kv_bytes_live"] == row["kv_bytes_theory"] == expected
        assert row["kv_bytes_per_device"] == expected // 2
        new = 8 * 3 + 100
        whole = bucket(row["context"] + new)
        kept = 6 if row["attention"] == "sliding" else whole
        assert row["kv_bytes_allocated"] == TOKEN * 2 * (kept + whole)


def test_a_row_that_does_not_fit_says_why(swept):
    for row in swept["rows"][1::2]:
        assert not row["fits"] and row["prefill_seconds"] is None
        assert row["peak_bytes_predicted"] > 2**26
        assert "MiB a device" in row["reason"] and "are available" in row["reason"]


def test_files(bundle, swept):
    output = bundle / "bench"
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(swept))
    text = (output / "report.md").read_text()
    assert "| 40 | full |" in text and "](decode.png)" in text and f"step {cases.STEP}" in text
    assert "1,048,576 tokens: needs" in text
    names = {"report.json", "report.md", "decode.png", "prefill.png", "memory.png", "cost.png"}
    assert {path.name for path in output.iterdir()} == names


def test_beyond_the_context_and_its_learned_positions(one_device):
    def reasons(model, **fields):
        config = BenchConfig(**{**dict(contexts=(24, 128), decode_samples=1, repeats=1), **fields})
        planned = sweep.plan(variants.of(cases.random_model(model)), config, None)
        return [row.reason for row in planned if row.case.own]

    plain = cases.model_config()
    first, second = reasons(plain)
    assert first is None and "beyond model.context=64" in second and "bench.beyond" in second
    assert reasons(plain, beyond=True) == [None, None]
    learned = cases.model_config(learned_positions=True)
    first, second = reasons(learned, beyond=True)
    assert first is None and "learned positions" in second
    with pytest.raises(UserError, match="no row can be measured; sliding, 128 tokens: beyond"):
        reasons(plain, contexts=(128,))


def test_contexts_by_default_double_till_one_does_not_fit(one_device):
    model = cases.model_config(context=10_000)
    config = BenchConfig()
    assert sweep.contexts(config, model) == [1024, 2048, 4096, 8192]
    assert sweep.contexts(config, cases.model_config()) == [64]
    beyond = sweep.contexts(BenchConfig(beyond=True), model)
    assert beyond[0] == 1024 and beyond[-1] == 2**20
    found = sweep.plan(variants.of(cases.random_model(model)), config, 11_000_000)
    fits = {(row.case.name, row.context): row.reason is None for row in found}
    assert fits["sliding", 1024] and not fits[max(k for k in fits if k[0] == "full")]
    assert list(fits.values()).count(False) == 2, "each case ends with the first that does not fit"


def fake(seconds):
    """What a row of so many seconds would have measured."""
    return measure.Measured(seconds, [(16, seconds)], 9.0, 0.1, [0.1], 8, 8, 8, None, 0.0)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was(bundle, tmp_path, monkeypatch):
    fields = dict(contexts=(16, 24), output=str(tmp_path))
    seen = []

    def measured(case, context, config):
        seen.append((case.name, context))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return fake(float(len(seen)))

    monkeypatch.setattr(measure, "measure", measured)
    monkeypatch.setattr(bench.plots, "draw", lambda *_: [])
    with pytest.raises(KeyboardInterrupt):
        run(bundle, monkeypatch, **fields)
    lines = (tmp_path / "rows.jsonl").read_text()
    assert lines.count("\n") == 2
    (tmp_path / "rows.jsonl").write_text(lines + '{"key": "ha')  # killed while it wrote
    report = run(bundle, monkeypatch, **fields)
    assert len(seen) == 5 and len(set(seen)) == 4 and seen[2] == seen[3]
    assert sorted(row["prefill_seconds"] for row in report["rows"]) == [1.0, 2.0, 4.0, 5.0]
    assert not (tmp_path / "rows.jsonl").exists()
    run(bundle, monkeypatch, **fields)
    assert len(seen) == 9, "a finished report is measured anew"
    with pytest.raises(KeyboardInterrupt):
        seen.clear()
        run(bundle, monkeypatch, **fields)
    run(bundle, monkeypatch, **fields, prefill_chunk=7)
    assert len(seen) == 7, "results of other settings do not count"


def test_a_result_counts_only_under_its_key(tmp_path):
    path = tmp_path / "rows.jsonl"
    store = Store(path, {"step": 1})
    assert store.get({"context": 8}) is None
    assert store.put({"context": 8}, {"x": (1, 2)}) == {"x": [1, 2]}
    assert Store(path, {"step": 1}).get({"context": 8}) == {"x": [1, 2]}
    assert Store(path, {"step": 1}).get({"context": 9}) is None
    assert Store(path, {"step": 2}).get({"context": 8}) is None


def test_running_out_of_memory_is_a_row_with_its_reason(bundle, tmp_path, monkeypatch):
    def fail(case, context, config):
        if case.name == "full":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return fake(1.0)

    monkeypatch.setattr(measure, "measure", fail)
    report = run(bundle, monkeypatch, contexts=(16,), output=str(tmp_path))
    assert [row["fits"] for row in report["rows"]] == [True, False]
    assert "Out of memory allocating 9 bytes" in report["rows"][1]["reason"]


def test_mesh_strategy_is_followed(bundle, monkeypatch):
    with pytest.raises(Unsupported, match="mesh.strategy='local' needs whole rows"):
        run(bundle, monkeypatch, (1, 2, 1), MeshConfig(strategy="local"), contexts=(16,))


def test_without_a_bundle_the_weights_are_random(one_device, tmp_path, monkeypatch):
    create = lambda config, *_: cases.random_model(config)  # noqa: E731
    monkeypatch.setattr(bench.source.transformer, "create", create)
    found = bench.source.find(cases.experiment(tmp_path))
    assert found.name.startswith("random") and found.model.config == cases.model_config()
    assert isinstance(jax.tree.leaves(bench.source.weights(found))[0], jax.Array)
    with pytest.raises(UserError, match="is no bundle"):
        bench.source.find(cases.experiment(tmp_path, bench=BenchConfig(checkpoint="nowhere")))


def test_mistakes_are_told_before_weights_are_read(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "restore", None)
    monkeypatch.setattr(sweep, "run", None)
    for fields, message in {
        "no such task": (dict(tasks=("niah",)), "'niah', which is no task: they are niah_single_1"),
        "no questions": (dict(tasks=("qa_1",)), "name a JSON file in bench.questions"),
        "no file": (dict(loss_rows=1, text=("no*.txt",)), r"bench.text: no\*.txt matches no file"),
    }.values():
        with pytest.raises(UserError, match=message):
            run(bundle, monkeypatch, contexts=(16,), **fields)
    for fields, message in (
        (dict(price_per_hour=-1), "price_per_hour=-1.0 is out of range: it must be >= 0"),
        (dict(contexts=(0, 4)), r"contexts=\(0, 4\) is out of range"),
        (dict(contexts=(4, 4)), "names one of them twice"),
        (dict(compare=("a",)), "is one report: name two or more"),
        (dict(compare=("a", "b"), topology="v5e:2x2"), "neither runs a model"),
    ):
        with pytest.raises(UserError, match=message):
            BenchConfig(**fields)


def test_measuring_reads_the_text_once_and_makes_tokens_one_by_one(one_device):
    model = cases.random_model()
    config = BenchConfig(contexts=(24,), prefill_chunk=16, repeats=2, decode_samples=5)
    (case,) = (one for one in variants.of(model) if one.own)
    found = measure.measure(case, 24, config)
    assert [end for end, _ in found.curve] == [16, 24]
    assert len(found.step_seconds) == 5 and measure.percentile(found.step_seconds) is None
    assert measure.percentile([1.0] * 99 + [9.0]) == pytest.approx(1.08)
    live = TOKEN * 2 * (6 + 24)
    assert found.kv_live == live


@pytest.mark.slow
def test_killed_in_earnest(tmp_path):
    """kill -9 during a sweep of the command, and the command again."""
    command = [
        sys.executable, "-m", "evals.bench", "--config=configs/quickstart.py:tiny",
        f"--config.workdir={tmp_path}", "--config.bench.contexts=64,128,256",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if line.startswith("[3/6]"):
            first.send_signal(signal.SIGKILL)
            break
    first.communicate()
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "[1/4]" in second.stderr and "[5/" not in second.stderr
    report = json.loads((tmp_path / "bench/report.json").read_text())
    assert all(row["fits"] for row in report["rows"]) and len(report["rows"]) == 6


def test_rows_are_frozen_before_they_are_run(one_device):
    """Planning takes shapes alone, so that nothing is allocated for what will not fit."""
    abstract = bench.source.find(cases.experiment("nowhere")).model
    before = jax.live_arrays()
    planned = sweep.plan(variants.of(abstract), BenchConfig(contexts=(32,)), None)
    assert len(jax.live_arrays()) == len(before)
    real = sweep.plan(variants.of(cases.random_model()), BenchConfig(contexts=(32,)), None)
    needs = [[dataclasses.astuple(row)[2] for row in rows] for rows in (planned, real)]
    np.testing.assert_array_equal(*needs)
