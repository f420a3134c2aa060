"""The projections around attention, and what native sparse attention learns beside them."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from model.attention import nsa
from model.attention.attend import attend
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec, Heads
from model.cache.cached import attend_cached
from model.cache.cached_chosen import moba_cached, nsa_cached
from model.cache.cached_stream import stream_cached
from model.cache.flash_decode import LayerCache, NewKV
from model.initializers import ParamInit
from model.layers.norm import Norm, unit_rms
from model.ops import rope
from model.ops.linear import add, project


class Attention(nnx.Module):
    """Grouped-query attention with RoPE; K/V heads repeat when the mesh has more shards."""

    def __init__(self, make: ParamInit, spec: AttentionSpec):
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
        """Returns q, k, v for kernels: normalised, rotated, scaled, kv heads on each shard."""
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
        cache: LayerCache | None,
    ) -> tuple[jax.Array, NewKV]:
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
        return out_BTD, NewKV(k_BTKH, v_BTKH, of_blocks)


class Branches(nnx.Module):
    """Gates and compressors of K and V: the parameters of native sparse attention (nsa.py)."""

    def __init__(self, make: ParamInit, spec: AttentionSpec):
        self.config, self.rules, self.spec = make.config, make.rules, spec
        D, N = make.config.embed_dim, make.config.num_heads
        self.gates_DN3 = make.normal(7, (D, N, 3), ("embed", "heads", None))
        self.keys, self.values = (CompressorWeights(make, spec, index) for index in (8, 11))

    def __call__(
        self, x_BTD: jax.Array, qkv: tuple[jax.Array, ...], at: Positions, cache: LayerCache | None
    ) -> tuple[jax.Array, NewKV | None]:
        gates_BTN3 = jax.nn.sigmoid(project("BTD,DNC->BTNC", x_BTD, self.gates_DN3[...]))
        learned = gates_BTN3, (self.keys(), self.values())
        how = dict(kernel=self.config.attention_kernel, rules=self.rules)
        if cache is None:
            return nsa.attention(*qkv, *learned, at, self.spec, **how), None
        return nsa_cached(*qkv, *learned, at, cache, self.spec, **how)


class CompressorWeights(nnx.Module):
    """The weights of one `nsa.Compressor`."""

    def __init__(self, make: ParamInit, spec: AttentionSpec, index: int):
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
