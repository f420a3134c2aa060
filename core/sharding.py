"""The mesh (data, seq, model), and the rules from logical to mesh axes.

    mesh = make_mesh(MeshConfig(data=-1, model=2))
    with jax.set_mesh(mesh):
        rules = training()
        rules("batch", "length", "act_embed")   # PartitionSpec("data", "seq", None)

Mesh axes are Explicit: a sharding mistake is an error on the line at fault, while tracing.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from core import backend
from core.compile import torus
from core.config import Section, UserError, setting

AXES = ("data", "seq", "model")
Strategy = Literal["auto", "local", "allgather", "ring", "ulysses"]
Layout = Literal["contiguous", "zigzag", "striped", "multizigzag"]
Order = Layout | Literal["dealt"]  # token by token to the shards of a cache: model/cache/


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """The layout of the devices, and the strategy of attention over them."""

    simulate: int = setting(0, "simulated CPU devices; 0 takes the real ones", low=0)
    data: int = setting(-1, "devices over the batch and FSDP; -1 is the rest", low=-1)
    seq: int = setting(1, "devices over the length and that of the cache; -1 is the rest", low=-1)
    model: int = setting(1, "devices over heads, MLP and vocabulary; -1 is the rest", low=-1)
    strategy: Strategy = setting("auto", "how keys reach queries when seq > 1")
    ulysses: int = setting(
        1, "neighbours of seq that exchange heads, for a ring over the groups of them", low=1
    )
    both_ways: bool = setting(
        False, "a ring sends half of its keys either way: a torus has links for both"
    )
    layout: Literal["auto", Layout] = setting("auto", "order of a training row over seq")

    def check(self) -> None:
        sizes = self.data, self.seq, self.model
        if 0 in sizes:
            raise UserError(f"data, seq, model = {sizes}: an axis has 1 device or more, or -1")
        if sizes.count(-1) > 1:
            raise UserError(f"data, seq, model = {sizes}: at most one axis may be -1")
        if self.ulysses > 1 and self.strategy != "ring":
            raise UserError(
                f"ulysses={self.ulysses} with strategy={self.strategy!r}: groups that exchange "
                "heads go with strategy='ring'; strategy='ulysses' exchanges over all of seq"
            )
        if self.both_ways and self.strategy not in ("auto", "ring"):
            raise UserError(
                f"both_ways=True with strategy={self.strategy!r}: only a ring goes either way; "
                "use strategy='ring' or 'auto'"
            )


def axis_sizes(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Sizes of (data, seq, model) that use every device; UserError if they cannot."""
    sizes = config.data, config.seq, config.model
    fixed = math.prod(size for size in sizes if size != -1)
    if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
        raise UserError(
            f"mesh data, seq, model = {sizes} does not divide {num_devices} devices: "
            f"set one axis to -1, or mesh.simulate={fixed} to try it on a CPU"
        )
    sizes = tuple(num_devices // fixed if size == -1 else size for size in sizes)
    if sizes[1] % config.ulysses:
        raise UserError(
            f"mesh.ulysses={config.ulysses} does not divide mesh.seq={sizes[1]}: "
            "groups are of equal size"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices`, by default all of them."""
    devices = backend.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    if devices[0].platform == "tpu":
        grid = _tpu_grid(sizes, devices)
    else:
        # GPUs have `coords` too: slice, host and number in it. A switch or the host's own links
        # join the GPUs of a host, in no order; so `model`, then `seq`, stay within a host if they
        # fit. The network between hosts carries what crosses them, which is slower but works.
        hosts = sorted(devices, key=lambda d: (_slice_index(d), d.process_index, d.id))
        grid = np.array(hosts, dtype=object).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def _tpu_grid(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """TPUs in the order of their torus; several slices split `data` (hybrid ICI/DCN)."""
    num_slices = len(set(map(_slice_index, devices)))
    # An axis of 64 over a 4x4x8 slice takes a part of one physical axis: let it.
    if num_slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif sizes[0] % num_slices:
        raise UserError(
            f"mesh.data={sizes[0]} is not a multiple of the {num_slices} slices, and no other "
            f"axis crosses them: set mesh.data to -1 or to a multiple of {num_slices}"
        )
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // num_slices, *sizes[1:]),
            (num_slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    # Neighbours on `seq` are neighbours on the torus, for what goes round it.
    places = [(*device.coords, device.core_on_chip) for device in grid[0, :, 0]]
    return grid[:, torus.ring(places)]


def _slice_index(device: jax.Device) -> int:
    """The slice of a device; on platforms without slices all are in the first."""
    return getattr(device, "slice_index", 0)


MeshAxes = str | tuple[str, ...] | None
CHOICES = ("strategy", "ulysses", "both_ways", "layout")  # fields of Rules that name no mesh axis


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axis (or axes) of each logical axis. A variation is a `dataclasses.replace`.

    Weights are FSDP-sharded over `data` and `seq` along `embed`, and gathered when used;
    heads, MLP and vocabulary are split over `model`, so their activations are too.
    """

    vocab: MeshAxes = "model"
    embed: MeshAxes = ("data", "seq")
    heads: MeshAxes = "model"
    kv_heads: MeshAxes = "model"
    head_dim: MeshAxes = None
    mlp: MeshAxes = "model"
    layers: MeshAxes = None

    batch: MeshAxes = "data"
    length: MeshAxes = "seq"
    kv_length: MeshAxes = None
    act_embed: MeshAxes = None
    act_heads: MeshAxes = "model"
    act_kv_heads: MeshAxes = "model"
    act_mlp: MeshAxes = "model"
    act_vocab: MeshAxes = "model"

    # How attention crosses `length`, and in which order its tokens stand (core/layout.py).
    strategy: Strategy = "auto"
    ulysses: int = 1
    both_ways: bool = False
    layout: Order = "contiguous"

    def __call__(self, *names: str | None) -> PartitionSpec:
        """The PartitionSpec of an array whose dims have these logical names (None: whole)."""
        known = {f.name for f in dataclasses.fields(self)} - set(CHOICES)
        for name in names:
            if name is not None and name not in known:
                raise ValueError(
                    f"{name!r} is no logical axis; they are {', '.join(sorted(known))}"
                )
        spec = PartitionSpec(*(getattr(self, name) if name else None for name in names))
        flat = self.axes(*filter(None, names))
        if len(flat) != len(set(flat)):
            raise ValueError(f"{names} -> {spec} uses a mesh axis twice")
        return spec

    def axes(self, *names: str) -> tuple[str, ...]:
        """The mesh axes of these logical axes, one after the other."""
        entries = (getattr(self, name) or () for name in names)
        return tuple(
            a for entry in entries for a in ((entry,) if isinstance(entry, str) else entry)
        )

    def size(self, name: str) -> int:
        """Number of shards of the logical axis `name` on the mesh in use."""
        shape = jax.sharding.get_abstract_mesh().shape
        return math.prod(shape[axis] for axis in self.axes(name))

    def ring_size(self) -> int:
        """Parts of the length that stay whole in attention: groups that exchange heads are one."""
        return 1 if self.strategy == "ulysses" else self.size("length") // self.ulysses


def training(
    strategy: Strategy = "auto",
    ulysses: int = 1,
    layout: Layout = "contiguous",
    both_ways: bool = False,
) -> Rules:
    """FSDP over data and seq, tensor parallel over model, context over seq."""
    return Rules(strategy=strategy, ulysses=ulysses, both_ways=both_ways, layout=layout)


def prefilling(strategy: Strategy = "auto", ulysses: int = 1, both_ways: bool = False) -> Rules:
    """Rows over data, their chunks and the cache's length over seq, heads over model.

    Weights are whole but for the model axis.
    """
    how = dict(strategy=strategy, ulysses=ulysses, both_ways=both_ways, layout="dealt")
    return Rules(embed=None, kv_length="seq", **how)


def decoding() -> Rules:
    """The same for new tokens that come one by one: each is on all shards of the cache."""
    return dataclasses.replace(prefilling(), length=None)


def whole() -> Rules:
    """Everything on every device."""
    axes = {f.name: None for f in dataclasses.fields(Rules) if f.name not in CHOICES}
    return Rules(**axes, strategy="local")


def device_kind() -> str:
    """Returns the device kind of the mesh in use; under train.aot this machine has another."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else "a mesh without devices"
