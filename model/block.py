"""One transformer block: attention and MLP, with norms and residuals as `config.block` says.

A block holds the weights of all layers of its pattern slot, stacked on a first dim; the
transformer scans over that dim, so that inside `__call__` a block is one layer.
"""

import jax
from flax import nnx

from model.attention.mask import Positions
from model.attention.spec import AttentionSpec
from model.cache.flash_decode import LayerCache, NewKV
from model.initializers import ParamInit
from model.layers.attention import Attention
from model.layers.mlp import MLP
from model.layers.norm import Norm


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), or a variation of that: `config.block`."""

    def __init__(self, make: ParamInit, spec: AttentionSpec):
        kind = self.kind = make.config.block

        def norm(wanted: bool = True) -> Norm | None:
            return Norm(make, make.config.embed_dim, make.config.norm) if wanted else None

        self.attention_norm = norm()
        self.attention = Attention(make, spec)
        self.attention_post_norm = norm(kind == "sandwich")
        self.mlp_norm = norm(kind != "parallel")
        self.mlp = MLP(make)
        self.mlp_post_norm = norm(kind == "sandwich")
        self.scale_1 = make.constant(1.0, 1) if make.config.layer_scale else None

    def __call__(
        self,
        x_BTD: jax.Array,
        at: Positions,
        cos_sin: tuple[jax.Array, jax.Array] | None,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, NewKV]:
        """(x [B, T, D], what these tokens add to a cache)."""
        with jax.named_scope("attention"):
            normed_BTD = self.attention_norm(x_BTD)
            out_BTD, kv = self.attention(normed_BTD, at, cos_sin, cache)
            if self.attention_post_norm is not None:
                out_BTD = self.attention_post_norm(out_BTD)
        with jax.named_scope("mlp"):
            sum_BTD = x_BTD + out_BTD
            if self.mlp_norm is not None:
                normed_BTD = self.mlp_norm(x_BTD if self.kind == "parallel_norms" else sum_BTD)
            out_BTD = self.mlp(normed_BTD)
            if self.mlp_post_norm is not None:
                out_BTD = self.mlp_post_norm(out_BTD)
            x_BTD = sum_BTD + out_BTD
        if self.scale_1 is not None:
            x_BTD = x_BTD * self.scale_1[...].astype(x_BTD.dtype).reshape(1, 1, 1)
        return x_BTD, kv
