"""WHERE: the length is sharded; every device gathers all keys and values, and keeps its queries.

Memory O(S) a device for one layer's K and V. The gradients of K and V return home by the
reduce-scatter that JAX derives from the gather.
"""

from types import ModuleType

import jax

from model.attention import local
from model.attention.spec import Heads, Mask, Where


def attention(
    axes: tuple[str, ...],
    kernel: ModuleType,
    mask: Mask,
    scale: float,
    softcap: float,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    heads: Heads,
    q_at: Where,
    k_at: Where,
) -> jax.Array:
    """out [B, T, N, H] for the T queries of this shard, over all keys of the mesh `axes`."""

    def gather(x):
        return jax.lax.all_gather(x, axes, axis=1, tiled=True)

    k_BSKH, v_BSKH = gather(k_BTKH), gather(v_BTKH)
    all_at = jax.tree.map(gather, k_at)
    how = kernel, mask, scale, softcap
    return local.attention(*how, q_BTNH, k_BSKH, v_BSKH, heads, q_at, all_at)
