"""The map between the tensors of a checkpoint and our parameters: names, shapes, both ways.

A checkpoint's linear layer multiplies by weight [out, in]; ours are [in, out], heads apart.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """The layout in which one tensor of a checkpoint holds parameters of ours."""

    shape: tuple[int, ...]  # of the checkpoint's tensor
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]  # checkpoint -> ours, views where it can
    join: Callable[..., np.ndarray]  # ours -> checkpoint


class Tensor(NamedTuple):
    """One tensor of a checkpoint."""

    name: str  # as "model.layers.3.self_attn.q_proj.weight"
    params: tuple[str, ...]  # names of our leaves (core.tree), in split's order
    layer: int | None  # index on the leaves' first dim, None where they are not stacked
    layout: Layout


def same(*shape: int) -> Layout:
    """The tensor is the parameter."""
    return Layout(shape, lambda x: (x,), lambda x: x)


def transposed(rows: int, columns: int) -> Layout:
    """A parameter [rows, columns] from a linear layer's weight."""
    return Layout((columns, rows), lambda x: (x.T,), lambda x: x.T)


def to_heads(D: int, N: int, H: int) -> Layout:
    """A parameter [D, N, H] from a linear layer's weight [N H, D]."""
    return Layout((N * H, D), lambda x: (x.T.reshape(D, N, H),), lambda x: x.reshape(D, N * H).T)


def from_heads(N: int, H: int, D: int) -> Layout:
    """A parameter [N, H, D] from a linear layer's weight [D, N H]."""
    return Layout((D, N * H), lambda x: (x.T.reshape(N, H, D),), lambda x: x.reshape(N * H, D).T)


def heads(N: int, H: int) -> Layout:
    """A parameter [N, H] from a vector, as biases are."""
    return Layout((N * H,), lambda x: (x.reshape(N, H),), lambda x: x.reshape(N * H))
