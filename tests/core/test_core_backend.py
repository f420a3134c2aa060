"""Devices that are not there, and processes that do not meet: one message, and status 2."""

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from train_cases import command, experiment

from core import backend
from core.command import cli
from core.config import UserError
from core.sharding import MeshConfig

ROOT = Path(__file__).parents[2]

CPU = "JAX_PLATFORMS=cpu"


@pytest.fixture
def environment(monkeypatch):
    """A function that sets variables; those that JAX and we read are unset before."""
    for name in (*backend.PROCESSES, "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.fixture
def updates(monkeypatch):
    """What is set of JAX's configuration, which stays as it is."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return found


def refusal(call) -> str:
    """The message of the UserError that `call` raises."""
    with pytest.raises(UserError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "no such GPU is here, or JAX has no plugin"),
        (
            RuntimeError("Backend 'rcom' is not known (set JAX_PLATFORMS='' ...)"),
            "is not known; un",
        ),
    ],
)
def test_devices_that_do_not_start(error, reason, environment, monkeypatch, capsys, tmp_path):
    """JAX says nothing of a missing NVIDIA driver: an AssertionError without a message."""

    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    status, err = command(capsys, monkeypatch, experiment(tmp_path / "run"))
    assert status == 2 and err.startswith("error: JAX_PLATFORMS=cpu: ") and err.count("\n") == 1
    environment(JAX_PLATFORMS="rcom")
    message = refusal(backend.devices)
    assert message.startswith("JAX_PLATFORMS=rcom: ") and reason in message and CPU in message
    monkeypatch.delenv("JAX_PLATFORMS")
    message = refusal(backend.devices)
    assert message.startswith("the devices of this machine: ") and CPU in message


def test_no_tpu(environment, monkeypatch):
    monkeypatch.setattr(backend, "has_tpu", lambda: False)
    monkeypatch.setattr(jax, "config", SimpleNamespace(jax_platforms="tpu,cpu"))
    environment(JAX_PLATFORMS="tpu,cpu")
    message = refusal(backend.devices)
    assert message.startswith("JAX_PLATFORMS=tpu,cpu: this machine has no TPU; unset it")
    assert CPU in message


@pytest.mark.parametrize("number", ["0", "-3", "eight", ""])
def test_a_number_of_devices_that_is_none(number):
    """JAX would end with a stack while it is imported, or go on with one device."""
    code = "import train.pretrain"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": number}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: JAX_NUM_CPU_DEVICES={number}: it is a number of dev")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("files", "plugins", "platforms", "said"),
    [
        ("/dev/nvidia[0-9]*", ["xla_cuda14"], "cuda,cpu", ""),
        ("/dev/dxg", ["xla_cuda13"], "cuda,cpu", ""),
        ("/dev/kfd", ["xla_rocm7"], "rocm,cpu", ""),
        ("/dev/nvidia[0-9]*", [], "cpu", "no plugin for it: pip install -e .[gpu]"),
        ("/dev/kfd", ["xla_cuda13"], "cpu", ""),
        ("", ["xla_cuda13"], "cpu", ""),
    ],
)
def test_gpus_beside_libtpu(
    files, plugins, platforms, said, environment, updates, monkeypatch, caplog
):
    monkeypatch.setattr(backend.glob, "glob", lambda pattern: [pattern] if pattern == files else [])
    found = [SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(backend.importlib.metadata, "entry_points", lambda group: found)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: name)
    with caplog.at_level(logging.INFO, "cakrawala"):
        backend.prepare()
    assert updates == {"jax_platforms": platforms}
    assert said in caplog.text and bool(said) == bool(caplog.text)


def test_simulated_devices_go_before_those_asked_for(environment, updates, caplog):
    environment(JAX_PLATFORMS="cuda")
    with caplog.at_level(logging.INFO, "cakrawala"):
        cli.start_backend(SimpleNamespace(mesh=MeshConfig(simulate=4)))
    assert updates["jax_platforms"] == "cpu" and updates["jax_num_cpu_devices"] == 4
    assert "mesh.simulate=4: CPU devices, not those of JAX_PLATFORMS=cuda" in caplog.text


@pytest.mark.parametrize(
    ("address", "count", "index", "message"),
    [
        ("host:1234", None, "0", "JAX_PROCESS_ID=0 without JAX_NUM_PROCESSES: set all three"),
        (None, "2", "0", "without JAX_COORDINATOR_ADDRESS"),
        (None, None, "1", "without JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
        ("host", "2", "1", "JAX_COORDINATOR_ADDRESS=host is not HOST:PORT"),
        ("host:", "2", "1", "=host: is not HOST:PORT"),
        (":1234", "2", "1", "=:1234 is not HOST:PORT"),
        ("host:99999", "2", "1", "=host:99999 is not HOST:PORT"),
        ("host:1234", "two", "0", "JAX_NUM_PROCESSES=two"),
        ("host:1234", "2", "-1", "JAX_PROCESS_ID=-1: an ID is a number from 0 to"),
        ("host:1234", "2", "2", "JAX_PROCESS_ID=2: an ID is a number from 0 to"),
        ("host:1234", "0", "0", "JAX_NUM_PROCESSES=0"),
    ],
)
def test_processes_named_wrongly(address, count, index, message, environment):
    named = dict(zip(backend.PROCESSES, (address, count, index), strict=True))
    environment(**{name: value for name, value in named.items() if value is not None})
    assert message in refusal(backend.join)


def test_a_port_that_is_taken(environment):
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        named = dict(zip(backend.PROCESSES, (address, "2", "0"), strict=True))
        environment(**named)
        message = refusal(backend.join)
    assert f"{address}: process 0 cannot listen on port" in message
    assert "Address already in" in message


def test_processes_that_do_not_meet(environment, monkeypatch, capsys):
    """JAX waits in C++, and would end the process from there with a stack and status 134."""
    ended = []
    monkeypatch.setattr(backend, "JOIN_SECONDS", 0.01)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: time.sleep(0.2))
    environment(**dict(zip(backend.PROCESSES, ("nowhere:1234", "2", "1"), strict=True)))
    backend.join()
    assert ended == [2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: JAX_COORDINATOR_ADDRESS=nowhere:1234, JAX_NUM_PROCESSES=2: ")
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    backend.join()
    time.sleep(0.03)
    assert ended == [2], "the timer runs on after they met"
