"""`ModelConfig`: the sizes and choices of a transformer. Frozen and hashable."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from core.config import Section, UserError, setting
from model.attention.spec import AttentionSpec, full

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """A decoder. `pattern` is repeated over the layers; layers of one slot share a scan."""

    vocab_size: int = setting(doc="rows of the embedding; at least the tokenizer's", low=1)
    context: int = setting(doc="longest text, in tokens, that the model is meant for", low=1)
    num_layers: int = setting(doc="blocks", low=1)
    embed_dim: int = setting(doc="width of the residual stream", low=1)
    num_heads: int = setting(doc="query heads", low=1)
    num_kv_heads: int = setting(doc="key and value heads; 1 is MQA", low=1)
    head_dim: int = setting(doc="width of a head; even, for RoPE", low=2)
    mlp_dim: int = setting(doc="hidden width of the MLP", low=1)
    pattern: tuple[AttentionSpec, ...] = setting((full(),), "attention of layers 0, 1, ...")
    block: Literal["sequential", "sandwich", "parallel", "parallel_norms"] = setting(
        "sequential",
        "attention, then the MLP, a norm before each; sandwich: and one after each; "
        "parallel: both of one norm of the input; parallel_norms: each of its own",
    )
    mlp: Literal["gated", "plain"] = setting("gated", "act(x G) * (x U), or act(x U)")
    activation: Literal["silu", "gelu", "gelu_tanh", "relu2"] = setting("silu", "of the MLP")
    bias: tuple[Literal["qkv", "out", "mlp"], ...] = setting((), "projections that add one")
    norm: Literal["rms", "rms_offset", "layer"] = setting(
        "rms", "RMSNorm, the same times 1 + scale, or LayerNorm with bias"
    )
    norm_eps: float = setting(1e-6, "added to the variance", above=0)
    qk_norm: bool = setting(False, "normalise queries and keys of each head")
    value_norm: bool = setting(False, "RMS-normalise the values of each head, without a scale")
    query_scale: float = setting(0.0, "of attention's scores; 0 is head_dim^-0.5", low=0)
    layer_scale: bool = setting(False, "what a layer gives is multiplied by a learned number")
    learned_positions: bool = setting(False, "a learned vector a position, up to the context")
    embed_scale: float = setting(1.0, "embeddings are multiplied by it", above=0)
    tied_head: bool = setting(True, "logits from the embedding's own table")
    logit_softcap: float = setting(0.0, "logits become cap * tanh(logit / cap); 0 is off", low=0)
    init_scale: float = setting(0.02, "standard deviation of the initial weights", above=0)
    attention_kernel: Literal["auto", "reference", "chunked", "splash", "gpu"] = setting(
        "auto", "how"
    )
    dtype: Dtype = setting("bfloat16", "of activations and matrix products")
    param_dtype: Dtype = setting("float32", "of stored parameters")

    def check(self) -> None:
        for K, H in map(self.kv_shape, (AttentionSpec(), *self.pattern)):
            if self.num_heads % K:
                raise UserError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={K}")
            if H % 2:
                raise UserError(f"head_dim={H} is odd: RoPE rotates pairs")
        if not 1 <= len(self.pattern) <= self.num_layers:
            raise UserError(
                f"pattern has {len(self.pattern)} slots for num_layers={self.num_layers}: "
                "it needs at least one, and no more than there are layers"
            )

    def check_length(self, field: str, length: int) -> None:
        """UserError if texts of `field`=`length` tokens have positions that were never made."""
        if self.learned_positions and length > self.context:
            raise UserError(
                f"{field}={length} is more than model.context={self.context}, and the model has "
                "learned positions: there is none beyond"
            )

    def kv_shape(self, spec: AttentionSpec) -> tuple[int, int]:
        """(kv heads, width of a head) of a slot."""
        return spec.kv_heads or self.num_kv_heads, spec.head_dim or self.head_dim

    @property
    def stages(self) -> tuple[tuple[tuple[AttentionSpec, ...], int], ...]:
        """((slots, repeats), ...): the whole repeats of the pattern, then what is left over."""
        repeats, rest = divmod(self.num_layers, len(self.pattern))
        return ((self.pattern, repeats), (self.pattern[:rest], 1))[: 2 if rest else 1]

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


# The sizes of `:tiny` experiments whose model is to be named by the user.
TINY = ModelConfig(
    vocab_size=512,
    context=512,
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=64,
    dtype="float32",
)
