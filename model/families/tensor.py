"""How tensors of a checkpoint hold our parameters: names, shapes, layouts; no values."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """How one tensor of a checkpoint holds parameters of ours."""

    shape: tuple[int, ...]  # of the checkpoint's tensor
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # checkpoint -> ours, views if possible
    join: Callable[..., np.ndarray]  # ours -> checkpoint


class Tensor(NamedTuple):
    """A tensor of a checkpoint and the parameters in it."""

    name: str  # as "model.layers.3.self_attn.q_proj.weight"
    params: tuple[str, ...]  # names of our leaves, in `split`'s order; a fused QKV has three
    layer: int | None  # index on the leaves' first dim, None if they are not stacked
    layout: Layout
