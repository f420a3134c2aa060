"""Meshes and rules: sizes that divide, axes used once, several slices, simulated devices."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import jax
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import AxisType, PartitionSpec

from core import sharding
from core.compile import hardware
from core.config import UserError
from core.sharding import MeshConfig, Rules, axis_sizes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("data", "seq", "model", "sizes"),
    [(-1, 1, 1, (8, 1, 1)), (2, -1, 2, (2, 2, 2)), (1, 4, -1, (1, 4, 2)), (2, 2, 2, (2, 2, 2))],
)
def test_axis_sizes_use_every_device(data, seq, model, sizes):
    assert axis_sizes(MeshConfig(data=data, seq=seq, model=model), 8) == sizes


@pytest.mark.parametrize("sizes", [(-1, 3, 1), (2, 2, 1), (4, 4, 1)])
def test_axis_sizes_that_do_not_divide(sizes):
    with pytest.raises(UserError) as error:
        axis_sizes(MeshConfig(data=sizes[0], seq=sizes[1], model=sizes[2]), 8)
    fixed = abs(int(np.prod(sizes)))
    for part in (str(sizes), "does not divide 8 devices", f"mesh.simulate={fixed}"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 1, 1), r"data, seq, model = \(0, 1, 1\): an axis has 1 device or more, or -1"),
        ((-1, -1, 1), r"data, seq, model = \(-1, -1, 1\): at most one axis may be -1"),
        ((1, 1, -2), "model=-2 is out of range: it must be >= -1"),
    ],
)
def test_mesh_config_refuses_nonsense(sizes, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(data=sizes[0], seq=sizes[1], model=sizes[2])


@pytest.mark.parametrize("name", ["auto", *get_args(sharding.Layout)])
def test_every_layout_is_a_setting(name):
    assert MeshConfig(layout=name).layout == name
    with pytest.raises(UserError, match=r"layout='ring' is not one of 'auto', 'contiguous', 'zig"):
        MeshConfig(layout="ring")


def test_groups_that_exchange_heads_divide_a_ring():
    assert axis_sizes(MeshConfig(data=1, seq=-1, strategy="ring", ulysses=4), 8) == (1, 8, 1)
    with pytest.raises(UserError, match=r"mesh.ulysses=3 does not divide mesh.seq=8"):
        axis_sizes(MeshConfig(data=1, seq=-1, strategy="ring", ulysses=3), 8)
    with pytest.raises(UserError, match=r"ulysses=2 with strategy='auto'.*strategy='ring'"):
        MeshConfig(ulysses=2)
    with pytest.raises(UserError, match=r"both_ways=True with strategy='ulysses'.*'ring'"):
        MeshConfig(strategy="ulysses", both_ways=True)


@pytest.mark.parametrize(
    ("strategy", "ulysses", "parts"),
    [("ring", 1, 8), ("ring", 4, 2), ("allgather", 1, 8), ("ulysses", 1, 1)],
)
def test_ring_size_counts_parts_of_the_length(strategy, ulysses, parts):
    with jax.set_mesh(make_mesh((1, 8, 1))):
        assert sharding.training(strategy, ulysses).ring_size() == parts


def test_make_mesh_is_explicit_and_in_order():
    mesh = sharding.make_mesh(MeshConfig(seq=2, model=2))
    assert dict(mesh.shape) == {"data": 2, "seq": 2, "model": 2}
    assert mesh.axis_types == (AxisType.Explicit,) * 3
    assert set(mesh.devices.flat) == set(jax.devices())


class FakeDevice(SimpleNamespace):
    """What JAX and we ask of a device when a mesh is laid out; it has no other attribute."""

    __hash__ = object.__hash__


@pytest.fixture
def two_slices(monkeypatch):
    """16 TPUs in 2 slices, handed out in an order that mixes them."""
    devices = [
        FakeDevice(
            id=i, slice_index=i % 2, process_index=i % 2, platform="tpu", device_kind="TPU v5 lite",
            coords=(i // 2 % 4, i // 8, 0), core_on_chip=0,
        )
        for i in range(16)
    ]  # fmt: skip
    monkeypatch.setattr(jax, "devices", lambda: devices)


def cuda_devices(hosts, per_host, sliced):
    """GPUs as the CUDA plugin shows them: `coords`, but no `core_on_chip`; the last one first.

    A host is a slice of its own if `sliced`; None: they know of no slices.
    """
    devices = []
    for host, number in itertools.product(range(hosts), range(per_host)):
        index = host if sliced else 0
        slices = {} if sliced is None else dict(slice_index=index)
        at = dict(id=len(devices), process_index=host, coords=[index, host, number], **slices)
        devices.append(FakeDevice(**at, platform="gpu", device_kind="NVIDIA H100 80GB HBM3"))
    return devices[::-1]


@pytest.mark.parametrize("sliced", [True, False, None], ids=["slices", "one slice", "no slice"])
@pytest.mark.parametrize(
    ("hosts", "per_host", "fields", "sizes"),
    [
        (1, 1, {}, (1, 1, 1)),
        (1, 8, dict(seq=4, model=2), (1, 4, 2)),
        (2, 8, dict(seq=4, model=2), (2, 4, 2)),
        (2, 8, dict(data=1, seq=-1, model=8), (1, 2, 8)),  # a ring over both hosts
        (3, 2, dict(data=1, seq=3, model=-1), (1, 3, 2)),
    ],
)
def test_gpus_lie_host_by_host(hosts, per_host, fields, sizes, sliced):
    devices = cuda_devices(hosts, per_host, sliced)
    mesh = sharding.make_mesh(MeshConfig(**fields), devices)
    assert mesh.devices.shape == sizes and mesh.axis_types == (AxisType.Explicit,) * 3
    assert [device.id for device in mesh.devices.flat] == list(range(len(devices)))
    one = hardware.one_device(devices)
    assert (one.hbm_bytes, one.devices) == (80e9, 1)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # an eighth of one
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD Instinct MI300X", None),
        ("TPU v5e", 197),
        ("TPU v4 lite", None),
    ],
)
def test_a_chip_is_known_by_its_whole_name(kind, tflops):
    found = hardware.peak_flops(FakeDevice(platform="gpu", device_kind=kind))
    assert found == (None if tflops is None else tflops * 1e12)


def test_several_slices_split_data_alone(two_slices):
    mesh = sharding.make_mesh(MeshConfig(seq=2, model=2))
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.shape == (4, 2, 2)
    assert (slices[:2] == slices[0, 0, 0]).all(), "seq or model crosses slices"
    assert (slices[2:] == slices[2, 0, 0]).all(), "seq or model crosses slices"
    assert slices[0, 0, 0] != slices[2, 0, 0]
    assert len({device.id for device in mesh.devices.flat}) == 16
    assert mesh.axis_types == (AxisType.Explicit,) * 3


def test_slices_must_divide_data(two_slices):
    with pytest.raises(UserError, match=r"mesh.data=1 is not a multiple of the 2 slices.*set mesh"):
        sharding.make_mesh(MeshConfig(seq=8, model=2))


def test_rules_turn_names_into_specs():
    rules = sharding.training()
    assert rules("batch", "length", "act_embed") == PartitionSpec("data", "seq", None)
    assert rules("embed", "heads", None) == PartitionSpec(("data", "seq"), "model", None)
    assert rules() == PartitionSpec()


@pytest.mark.parametrize("name", ["lenght", *sharding.CHOICES])
def test_unknown_logical_axis(name):
    with pytest.raises(
        ValueError, match=rf"'{name}' is no logical axis; they are act_embed, .*mlp"
    ):
        sharding.training()("batch", name)


@pytest.mark.parametrize("names", [("batch", "embed"), ("heads", "mlp")])
def test_a_mesh_axis_is_used_once(names):
    with pytest.raises(ValueError, match=r"uses a mesh axis twice"):
        sharding.training()(*names)


def test_presets_name_mesh_axes_only():
    presets = [sharding.training(), sharding.training("ring", 2, "zigzag"), sharding.whole()]
    for rules in [*presets, sharding.prefilling(), sharding.decoding()]:
        for field in dataclasses.fields(Rules):
            axes = getattr(rules, field.name)
            if field.name not in sharding.CHOICES and axes is not None:
                named = {axes} if isinstance(axes, str) else set(axes)
                assert named <= set(sharding.AXES), field.name


def test_presets_differ_where_they_should():
    assert sharding.training("allgather").strategy == "allgather"
    prefilling, decoding = sharding.prefilling("ulysses"), sharding.decoding()
    assert prefilling.strategy == "ulysses"
    assert prefilling("batch", "length") == PartitionSpec("data", "seq")
    assert decoding("batch", "length") == PartitionSpec("data", None)
    for rules in (prefilling, decoding):
        assert rules("batch", "kv_length") == PartitionSpec("data", "seq")
        assert rules("embed", "mlp") == PartitionSpec(None, "model")
    whole = sharding.whole()
    assert whole("vocab", "embed", "batch") == PartitionSpec(None, None, None)


def test_size_counts_shards_of_the_mesh_in_use():
    rules = sharding.training()
    with jax.set_mesh(make_mesh((2, 2, 2))):
        assert [rules.size(n) for n in ("batch", "embed", "mlp", "layers")] == [2, 4, 2, 1]
    with jax.set_mesh(make_mesh((1, 4, 2))):
        assert [rules.size(n) for n in ("batch", "embed", "mlp", "layers")] == [1, 4, 2, 1]


def test_simulate_gives_cpu_devices():
    code = "from core import backend; backend.prepare(8); import jax; print(jax.devices())"
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CpuDevice") == 8
