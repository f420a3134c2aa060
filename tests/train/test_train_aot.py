"""train.aot with the real TPU compiler, on small shapes and slices that are not there."""

import collections
import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import train_cases
from train_cases import command

from core.compile.aot import compile_for, slice_devices
from core.compile.hlo_text import parse
from core.sharding import MeshConfig, make_mesh
from model.attention.spec import full
from model.config import ModelConfig
from model.sizes.flops import matrix_parameters
from train import aot
from train.config import AotConfig, TrainConfig

SECTIONS = dict(model=ModelConfig, mesh=MeshConfig, train=TrainConfig, aot=AotConfig)
KEYS = [
    "topology", "devices", "fits", "hbm_bytes_per_device", "hbm_limit_bytes", "argument_bytes",
    "temp_bytes", "flops_per_device", "bytes_per_device", "optimal_seconds", "estimated_mfu",
    "collectives", "compile_seconds",
]  # fmt: skip
# One slot: half the program of two. The vocabulary is not the data's: nothing is read.
SMALL = dict(
    num_layers=2, pattern=(full(),), attention_kernel="chunked", dtype="bfloat16", vocab_size=256
)


pytestmark = pytest.mark.usefixtures("compile_only")


def experiment(folder, aot=None, mesh=None, model=None, **train):
    """The tiny experiment of train_cases on a slice."""
    found = train_cases.experiment(folder / "run", mesh, {**SMALL, **(model or {})}, **train)
    config = AotConfig(output=str(folder / "aot.json"), **(aot or {}))
    return dataclasses.replace(found, data=None, aot=config)


def run(capsys, monkeypatch, case):
    """(exit status, stderr) of `python -m train.aot`."""
    start = lambda _: None  # noqa: E731 -- the fixture did it
    return command(capsys, monkeypatch, case, aot, SECTIONS, start=start)


def test_files_of_the_user_are_refused_before_anything_is_compiled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(aot.aot, "slice_devices", None)
    same, mine = str(tmp_path / "aot.json"), tmp_path / "step.txt"
    mine.write_text("notes")
    for text, message in ((str(mine), "step.txt is there already"), (same, "the file of aot.outp")):
        status, stderr = run(capsys, monkeypatch, experiment(tmp_path, dict(text=text)))
        assert status == 2 and f"error: aot.text={text}" in stderr and message in stderr
    (tmp_path / "aot.json").write_text('{"notes": 1}')
    status, stderr = run(capsys, monkeypatch, experiment(tmp_path))
    assert status == 2 and f"error: aot.output={same} is there already" in stderr
    assert mine.read_text() == "notes"


def test_report_of_a_sharded_step(tmp_path, capsys, monkeypatch):
    text = tmp_path / "step.txt"
    mesh = dict(data=1, seq=2, model=2)
    case = experiment(tmp_path, dict(topology="v5e:2x2", text=str(text)), mesh)
    before = jax.live_arrays()
    assert run(capsys, monkeypatch, case)[0] == 0
    known = set(map(id, before))
    assert known >= set(map(id, jax.live_arrays())), "a plan allocates nothing"
    report = json.loads((tmp_path / "aot.json").read_text())
    assert sorted(report) == sorted(KEYS)
    assert (report["topology"], report["devices"], report["fits"]) == ("v5e:2x2", 4, True)
    assert report["argument_bytes"] < report["hbm_bytes_per_device"] < report["hbm_limit_bytes"]
    assert 0 < report["estimated_mfu"] < 1 and report["optimal_seconds"] > 0
    kinds = {c["kind"] for c in report["collectives"]}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    for one in report["collectives"]:
        assert set(one) == {"kind", "count", "bytes", "async"} and one["bytes"] > 0
    assert not (tmp_path / "aot.json.tmp").exists()
    assert text.read_text().startswith("HloModule")


@pytest.mark.parametrize(
    ("kernel", "topology"),
    [
        ("auto", "v5e:2x2"),
        pytest.param("chunked", "v5e:2x2", marks=pytest.mark.slow),
        pytest.param("chunked", "v5e:8x8", marks=pytest.mark.slow),
    ],
)
def test_the_ring_sends_while_the_kernel_works(tmp_path, capsys, monkeypatch, kernel, topology):
    """Between start and done of a send stands the conditional that holds the kernel.

    Of 64 chips only if the ring goes from neighbour to neighbour.
    """
    text = tmp_path / "step.txt"
    mesh = dict(data=1, seq=-1, strategy="ring")
    model = dict(attention_kernel=kernel, embed_dim=64)
    aot = dict(topology=topology, text=str(text))
    case = experiment(tmp_path, aot, mesh, model, length=512)  # auto is splash from 128 a device on
    assert run(capsys, monkeypatch, case)[0] == 0
    report = json.loads((tmp_path / "aot.json").read_text())
    sends = [c["async"] for c in report["collectives"] if c["kind"] == "collective-permute"]
    assert sends == [True]
    hops = []
    for computation in text.read_text().split("\n\n"):
        steps = re.findall(r" (collective-permute-start|conditional|while|\S+-done)\(", computation)
        # The hops between the first and the last are a loop, and its kernel's loops are elsewhere.
        if {"collective-permute-start", "conditional"} <= set(steps) and "while" not in steps:
            before = steps[: steps.index("conditional")]
            sent, done = (before.count(f"collective-permute-{end}") for end in ("start", "done"))
            hops.append(sent == steps.count("collective-permute-start") and not done)
    assert len(hops) >= 2 and all(hops), "forward and backward, each with all sends under way"
    _, computations = parse(text.read_text())
    in_hops = {
        inner.name.partition(".")[0]
        for steps in computations.values()
        if not {"conditional", "collective-permute-start"} - {one.opcode for one in steps.values()}
        for one in steps.values()
        if one.opcode == "conditional"
        for callee in one.calls.values()
        for inner in computations[callee].values()
        if inner.name.startswith("splash")
    }
    both = {"splash_forward", "splash_backward"} if kernel == "auto" else set()
    assert in_hops == both, "what stands in the conditional"
    kernels = re.findall(r"%(splash_\w+?)[.\d]* = .* custom-call\(", text.read_text())
    # First hop, those between, last hop: rematerialisation redoes no kernel.
    assert collections.Counter(kernels) == dict.fromkeys(both, 3)


@pytest.mark.parametrize(
    ("topology", "seq", "model"),
    [("v5e:16x16", 256, 1), ("v5p:4x4x8", 128, 1), ("v5p:4x4x8", 32, 2), ("tpu7x:2x2x2", 16, 1)],
)
def test_neighbours_on_the_mesh_are_neighbours_on_the_torus(topology, seq, model):
    mesh = make_mesh(MeshConfig(seq=seq, model=model), slice_devices(topology))
    places = np.array(
        [[(*d.coords, d.core_on_chip) for d in row] for row in mesh.devices.reshape(-1, model)]
    )
    assert len(np.unique(places.reshape(mesh.devices.size, -1), axis=0)) == mesh.devices.size
    rings = places.reshape(-1, seq, model, places.shape[-1])
    assert (np.abs(np.roll(rings, -1, axis=1) - rings).sum(-1) == 1).all()


def test_flops_are_those_of_the_formula(tmp_path):
    """No rematerialisation: 6 FLOPs a parameter and token, and 14 a pair that attention sees."""
    case = experiment(tmp_path, dict(topology="v5p:2x2x1"), remat="none")
    report, model, train = aot.main(case), case.model, case.train
    tokens = train.batch_size * train.length
    matrices = 6 * matrix_parameters(model) * tokens
    pairs = train.batch_size * train.length * (train.length + 1) / 2
    attention = 14 * model.num_layers * model.num_heads * model.head_dim * pairs
    assert report.flops_per_device * 4 == pytest.approx(matrices + attention, rel=0.01)


def test_offload_keeps_what_the_backward_needs_on_the_host(tmp_path):
    """Inputs and attention's outputs of both layers, in memory space 5 of libtpu."""
    text = tmp_path / "step.txt"
    aot.main(experiment(tmp_path, dict(topology="v5e:1x1", text=str(text)), remat="offload"))
    on_host = set(re.findall(r"= \w+\[(2,[\d,]+)\]\{[^}]*S\(5\)\}", text.read_text()))
    assert on_host == {"2,8,32,32", "2,8,32,4,8", "2,8,32,4"}, "layers' inputs, outputs, lse"


def test_a_model_that_is_too_large_is_an_answer(tmp_path, capsys):
    """Refused by the compiler for 16 GiB of arguments alone; advice, and exit status 0."""
    model = dict(embed_dim=8192, mlp_dim=32768, num_layers=8, attention_kernel="reference")
    case = experiment(tmp_path, dict(topology="v5e:2x2"), model=model)
    assert aot.main(case).fits is False
    report = json.loads((tmp_path / "aot.json").read_text())
    assert report["hbm_bytes_per_device"] > report["hbm_limit_bytes"] == int(15.75 * 2**30)
    assert report["argument_bytes"] > 15e9 and report["flops_per_device"] is None
    assert report["collectives"] == []
    out = capsys.readouterr().out
    assert (
        "NO" in out
        and "--config.train.remat=offload" in out
        and "--config.train.remat=full" in out
        and "shorter context" in out
    )


def test_a_kernel_too_large_for_its_chip_is_no_answer():
    """libtpu says it in the words of a refusal, but no fewer tokens would help."""

    class Lowered:
        in_avals = ()

        def __init__(self, says):
            self.says = says

        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.says}")

    assert compile_for(Lowered("Used 18.5G of 15.75G hbm.")).hbm_bytes == 18.5 * 2**30
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_for(Lowered("Used 16.31M of 16.00M vmem. Exceeded vmem capacity"))


@pytest.mark.parametrize("topology", ["v5e:3x5", "v7x:2x2x1", "v5e", "v5e:0x2", "big:2x2"])
def test_unknown_topology(tmp_path, capsys, monkeypatch, topology):
    status, err = run(capsys, monkeypatch, experiment(tmp_path, dict(topology=topology)))
    assert status == 2 and "Traceback" not in err
    assert f"aot.topology={topology!r}" in err and "v5p:4x4x8" in err
    assert not (tmp_path / "aot.json").exists()


def test_missing_compiler(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    status, err = run(capsys, monkeypatch, experiment(tmp_path))
    assert status == 2 and "pip install -e .[aot]" in err


def test_mesh_that_does_not_divide_the_slice(tmp_path, capsys, monkeypatch):
    status, err = run(capsys, monkeypatch, experiment(tmp_path, mesh=dict(data=3)))
    assert status == 2 and "does not divide 4 devices" in err


def test_an_axis_may_be_a_part_of_a_physical_one():
    """seq=64 of 4 x 4 x 8 chips: half of the last axis with both others."""
    mesh = make_mesh(MeshConfig(data=2, seq=64), slice_devices("v5p:4x4x8"))
    assert mesh.devices.shape == (2, 64, 1)


def test_two_processes_compile_at_once(tmp_path):
    """As two test workers do: the first holds libtpu while the second loads it."""
    code = """
import sys
from core import backend
from core.compile import aot
backend.compile_only()
print(len(aot.slice_devices("v5p:4x4x8")), flush=True)
sys.stdin.read()
"""
    start = functools.partial(
        subprocess.Popen, [sys.executable, "-c", code], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with start() as first, start() as second:
        both = [p.stdout.readline().strip() for p in (first, second)]
        errors = [p.communicate()[1] for p in (first, second)]
    assert both == ["128", "128"] and errors == ["", ""]


def test_a_machine_with_libtpu_looks_for_no_tpu(tmp_path):
    """Neither a simulated run nor a plain one loads libtpu, or prints what it would say."""
    code = "from core import backend; backend.prepare({}); import jax; print(jax.devices())"
    ours = ("TPU_", "JAX_", "ALLOW_MULTIPLE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    for simulate in (0, 2):
        done = subprocess.run(
            [sys.executable, "-c", code.format(simulate)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert "Cpu" in done.stdout and not done.stderr, done.stderr
