"""One transformer block: attention and MLP, with norms and residuals as `config.block` says.

A block holds the weights of all layers of its pattern slot, stacked on a first dim; the
transformer scans over that dim, so that inside `__call__` a block is one layer.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from model import rope
from model.attention import nsa
from model.attention.attend import attend
from model.attention.cached import attend_cached
from model.attention.cached_chosen import moba_cached, nsa_cached
from model.attention.cached_stream import stream_cached
from model.attention.decode import New, Stored
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec, Heads
from model.linear import add, project
from model.parameters import Maker

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def unit_rms(x32: jax.Array, eps: float) -> jax.Array:
    """x over the root of its mean square along the last dim."""
    return x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + eps)


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last dim, in float32."""

    def __init__(self, make: Maker, size: int, kind: str):
        self.eps = make.config.norm_eps
        self.offset = 1.0 if kind == "rms_offset" else 0.0
        self.scale_D = make.constant(1.0 - self.offset, size)
        self.bias_D = make.constant(0.0, size) if kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.bias_D is not None:
            x32 = x32 - x32.mean(axis=-1, keepdims=True)
        x32 = unit_rms(x32, self.eps)
        rank = (1,) * (x.ndim - 1)
        scale_D = self.offset + self.scale_D[...].astype(jnp.float32)
        x32 = x32 * scale_D.reshape(*rank, -1)
        if self.bias_D is not None:
            x32 = x32 + self.bias_D[...].reshape(*rank, -1)
        return x32.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with RoPE; K/V heads repeat when the mesh has more shards."""

    def __init__(self, make: Maker, spec: AttentionSpec):
        config, rules = make.config, make.rules
        self.config, self.rules, self.spec = config, rules, spec
        D, N = config.embed_dim, config.num_heads
        K, H = config.kv_shape(spec)
        heads = ("embed", "heads", "head_dim")
        kv_heads = ("embed", "kv_heads" if self.kv_repeats == 1 else None, "head_dim")
        self.q_DNH = make.normal(0, (D, N, H), heads)
        self.k_DKH = make.normal(1, (D, K, H), kv_heads)
        self.v_DKH = None if spec.shared_kv else make.normal(2, (D, K, H), kv_heads)
        depth = (2 * config.num_layers) ** -0.5  # keeps the residual's variance (GPT-2)
        self.o_NHD = make.normal(3, (N, H, D), ("heads", "head_dim", "embed"), depth)
        biased = "qkv" in config.bias
        self.q_bias_NH = make.zeros((N, H), heads[1:]) if biased else None
        self.k_bias_KH = make.zeros((K, H), kv_heads[1:]) if biased else None
        self.v_bias_KH = make.zeros((K, H), kv_heads[1:]) if biased and not spec.shared_kv else None
        self.o_bias_D = make.zeros((D,), (None,)) if "out" in config.bias else None
        self.q_norm = Norm(make, H, config.norm) if config.qk_norm else None
        self.k_norm = Norm(make, H, config.norm) if config.qk_norm else None
        self.sink_N = make.constant(0.0, N, "heads") if spec.sink_logit else None
        self.branches = Branches(make, spec) if spec.kind == "nsa" else None

    @property
    def kv_repeats(self) -> int:
        """Copies of each K/V head, so that every shard of the heads has one of its own."""
        K, _ = self.config.kv_shape(self.spec)
        return max(1, self.rules.size("act_heads") // K)

    def _heads(self) -> Heads:
        sink_N = None if self.sink_N is None else self.sink_N[...].astype(jnp.float32)
        slope_N = None
        if self.spec.alibi:
            slope_N = self.spec.alibi * alibi_slopes(self.config.num_heads)
            slope_N = jax.sharding.reshard(slope_N, self.rules("act_heads"))
        return Heads(sink_N, slope_N)

    def _qkv(
        self, x_BTD: jax.Array, cos_sin: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What kernels take: normalised, turned, scaled, a kv head or more on each shard."""
        config, rules = self.config, self.rules
        q_BTNH = add(project("BTD,DNH->BTNH", x_BTD, self.q_DNH[...]), self.q_bias_NH)
        k_BTKH = add(project("BTD,DKH->BTKH", x_BTD, self.k_DKH[...]), self.k_bias_KH)
        v_BTKH = k_BTKH
        if self.v_DKH is not None:
            v_BTKH = add(project("BTD,DKH->BTKH", x_BTD, self.v_DKH[...]), self.v_bias_KH)
        if config.value_norm:
            v_BTKH = unit_rms(v_BTKH.astype(jnp.float32), config.norm_eps).astype(x_BTD.dtype)
        if self.q_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if cos_sin is not None:
            q_BTNH, k_BTKH = rope.rotate(q_BTNH, cos_sin), rope.rotate(k_BTKH, cos_sin)
        if config.query_scale:  # kernels scale by head_dim^-0.5
            q_BTNH = q_BTNH * (config.query_scale * q_BTNH.shape[-1] ** 0.5)
        if self.kv_repeats > 1:
            sharding = rules("batch", "length", "act_kv_heads", None)
            k_BTKH, v_BTKH = (
                jax.sharding.reshard(jnp.repeat(x, self.kv_repeats, axis=2), sharding)
                for x in (k_BTKH, v_BTKH)
            )
        return q_BTNH, k_BTKH, v_BTKH

    def __call__(
        self,
        x_BTD: jax.Array,
        at: Positions,
        cos_sin: tuple[jax.Array, jax.Array] | None,
        cache: Stored | None,
    ) -> tuple[jax.Array, New]:
        rules = self.rules
        q_BTNH, k_BTKH, v_BTKH = self._qkv(x_BTD, cos_sin)
        seen = (k_BTKH, v_BTKH) if cache is None else cache.as_read(k_BTKH, v_BTKH)
        qkv = q_BTNH, *seen
        how = dict(kernel=self.config.attention_kernel, rules=rules, heads=self._heads())
        of_blocks = None
        if self.branches is not None:
            out_BTNH, of_blocks = self.branches(x_BTD, qkv, at, cache)
        elif cache is None:
            out_BTNH = attend(*qkv, at, self.spec, **how)
        elif self.spec.kind == "stream":
            out_BTNH = stream_cached(*qkv, at, cache, self.spec, **how)
        elif self.spec.kind == "moba":
            out_BTNH, of_blocks = moba_cached(*qkv, at, cache, self.spec, **how)
        else:
            out_BTNH = attend_cached(*qkv, at, cache, self.spec, **how)
        residual = rules("batch", "length", "act_embed")
        out_BTD = add(project("BTNH,NHD->BTD", out_BTNH, self.o_NHD[...], residual), self.o_bias_D)
        return out_BTD, New(k_BTKH, v_BTKH, of_blocks)


class Branches(nnx.Module):
    """What native sparse attention (attention/nsa.py) learns: gates, and how K and V compress."""

    def __init__(self, make: Maker, spec: AttentionSpec):
        self.config, self.rules, self.spec = make.config, make.rules, spec
        D, N = make.config.embed_dim, make.config.num_heads
        self.gates_DN3 = make.normal(7, (D, N, 3), ("embed", "heads", None))
        self.keys, self.values = (Compressor(make, spec, index) for index in (8, 11))

    def __call__(
        self, x_BTD: jax.Array, qkv: tuple[jax.Array, ...], at: Positions, cache: Stored | None
    ) -> tuple[jax.Array, New | None]:
        gates_BTN3 = jax.nn.sigmoid(project("BTD,DNC->BTNC", x_BTD, self.gates_DN3[...]))
        learned = gates_BTN3, (self.keys(), self.values())
        how = dict(kernel=self.config.attention_kernel, rules=self.rules)
        if cache is None:
            return nsa.attention(*qkv, *learned, at, self.spec, **how), None
        return nsa_cached(*qkv, *learned, at, cache, self.spec, **how)


class Compressor(nnx.Module):
    """The weights of one `nsa.Compressor`."""

    def __init__(self, make: Maker, spec: AttentionSpec, index: int):
        _, H = make.config.kv_shape(spec)
        whole = None, None
        self.place_CH = make.normal(index, (spec.compress, H), whole)
        self.in_HF = make.normal(index + 1, (H, H), whole)
        self.out_FH = make.normal(index + 2, (H, H), whole)

    def __call__(self) -> nsa.Compressor:
        return nsa.Compressor(self.place_CH[...], self.in_HF[...], self.out_FH[...])


def alibi_slopes(num_heads: int) -> jax.Array:
    """Slopes [N] of ALiBi (arXiv 2108.12409): 2^(-8 i / N); between powers of 2 as in its code."""
    floor = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * i / floor) for i in range(1, floor + 1)]
    slopes += [2 ** (-4 * i / floor) for i in range(1, 2 * (num_heads - floor) + 1, 2)]
    return jnp.array(slopes, jnp.float32)


class MLP(nnx.Module):
    """act(x G) * (x U) D, the gated linear unit of arXiv 2002.05202, or act(x U) D."""

    def __init__(self, make: Maker):
        config = self.config = make.config
        self.rules = make.rules
        D, F = config.embed_dim, config.mlp_dim
        self.up_DF = make.normal(4, (D, F), ("embed", "mlp"))
        depth = (2 * config.num_layers) ** -0.5
        self.down_FD = make.normal(5, (F, D), ("mlp", "embed"), depth)
        gated = config.mlp == "gated"
        self.gate_DF = make.normal(6, (D, F), ("embed", "mlp")) if gated else None
        biased = "mlp" in config.bias
        self.up_bias_F = make.zeros((F,), ("mlp",)) if biased else None
        self.gate_bias_F = make.zeros((F,), ("mlp",)) if biased and gated else None
        self.down_bias_D = make.zeros((D,), (None,)) if biased else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        h_BTF = add(project("BTD,DF->BTF", x_BTD, self.up_DF[...]), self.up_bias_F)
        if self.gate_DF is None:
            h_BTF = activation(h_BTF)
        else:
            gate_BTF = add(project("BTD,DF->BTF", x_BTD, self.gate_DF[...]), self.gate_bias_F)
            h_BTF = activation(gate_BTF) * h_BTF
        residual = self.rules("batch", "length", "act_embed")
        return add(project("BTF,FD->BTD", h_BTF, self.down_FD[...], residual), self.down_bias_D)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), or a variation of that: `config.block`."""

    def __init__(self, make: Maker, spec: AttentionSpec):
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
        cache: Stored | None,
    ) -> tuple[jax.Array, New]:
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
