"""Native sparse attention (arXiv 2502.11089): three branches of attention, gated and summed.

    compressed   all earlier tokens, `compress` of them made one every `step` tokens
    chosen       the blocks that the compressed branch attends to most (select.py, picked.py)
    window       the last `window` tokens

One K and V serve all three, as in fla-core; the paper projects them for each branch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.sharding import Rules
from model.attention import attend, blocks
from model.attention.block_topk import select
from model.attention.blocks import MaskedKernel
from model.attention.kernels import table as kernels
from model.attention.mask import Full, Positions
from model.attention.spec import AttentionSpec, Heads, sliding
from model.attention.strategies import local


class Compressor(NamedTuple):
    """p + gelu(p W) U for the weighted sum p of a block's C tokens; near its mean at first."""

    place_CH: jax.Array  # each token of a block counts (1 + place) / C
    in_HF: jax.Array
    out_FH: jax.Array

    @property
    def weight_CH(self) -> jax.Array:
        """The weight of each token of a block in the sum."""
        return (1 + self.place_CH.astype(jnp.float32)) / len(self.place_CH)

    def __call__(
        self, x_BTKH: jax.Array, at: Positions, of: select.BlockIndex, axes: tuple[str, ...]
    ) -> jax.Array:
        """[B, Z, K, H] in the dtype of `x`, from float32 sums."""
        return self.finish(select.pooled(x_BTKH, at, of, self.weight_CH, axes), x_BTKH.dtype)

    def finish(self, p_BZKH: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Returns compressed tokens from the sums [B, Z, K, H] of blocks."""
        in_HF, out_FH = (w.astype(jnp.float32) for w in (self.in_HF, self.out_FH))
        return (p_BZKH + jax.nn.gelu(p_BZKH @ in_HF) @ out_FH).astype(dtype)


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    gates_BTN3: jax.Array,
    compressors: tuple[Compressor, Compressor],
    at: Positions,
    spec: AttentionSpec,
    *,
    kernel: str,
    rules: Rules,
) -> jax.Array:
    """out [B, T, N, H]; `gates`, in 0..1, weigh the branches in the order above (equation 5).

    `compressors` are those of K and of V. Sharded as `attend` says.
    """
    compressed_BTNH, chosen_BTKC = _compressed(
        q_BTNH, k_BTKH, v_BTKH, compressors, at, spec, kernel=kernel, rules=rules
    )
    how = dict(kernel=kernel, rules=rules)
    chosen_BTNH = attend.attend(
        q_BTNH, k_BTKH, v_BTKH, at, spec, heads=Heads(chosen=chosen_BTKC), **how
    )
    near = sliding(spec.window, softcap=spec.softcap)
    near_BTNH = attend.attend(q_BTNH, k_BTKH, v_BTKH, at, near, **how)
    branches = compressed_BTNH, chosen_BTNH, near_BTNH
    return sum(gates_BTN3[..., i, None] * x_BTNH for i, x_BTNH in enumerate(branches))


def _compressed(q_BTNH, k_BTKH, v_BTKH, compressors, at, spec, *, kernel, rules):
    """(out [B, T, N, H] of the compressed branch, the blocks chosen by it [B, T, K, top])."""
    axes = rules.axes("length")
    how = kernels.kernel_of(kernel, q_BTNH.shape[1] // rules.size("length"))
    pair = MaskedKernel(how, Full(), q_BTNH.shape[-1] ** -0.5, spec.softcap)

    def of_device(q_BTNH, k_BTKH, v_BTKH, compressors, at):
        of = select.slots(at, spec.compress, spec.step, axes)
        k_BZKH, v_BZKH = (
            compress(x, at, of, axes)
            for compress, x in zip(compressors, (k_BTKH, v_BTKH), strict=True)
        )
        # Every device has all compressed keys: their gradients are summed where they vary.
        kv = (blocks.vary(x, q_BTNH) for x in (k_BZKH, v_BZKH))
        out_BTNH, lse_BTN = local.with_lse(pair, q_BTNH, *kv, Heads(), at, of.ends_at)
        chosen_BTKC = select.nsa(pair, q_BTNH, k_BZKH, lse_BTN, at, of, spec.block, spec.top, axes)
        return out_BTNH, chosen_BTKC

    q_spec = rules("batch", "length", "act_heads", None)
    kv_spec = rules("batch", "length", "act_kv_heads", None)
    at_spec = jax.tree.map(lambda _: rules("batch", "length"), at)
    whole = jax.tree.map(lambda _: rules(None, None), compressors)
    return jax.shard_map(
        of_device,
        in_specs=(q_spec, kv_spec, kv_spec, whole, at_spec),
        out_specs=(q_spec, kv_spec),
    )(q_BTNH, k_BTKH, v_BTKH, compressors, at)
