"""Quest (arXiv 2406.10774): a new query reads the pages of a long cache that can matter most.

Of each page of neighbouring tokens the lowest and the highest number of its keys are kept, a
channel each. They bound what any key in it can score: q k <= sum max(q low, q high). The heads of
a group read the pages whose bound is highest for one of them, and always the newest; what they
read is exact. Chunks of a prompt read everything.

Each of P shards of the length has pages of its own, every P-th token, and reads 1 / P of them: no
bound crosses the mesh, and all read as much.
"""

import jax
import jax.numpy as jnp

from model.attention.blocks import MaskedKernel, PartialSoftmax
from model.attention.mask import Positions
from model.attention.spec import Heads
from model.cache import flash_decode, kv_quant
from model.cache.flash_decode import LayerCache
from model.cache.kv_quant import KVArray, QuantisedKV

QUERIES = 8  # of a row at once, at most: more of them would read most pages anyway


def forward(
    q_BTNH: jax.Array, cache: LayerCache, heads: Heads, q_at: Positions, pair: MaskedKernel
) -> PartialSoftmax:
    """(out [B, T, N, H], lse [B, T, N]) float32, as decode.forward, over the pages that count."""
    B, T, N, H = q_BTNH.shape
    _, _, K, S, _ = cache.k_LBKSH.shape
    page = cache.pages.page
    q_BKGTH = jnp.moveaxis((q_BTNH * pair.scale).reshape(B, T, K, N // K, H), 1, 3)
    at_BZP = cache.positions_BS.reshape(B, S // page, page)
    slope_KG11 = None if heads.slope_N is None else heads.slope_N.reshape(K, N // K, 1, 1)
    q_at_B11T1 = q_at.positions_BT[:, None, None, :, None]

    bound_BKTZ = _bounds(q_BKGTH, cache, at_BZP.max(-1), slope_KG11, q_at_B11T1)
    best_BKTC, page_BKTC = jax.lax.top_k(bound_BKTZ, cache.pages.count)
    row, head = (x[..., None, None] for x in jnp.ogrid[:B, :K])

    def read(kept: KVArray) -> tuple[jax.Array, jax.Array | None]:
        def fetch(x_LBKS: jax.Array) -> jax.Array:
            L, *_ = x_LBKS.shape
            paged = x_LBKS.reshape(L, B, K, S // page, page, *x_LBKS.shape[4:])
            x_BKTCP = paged[cache.layer, row, head, page_BKTC]
            return x_BKTCP.reshape(B, K, T, -1, *x_LBKS.shape[4:])

        part = jax.tree.map(fetch, kept)
        scale = part.scale[:, :, None] if isinstance(part, QuantisedKV) else None
        dtype = kv_quant.product_dtype(part, q_BTNH.dtype)
        return kv_quant.levels(part, dtype), scale

    (k_BKTSH, k_scale), (v_BKTSH, v_scale) = read(cache.k_LBKSH), read(cache.v_LBKSH)
    at_BKTCP = at_BZP[row, page_BKTC]
    is_page_BKTC1 = ~jnp.isneginf(best_BKTC)[..., None]
    at_BK1TS = jnp.where(is_page_BKTC1, at_BKTCP, -1).reshape(B, K, 1, T, -1)
    s_BKGTS = jnp.einsum("BKGTH,BKTSH->BKGTS", q_BKGTH, k_BKTSH, preferred_element_type=jnp.float32)
    s_BKGTS = kv_quant.scaled(s_BKGTS, k_scale)
    if pair.softcap:
        s_BKGTS = pair.softcap * jnp.tanh(s_BKGTS / pair.softcap)
    if slope_KG11 is not None:
        s_BKGTS += slope_KG11[None] * (at_BK1TS - q_at_B11T1)
    q_B11T1 = jax.tree.map(
        lambda x_BT: x_BT[:, None, None, :, None], flash_decode.one_document(q_at)
    )
    seen_BK1TS = pair.mask.pairs(q_B11T1, flash_decode.stored_at(at_BK1TS))
    s_BKGTS = jnp.where(seen_BK1TS, s_BKGTS, -jnp.inf)
    lse_BKGT = jax.nn.logsumexp(s_BKGTS, axis=-1)
    # A query that sees nothing has lse -inf: keep -inf - -inf out.
    safe_BKGT = jnp.where(jnp.isneginf(lse_BKGT), 0.0, lse_BKGT)
    weight_BKGTS = kv_quant.scaled(jnp.exp(s_BKGTS - safe_BKGT[..., None]), v_scale)
    out_BKGTH = jnp.einsum(
        "BKGTS,BKTSH->BKGTH", weight_BKGTS.astype(v_BKTSH.dtype), v_BKTSH,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    out_BTNH = jnp.moveaxis(out_BKGTH, 3, 1).reshape(B, T, N, H)
    return out_BTNH, jnp.moveaxis(lse_BKGT, 3, 1).reshape(B, T, N)


def _bounds(
    q_BKGTH: jax.Array, cache: LayerCache, last_BZ: jax.Array, slope_KG11, q_at_B11T1: jax.Array
) -> jax.Array:
    """The highest score that a head of the group can have in each page, float32 [B, K, T, Z].

    The newest page has infinity, one without tokens its opposite; `last` are the positions of
    the last token of each page.
    """
    low_BKZH, high_BKZH = (
        jax.lax.dynamic_index_in_dim(x, cache.layer, keepdims=False)
        for x in (cache.pages.low_LBKZH, cache.pages.high_LBKZH)
    )
    bound_BKGTZ = sum(
        jnp.einsum("BKGTH,BKZH->BKGTZ", q, x, preferred_element_type=jnp.float32)
        for q, x in (
            (jnp.maximum(q_BKGTH, 0), high_BKZH),
            (jnp.minimum(q_BKGTH, 0), low_BKZH),
        )
    )
    last_B111Z = last_BZ[:, None, None, None]
    if slope_KG11 is not None:
        bound_BKGTZ += slope_KG11[None] * jnp.minimum(last_B111Z - q_at_B11T1, 0)
    bound_BKTZ = bound_BKGTZ.max(axis=2)
    last_B11Z = last_B111Z[:, 0]
    is_newest_B11Z = last_B11Z == last_B11Z.max(axis=-1, keepdims=True)
    bound_BKTZ = jnp.where(is_newest_B11Z, jnp.inf, bound_BKTZ)
    return jnp.where(last_B11Z < 0, -jnp.inf, bound_BKTZ)
