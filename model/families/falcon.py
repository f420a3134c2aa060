"""Falcon (arXiv 2311.16867): 7B, 40B and 180B in parallel blocks, RW in sequence with ALiBi."""

from typing import Any

import numpy as np

from model.attention.spec import full
from model.config import ModelConfig
from model.families import decoder, rope_json, tensor
from model.families.attributes import ACTIVATIONS, Attributes, spelled
from model.families.gpt2 import final_norm, norm
from model.families.tensor import Layout, Tensor

DEFAULTS = {
    "falcon": {
        "vocab_size": 65_024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "num_kv_heads": None,
        "n_embed": None,  # an older name of hidden_size
        "ffn_hidden_size": None,
        "ff_factor": None,  # Falcon 2 tells its MLP twice
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "num_ln_in_parallel_attn": None,
        "alibi": False,
        "new_decoder_architecture": False,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "activation": "gelu",
        "apply_residual_connection_post_layernorm": False,
        **rope_json.DEFAULTS,
    }
}
ARCHITECTURES = {"falcon": "FalconForCausalLM"}
# Before transformers had a class, the files came with one of their own under another model_type.
# What that class has for an attribute left out; its heads of keys go with the new architecture.
OLD = {
    "RefinedWeb": {"new_decoder_architecture": True},
    "RefinedWebModel": {"multi_query": False, "parallel_attn": False},
}
OLD_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
}
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "layer_norm_epsilon": "norm_eps",
    "initializer_range": "init_scale",
    "tie_word_embeddings": "tied_head",
}
NORMS = {  # of a block
    "sequential": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "parallel": {"input_layernorm": "attention_norm"},
    "parallel_norms": {"ln_attn": "attention_norm", "ln_mlp": "mlp_norm"},
}


def renamed(found: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a file of RefinedWeb as it is spelled today."""
    today = {OLD_NAMES.get(name, name): value for name, value in found.items()}
    return {**OLD[found["model_type"]], **today, "model_type": "falcon"}


def read(model_type: str, found: dict[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    if found.get("n_embed") is not None:
        found = {"hidden_size": found["n_embed"], **found}
    a = Attributes(found, DEFAULTS[model_type])
    a.must_be(apply_residual_connection_post_layernorm=False)
    a.same("n_embed", "hidden_size")
    fields = {field: a[name] for name, field in SIZES.items()}
    D, N = fields["embed_dim"], fields["num_heads"]
    grouped, H = a["new_decoder_architecture"], a.head_dim("hidden_size", "num_attention_heads")
    decoder.check_head_dim(a, H, "hidden_size")
    K = (a["num_kv_heads"] or N) if grouped or not a["multi_query"] else 1
    decoder.check_kv_heads(a, K, "num_kv_heads")
    if not grouped and K not in (1, N):
        raise a.refused("num_kv_heads", "without new_decoder_architecture: each head has its own")
    block = "parallel" if grouped or a["parallel_attn"] else "sequential"
    if grouped and a["num_ln_in_parallel_attn"] in (2, None):
        block = "parallel_norms"
    mlp_dim = a["ffn_hidden_size"] or 4 * D
    if a["ff_factor"] and a["ff_factor"] * D != mlp_dim:
        raise a.refused("ff_factor", f"does not make {mlp_dim} of hidden_size={D}")
    context = a["max_position_embeddings"]
    if a["alibi"]:  # added to the scores before these are scaled
        spec = full(rope=None, alibi=H**-0.5)
    else:
        spec = full(rope=rope_json.read(a, H))
        context = rope_json.context(spec.rope, context)
    return ModelConfig(
        **fields,
        context=context,
        num_kv_heads=K,
        head_dim=H,
        mlp_dim=mlp_dim,
        pattern=(spec,),
        block=block,
        mlp="plain",
        activation=a.choice("activation", ACTIVATIONS),
        bias=("qkv", "out", "mlp") if a["bias"] else (),
        norm="layer",
    )


def write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """A config.json; `families.write` sees to it that it says all of `config`."""
    N, K = config.num_heads, config.num_kv_heads
    grouped = config.block == "parallel_norms" or (config.block == "parallel" and 1 < K < N)
    found = {name: getattr(config, field) for name, field in SIZES.items()}
    found |= dict(
        max_position_embeddings=config.context,
        ffn_hidden_size=config.mlp_dim,
        num_kv_heads=K,
        new_decoder_architecture=grouped,
        num_ln_in_parallel_attn=len(NORMS[config.block]) if grouped else None,
        multi_query=K == 1,
        parallel_attn=config.block != "sequential",
        bias="qkv" in config.bias,
        alibi=config.pattern[0].alibi > 0,
        activation=spelled(ACTIVATIONS, config.activation),
    )
    return found | rope_json.write(config.pattern[0].rope)


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint."""
    D, F, V = config.embed_dim, config.mlp_dim, config.vocab_size
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    dense, up, down = "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    fused = "self_attention.query_key_value"
    entries = {
        f"{fused}.weight": (
            ("attention.q_DNH", "attention.k_DKH", "attention.v_DKH"),
            _fused(D, N, K, H),
        ),
        f"{dense}.weight": (("attention.o_NHD",), tensor.from_heads(N, H, D)),
        f"{up}.weight": (("mlp.up_DF",), tensor.transposed(D, F)),
        f"{down}.weight": (("mlp.down_FD",), tensor.transposed(F, D)),
    }
    if config.bias:
        biases = tuple(f"attention.{x}" for x in ("q_bias_NH", "k_bias_KH", "v_bias_KH"))
        entries |= {
            f"{fused}.bias": (biases, _fused_bias(N, K, H)),
            f"{dense}.bias": (("attention.o_bias_D",), tensor.same(D)),
            f"{up}.bias": (("mlp.up_bias_F",), tensor.same(F)),
            f"{down}.bias": (("mlp.down_bias_D",), tensor.same(D)),
        }
    for name, ours in NORMS[config.block].items():
        entries |= norm(name, ours, D)
    words = "transformer.word_embeddings.weight"
    whole = [
        Tensor(words, ("embedding_VD",), None, tensor.same(V, D)),
        *decoder.per_layer(config, "transformer.h", lambda spec: entries),
        *final_norm(D),
    ]
    if not config.tied_head:
        whole.append(Tensor("lm_head.weight", ("head_VD",), None, tensor.same(V, D)))
    return whole


def _fused(D: int, N: int, K: int, H: int) -> Layout:
    """Group by group its N / K queries, its key and its value: of one group in multi-query 7B,
    of as many as heads in RW.
    """
    per_head = _fused_bias(N, K, H)

    def split(x: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = x.reshape(K, N // K + 2, H, D)
        return tuple(np.moveaxis(part.reshape(-1, H, D), 2, 0) for part in _parts(rows))

    def join(*parts: np.ndarray) -> np.ndarray:
        return _rows([np.moveaxis(part, 0, 2) for part in parts], K).reshape(-1, D)

    return Layout((*per_head.shape, D), split, join)


def _fused_bias(N: int, K: int, H: int) -> Layout:
    def split(x: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(part.reshape(-1, H) for part in _parts(x.reshape(K, N // K + 2, H)))

    return Layout(((N + 2 * K) * H,), split, lambda *parts: _rows(parts, K).reshape(-1))


def _parts(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """(q, k, v) of [K, N / K + 2, H, ...]."""
    return x[:, :-2], x[:, -2:-1], x[:, -1:]


def _rows(parts: list[np.ndarray] | tuple[np.ndarray, ...], K: int) -> np.ndarray:
    """[K, N / K + 2, H, ...] from q [N, H, ...], k and v [K, H, ...]."""
    grouped = [part.reshape(K, -1, *part.shape[1:]) for part in parts]
    return np.concatenate(grouped, axis=1)


def falcon(layers: int, D: int, N: int, K: int, **fields) -> ModelConfig:
    """A published size; heads are of 64."""
    sizes = dict(num_layers=layers, embed_dim=D, num_heads=N, num_kv_heads=K, head_dim=64)
    usual = dict(vocab_size=65_024, context=2048, mlp_dim=4 * D, norm_eps=1e-5, norm="layer")
    style = dict(mlp="plain", activation="gelu")
    return ModelConfig(**{**sizes, **usual, **style, "block": "parallel_norms", **fields})


PRESETS = {
    "falcon-7b": falcon(32, 4544, 71, 1, block="parallel"),
    "falcon-40b": falcon(60, 8192, 128, 8),
    "falcon-180b": falcon(80, 14_848, 232, 8),
    "falcon-rw-1b": falcon(
        24,
        2048,
        32,
        32,
        block="sequential",
        vocab_size=50_304,
        bias=("qkv", "out", "mlp"),
        pattern=(full(rope=None, alibi=64**-0.5),),
    ),
}
