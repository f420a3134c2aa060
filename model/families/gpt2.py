"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, weights stored [in, out]."""

from typing import Any

import numpy as np

from model.attention.spec import full
from model.config import ModelConfig
from model.families import decoder, tensor
from model.families.attributes import ACTIVATIONS, Attributes, spelled
from model.families.tensor import Layout, Tensor

DEFAULTS = {
    "gpt2": {
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,  # float32 scores, as ours are
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        # The names that other families have for sizes; the class takes them for its own.
        "hidden_size": None,
        "max_position_embeddings": None,
        "num_attention_heads": None,
        "num_hidden_layers": None,
    }
}
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel"}
SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "context",
    "n_embd": "embed_dim",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "layer_norm_epsilon": "norm_eps",
    "initializer_range": "init_scale",
    "tie_word_embeddings": "tied_head",
}
OTHER_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
NAMES = {"gelu_new": "gelu_tanh", **ACTIVATIONS}
# Of every GPT-2; the rest is sizes.
STYLE = dict(
    pattern=(full(rope=None),),
    mlp="plain",
    bias=("qkv", "out", "mlp"),
    norm="layer",
    learned_positions=True,
)


def read(model_type: str, found: dict[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    found = {**{own: found[name] for name, own in OTHER_NAMES.items() if name in found}, **found}
    a = Attributes(found, DEFAULTS[model_type])
    for name, own in OTHER_NAMES.items():
        a.same(name, own)
    a.must_be(
        scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    fields = {field: a[name] for name, field in SIZES.items()}
    D, N = fields["embed_dim"], fields["num_heads"]
    H = a.head_dim("n_embd", "n_head")
    decoder.check_head_dim(a, H, "n_embd")
    return ModelConfig(
        **fields,
        **STYLE,
        num_kv_heads=N,
        head_dim=H,
        mlp_dim=a["n_inner"] or 4 * D,
        activation=a.choice("activation_function", NAMES),
    )


def write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """A config.json; `families.write` sees to it that it says all of `config`."""
    activation = spelled(NAMES, config.activation)
    sizes = {name: getattr(config, field) for name, field in SIZES.items()}
    return {**sizes, "n_inner": config.mlp_dim, "activation_function": activation}


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint."""
    D, F, V = config.embed_dim, config.mlp_dim, config.vocab_size
    N, H = config.num_heads, config.head_dim
    out = Layout((D, D), lambda x: (x.reshape(N, H, D),), lambda x: x.reshape(D, D))
    biases = tuple(f"attention.{x}" for x in ("q_bias_NH", "k_bias_KH", "v_bias_KH"))
    entries = {
        "attn.c_attn.weight": (
            ("attention.q_DNH", "attention.k_DKH", "attention.v_DKH"),
            _fused(D, N, H),
        ),
        "attn.c_attn.bias": (biases, _fused_bias(N, H)),
        "attn.c_proj.weight": (("attention.o_NHD",), out),
        "attn.c_proj.bias": (("attention.o_bias_D",), tensor.same(D)),
        "mlp.c_fc.weight": (("mlp.up_DF",), tensor.same(D, F)),
        "mlp.c_fc.bias": (("mlp.up_bias_F",), tensor.same(F)),
        "mlp.c_proj.weight": (("mlp.down_FD",), tensor.same(F, D)),
        "mlp.c_proj.bias": (("mlp.down_bias_D",), tensor.same(D)),
    }
    for name, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
        entries |= norm(name, ours, D)
    whole = [
        Tensor("transformer.wte.weight", ("embedding_VD",), None, tensor.same(V, D)),
        Tensor("transformer.wpe.weight", ("positions_PD",), None, tensor.same(config.context, D)),
        *decoder.per_layer(config, "transformer.h", lambda spec: entries),
        *final_norm(D),
    ]
    if not config.tied_head:
        whole.append(Tensor("lm_head.weight", ("head_VD",), None, tensor.same(V, D)))
    return whole


def norm(name: str, ours: str, D: int) -> dict[str, tuple[tuple[str, ...], Layout]]:
    """Entries of a LayerNorm."""
    return {
        f"{name}.weight": ((f"{ours}.scale_D",), tensor.same(D)),
        f"{name}.bias": ((f"{ours}.bias_D",), tensor.same(D)),
    }


def final_norm(D: int) -> list[Tensor]:
    """Tensors of the last LayerNorm."""
    return [
        Tensor(f"transformer.{name}", params, None, layout)
        for name, (params, layout) in norm("ln_f", "final_norm", D).items()
    ]


def _fused(D: int, N: int, H: int) -> Layout:
    """q, k, v [D, N, H] side by side in a weight [D, 3 N H]."""

    def split(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(part.reshape(D, N, H) for part in np.split(x, 3, axis=1))

    def join(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([part.reshape(D, N * H) for part in parts], axis=1)

    return Layout((D, 3 * N * H), split, join)


def _fused_bias(N: int, H: int) -> Layout:
    def split(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(x.reshape(3, N, H))

    return Layout((3 * N * H,), split, lambda *parts: np.stack(parts).reshape(-1))


def gpt2(layers: int, D: int, N: int) -> ModelConfig:
    """A published size."""
    sizes = dict(num_layers=layers, embed_dim=D, num_heads=N, num_kv_heads=N, head_dim=64)
    fixed = dict(vocab_size=50_257, context=1024, mlp_dim=4 * D, norm_eps=1e-5)
    return ModelConfig(**sizes, **fixed, activation="gelu_tanh", **STYLE)


PRESETS = {
    "gpt2-124m": gpt2(12, 768, 12),
    "gpt2-355m": gpt2(24, 1024, 16),
    "gpt2-774m": gpt2(36, 1280, 20),
    "gpt2-1.5b": gpt2(48, 1600, 25),
}
