"""Which devices JAX will see, decided before it starts its backend."""

import glob
import importlib.util
import logging
import os
from pathlib import Path

import jax

log = logging.getLogger("cakrawala")


def prepare(simulate: int = 0) -> None:
    """Sets the platform: `simulate` CPU devices, or what this machine has.

    Call it once, before the first array. JAX_PLATFORMS from the environment wins.
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
        jax.config.update("jax_platforms", "cuda,cpu" if has_gpu() else "cpu")


def keep_programs(workdir: str | Path) -> None:
    """Compiled programs are written to WORKDIR/programs, and read from there at the next start.

    Call it before anything is compiled. JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false keeps none; nor do several CPU devices, as `prepare` says.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
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
    """Whether this machine has TPU chips attached."""
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU and JAX its plugin."""
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    return bool(glob.glob("/dev/nvidia[0-9]*")) and any(map(importlib.util.find_spec, plugins))


def join() -> None:
    """Joins the other processes: on a TPU pod always, elsewhere when the environment says so.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them, as in a test of two
    CPU processes on one machine.
    """
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        jax.distributed.initialize(
            environment["JAX_COORDINATOR_ADDRESS"],
            int(environment["JAX_NUM_PROCESSES"]),
            int(environment["JAX_PROCESS_ID"]),
        )
    elif has_tpu():
        jax.distributed.initialize()
