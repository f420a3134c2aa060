"""Every test runs on 8 simulated CPU devices; shapes that broadcast by accident raise."""

import contextlib
import itertools
import os
import platform
import re
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import train_cases
from absl import flags

from core import backend, sharding
from core.compile.aot import compile_for
from data import prepare
from model.attention.kernels import gpu_call, splash
from train import pretrain

# Tests send Ctrl-C, which a job in the background of a script ignores, and its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests compile more than they run: LLVM at -O0 halves the time of the suite, and where jaxlib still
# has them its emitters without MLIR halve it again. Children inherit it.
XLA_FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS])
backend.prepare(simulate=8)
jax.config.update("jax_numpy_rank_promotion", "raise")
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain reads absl flags

# The TPU compiler exists for Linux on x86-64 alone. There `make setup` brings it (setup.py), and
# tests that need it fail without it: they are never skipped.
HAS_TPU_COMPILER = (sys.platform, platform.machine()) == ("linux", "x86_64")
collect_ignore_glob = [] if HAS_TPU_COMPILER else ["*_aot.py", "*_topology.py"]

TESTS = itertools.count()
MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)]


def make_mesh(sizes):
    """An Explicit mesh of `sizes` over the first devices."""
    explicit = (jax.sharding.AxisType.Explicit,) * len(sharding.AXES)
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, sharding.AXES, axis_types=explicit, devices=devices)


def quick(cases, step):
    """Every `step`-th case for `make test`; the others are for the slow tests."""
    return [
        pytest.param(case, marks=[pytest.mark.slow] * bool(i % step), id=str(case))
        for i, case in enumerate(cases)
    ]


def sampled(cases, step):
    """Every `step`-th case for the slow tests; the others are for `make test-all` alone.

    Where `step` has no factor in common with the lengths of the axes of a product, every value of
    every axis is among those of the slow tests.
    """
    slow, rest = pytest.mark.slow, pytest.mark.exhaustive
    return [
        pytest.param(*case, marks=rest if i % step else slow, id="-".join(map(str, case)))
        for i, case in enumerate(cases)
    ]


def small_tiles(monkeypatch, size):
    """Blocks of `size` for kernels in Pallas, so that short rows have several."""
    for name in ("LANES", "MIN_BLOCK", "QUERIES", "BACKWARD_QUERIES", "KEYS"):
        monkeypatch.setattr(splash, name, size)
    for name in ("FORWARD", "BACKWARD_QUERIES", "BACKWARD_KEYS"):
        kernel = getattr(gpu_call, name)._replace(R=size, C=size)
        monkeypatch.setattr(gpu_call, name, kernel)


def tpu_kernels(traced, prefix):
    """Names of our Pallas kernels in a program, as the compiler for TPUs makes it."""
    compiled = compile_for(traced.lower(lowering_platforms=("tpu",)))
    assert not compiled.refused
    named = rf'%({prefix}_\w+?)[.\d]* = .*custom_call_target="tpu_custom_call"'
    return sorted(re.findall(named, compiled.text))


@pytest.fixture(autouse=True)
def few_programs():
    """Drops what was compiled before memory is in more pieces than Linux gives a process (65,530):
    each program takes some, and past the last one XLA crashes. Looking takes long: not every time.
    """
    maps = Path("/proc/self/maps")
    if next(TESTS) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def one_device():
    """The mesh (1, 1, 1), in use."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        yield


@pytest.fixture(scope="module")
def compile_only():
    """What a command that compiles for TPUs does first; the variables are gone after the tests."""
    before = set(os.environ)
    backend.compile_only()
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Where `family_cases.opened` writes checkpoints, each once."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A workdir with the prepared data of `train_cases.experiment`. Copy it before you train."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "texts").mkdir()
    train_cases.write_texts(folder / "texts")
    with contextlib.chdir(folder):
        prepare.main(train_cases.experiment(folder / "run"))
    return folder / "run"


@pytest.fixture(scope="session")
def finished(prepared, tmp_path_factory):
    """A workdir in which `train_cases.experiment` was trained to its end, on 8 devices."""
    workdir = train_cases.copy(prepared, tmp_path_factory.mktemp("finished") / "run")
    pretrain.main(train_cases.experiment(workdir))
    return workdir
