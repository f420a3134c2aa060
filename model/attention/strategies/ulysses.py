"""WHERE: neighbours exchange heads for length (DeepSpeed-Ulysses, arXiv 2309.14509).

Each of `degree` devices gets the tokens of all for N / degree of the heads, sees to them with an
inner strategy, and gives the outputs back. Over all of `seq` the inner one is local; over groups
of neighbours it is a ring over the groups (USP, arXiv 2405.07719).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from model.attention.mask import Positions
from model.attention.spec import Heads

# Its results have the tokens in dim 1 and the heads in dim 2: out, or the out and lse of a partial
# softmax.
Inner = Callable[[jax.Array, jax.Array, jax.Array, Heads, Positions, Positions], Any]


def deals(heads: int, kv_heads: int, degree: int) -> bool:
    """Whether so many devices can exchange these heads; kv heads may be dealt to several."""
    return heads % degree == 0 and (kv_heads % degree == 0 or degree % kv_heads == 0)


def attention(
    axes: tuple[str, ...],
    groups: list[list[int]],
    inner: Inner,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    heads: Heads,
    q_at: Positions,
    k_at: Positions,
) -> Any:
    """Runs `inner`, [B, T, N, ...], over the tokens of each of the `groups` of `axes`."""
    how = dict(axis_name=axes, axis_index_groups=groups, tiled=True)
    degree = len(groups[0])

    def deal(x_BTKH):
        # Fewer kv heads than devices: one goes to each device that has query heads of its group,
        # and its gradient is rounded once for each of them.
        x_BTKH = jnp.repeat(x_BTKH, max(1, degree // x_BTKH.shape[2]), axis=2)
        return jax.lax.all_to_all(x_BTKH, split_axis=2, concat_axis=1, **how)

    q_BSNH, k_BSKH, v_BSKH, chosen_BSMC = jax.tree.map(deal, (q_BTNH, k_BTKH, v_BTKH, heads.chosen))
    at = jax.tree.map(lambda x: jax.lax.all_gather(x, axis=1, **how), q_at)
    mine = q_BSNH.shape[2]
    first = jax.lax.axis_index(axes) % degree * mine
    mine_of = functools.partial(jax.lax.dynamic_slice, start_indices=(first,), slice_sizes=(mine,))
    sink_N, slope_N = jax.tree.map(mine_of, heads[:2])
    heads = Heads(sink_N, slope_N, chosen_BSMC)
    found = inner(q_BSNH, k_BSKH, v_BSKH, heads, at, at)
    back = functools.partial(jax.lax.all_to_all, split_axis=1, concat_axis=2, **how)
    return jax.tree.map(back, found)
