"""Pytrees as flat dicts of named leaves: what checkpoints, masks and reports speak of."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves by dotted path, as `stages.0.1.attention.q_DNH`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return {name(path): leaf for path, leaf in leaves}


def name(path: tuple[Any, ...]) -> str:
    """The dotted path; the `value` inside a flax Variable is left out."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return ".".join(parts[:-1] if parts[-1] == "value" else parts)


def with_leaves(tree: T, leaves: dict[str, Any]) -> T:
    """`tree` with its leaves replaced by those of the same names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[name(path)], tree)


def num_elements(tree: Any) -> int:
    """Elements over all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Bytes over all leaves, each counted once whatever its sharding."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
