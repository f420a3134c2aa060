"""The choice of devices, made before JAX starts its backend."""

import contextlib
import glob
import importlib.metadata
import importlib.util
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax

from core.config import UserError

log = logging.getLogger("cakrawala")

JOIN_SECONDS = 60  # in which all processes of a run must have started
PROCESSES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Files of a device, by JAX's name of the platform; WSL has one of its own for NVIDIA's.
GPU_FILES = {"cuda": ("/dev/nvidia[0-9]*", "/dev/dxg"), "rocm": ("/dev/kfd",)}


def prepare(simulate: int = 0) -> None:
    """Sets the platform: `simulate` CPU devices, or what this machine has.

    Call it once, before the first array. JAX_PLATFORMS chooses among what this machine has.
    """
    if simulate:
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", simulate)
        # A program read back from JAX's compile cache has lost the order of its collectives
        # (jaxlib 0.10.2): one device waits in an all-gather, the others in an all-reduce.
        jax.config.update("jax_enable_compilation_cache", False)
    elif "JAX_PLATFORMS" not in os.environ and not has_tpu() and importlib.util.find_spec("libtpu"):
        # libtpu beside a CPU or GPU (extra `aot`) would be asked for a TPU at every start.
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        jax.config.update("jax_platforms", ",".join([*gpus(), "cpu"]))


def devices() -> list[jax.Device]:
    """Returns all devices, and starts JAX's backend for that. UserError if it cannot start."""
    asked = os.environ.get("JAX_PLATFORMS")
    what = f"JAX_PLATFORMS={asked}" if asked else "the devices of this machine"
    remedy = "unset it to use what this machine has" if asked else "see that no one else has them"
    remedy += ", or set JAX_PLATFORMS=cpu"
    # libtpu would fill the terminal before it says the same.
    if "tpu" in (jax.config.jax_platforms or "").split(",") and not has_tpu():
        raise UserError(f"{what}: this machine has no TPU; {remedy}")
    try:
        return jax.devices()
    except (AssertionError, RuntimeError) as error:
        # An AssertionError without a message is all that JAX says of "cuda" without a driver.
        reason = str(error).partition(" (set JAX_PLATFORMS=")[0].rstrip(".")
        if not reason or any(f"'{each}' is not in the list" in reason for each in GPU_FILES):
            reason = "no such GPU is here, or JAX has no plugin for it (pip install -e .[gpu])"
        raise UserError(f"{what}: {reason}; {remedy}") from None


def keep_programs(workdir: str | Path) -> None:
    """Compiled programs are written to WORKDIR/programs, and read from there at the next start.

    Call it before anything is compiled. JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps none; nor do several CPU devices, as `prepare` says.
    """
    if devices()[0].platform == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
    elif jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(workdir) / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_only() -> None:
    """Lets libtpu compile for chips that are not there: JAX itself stays on the CPU.

    Call it before the first array. Without these variables libtpu asks the network which TPU this
    machine is, and a second process that loads it finds /tmp/libtpu_lockfile taken.
    """
    machine = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    os.environ.update(machine)
    jax.config.update("jax_platforms", "cpu")


def has_tpu() -> bool:
    """Returns whether this machine has TPU chips attached."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def gpus() -> list[str]:
    """Returns JAX's names of the GPUs that this machine has and JAX has a plugin for.

    Says so where NVIDIA's plugin is missing: JAX would, if it were left to look for itself.
    """
    plugins = [entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")]
    found = []
    for platform, files in GPU_FILES.items():
        if any(map(glob.glob, files)):
            if any(name.startswith(f"xla_{platform}") for name in plugins):
                found.append(platform)
            elif platform == "cuda":  # every laptop with an AMD processor has ROCm's file
                log.warning("a GPU is here, but JAX has no plugin for it: pip install -e .[gpu]")
    return found


def join(simulate: int = 0) -> None:
    """Joins the other processes: those that the environment names, or those of the TPU pod.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them. Each has `simulate`
    CPU devices where that is not 0; it is alone then if it is on a pod.
    """
    given = {name: os.environ[name] for name in PROCESSES if name in os.environ}
    if given:
        address, count, index = _processes(given)
        with _in_time(address, count):
            jax.distributed.initialize(address, count, index, initialization_timeout=600)
    elif has_tpu() and not simulate:
        jax.distributed.initialize()


def _processes(given: dict[str, str]) -> tuple[str, int, int]:
    """(address of process 0, number of processes, which of them this is)."""
    text = ", ".join(f"{name}={value}" for name, value in given.items())
    if missing := [name for name in PROCESSES if name not in given]:
        raise UserError(f"{text} without {', '.join(missing)}: set all three, or none")
    address, count, index = given.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address} is not HOST:PORT of process 0")
    if not count.isdecimal() or not index.isdecimal() or int(index) >= int(count):
        raise UserError(f"{text}: an ID is a number from 0 to JAX_NUM_PROCESSES - 1")
    if index == "0":
        _check_port(address, int(port))
    return address, int(count), int(index)


def _check_port(address: str, port: int) -> None:
    """UserError if this machine cannot listen there; JAX 0.12 crashes then."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address}: process 0 cannot listen on port {port} "
            f"({error.strerror}): name a free one"
        ) from None


@contextlib.contextmanager
def _in_time(address: str, count: int) -> Iterator[None]:
    """Ends this process with a message after JOIN_SECONDS; JAX would abort it with a stack."""

    def late() -> None:
        print(
            f"error: JAX_COORDINATOR_ADDRESS={address}, JAX_NUM_PROCESSES={count}: they have not "
            f"met in {JOIN_SECONDS} seconds. Start them all at once, with IDs from 0; process 0 "
            "must run at that address, and the others must reach it",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # the main thread is deep in C++

    timer = threading.Timer(JOIN_SECONDS, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
