"""Families of public checkpoints: config.json <-> ModelConfig, and the names of their tensors."""

from typing import Any, NamedTuple

from core.config import UserError
from model.attention.spec import full
from model.config import ModelConfig
from model.families.tensor import Layout, Tensor

FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "num_hidden_layers": "num_layers",
    "hidden_size": "embed_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_head",
}


class Checkpoint(NamedTuple):
    """What a checkpoint is, and all tensors that must be there."""

    config: ModelConfig
    tensors: list[Tensor]


def read(config_json: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes; UserError if it is of no family here."""
    if config_json.get("model_type") != "llama":
        raise UserError(
            f"model_type={config_json.get('model_type')!r} is not supported; supported are llama"
        )
    known = {ours: config_json[theirs] for theirs, ours in FIELDS.items() if theirs in config_json}
    heads = known["embed_dim"] // known["num_heads"]
    base = float(config_json.get("rope_theta", 10_000.0))
    return ModelConfig(
        **{"head_dim": heads, "tied_head": False, **known, "pattern": (full(rope_base=base),)}
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of an export; UserError if no family can say what `config` says."""
    if config.pattern != (full(rope_base=config.pattern[0].rope_base),) or config.norm != "rms":
        raise UserError("no family of public checkpoints has this model")
    names = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rope_theta": config.pattern[0].rope_base,
        **names,
    }


def _plain(*shape: int) -> Layout:
    return Layout(shape, lambda x: (x,), lambda x: x)


def _linear(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Layout:
    # torch keeps [outputs, inputs]
    def size(dims):
        return dims[0] if len(dims) == 1 else dims[0] * dims[1]

    shape = size(outputs), size(inputs)
    return Layout(
        shape, lambda x: (x.T.reshape(*inputs, *outputs),), lambda x: x.reshape(shape[::-1]).T
    )


def tensors(config: ModelConfig) -> list[Tensor]:
    """All tensors of the checkpoint."""
    D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    F, V = config.mlp_dim, config.vocab_size
    layer = {
        "self_attn.q_proj": ("attention.q_DNH", _linear((D,), (N, H))),
        "self_attn.k_proj": ("attention.k_DKH", _linear((D,), (K, H))),
        "self_attn.v_proj": ("attention.v_DKH", _linear((D,), (K, H))),
        "self_attn.o_proj": ("attention.o_NHD", _linear((N, H), (D,))),
        "mlp.gate_proj": ("mlp.gate_DF", _linear((D,), (F,))),
        "mlp.up_proj": ("mlp.up_DF", _linear((D,), (F,))),
        "mlp.down_proj": ("mlp.down_FD", _linear((F,), (D,))),
        "input_layernorm": ("attention_norm.scale_D", _plain(D)),
        "post_attention_layernorm": ("mlp_norm.scale_D", _plain(D)),
    }
    whole = {
        "model.embed_tokens": ("embedding_VD", _plain(V, D)),
        "model.norm": ("final_norm.scale_D", _plain(D)),
        "lm_head": ("head_VD", _plain(V, D)),
    }
    if config.tied_head:
        del whole["lm_head"]
    found = [Tensor(f"{n}.weight", (p,), None, layout) for n, (p, layout) in whole.items()]
    for i in range(config.num_layers):
        for name, (param, layout) in layer.items():
            name, param = f"model.layers.{i}.{name}.weight", f"stages.0.0.{param}"
            found.append(Tensor(name, (param,), i, layout))
    return found


def canonical(name: str, config: ModelConfig) -> str | None:
    """The name in `tensors` of what a file names; None for what may be dropped."""
    del config
    return None if name.endswith("rotary_emb.inv_freq") else name
