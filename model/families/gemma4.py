"""Gemma 4's text model, as transformers publishes its configuration: the dense sizes.

Its full layers have wider heads, fewer of keys, values of the same projection as keys, and turn a
quarter of each head. Sizes with per-layer embeddings, shared caches or experts are refused.
"""

from typing import Any

from model.attention.spec import AttentionSpec, full
from model.config import ModelConfig
from model.families import decoder, gemma, rope_json
from model.families.attributes import ACTIVATIONS, COUNT, TABLE, Attributes, spelled
from model.families.tensor import Tensor

DEFAULTS = {
    "gemma4_text": {
        **gemma.SIZES,
        "vocab_size": 262_144,
        "num_hidden_layers": 30,
        "max_position_embeddings": 131_072,
        "sliding_window": 512,
        "layer_types": None,
        "final_logit_softcapping": None,
        "attention_k_eq_v": False,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "per_layer_config": None,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262_144,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,  # of layers that share a cache
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
    }
}
ARCHITECTURES = {"gemma4_text": "Gemma4ForCausalLM"}
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
}


def read(model_type: str, found: dict[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    a = Attributes(found, DEFAULTS[model_type])
    a.must_be(hidden_size_per_layer_input=0, num_kv_shared_layers=0, enable_moe_block=False)
    a.must_be(rope_theta=None, rope_scaling=None)  # its class reads rope_parameters alone
    if a["use_bidirectional_attention"] != "vision":  # text is causal beside images too
        a.must_be(use_bidirectional_attention=False)
    fields = decoder.read_sizes(a)
    usual = [
        "full_attention" if (i + 1) % 6 == 0 else "sliding_attention"
        for i in range(fields["num_layers"])
    ]
    types = [*decoder.read_layer_types(a, usual)[:-1], "full_attention"]
    shape = _wide(a, types)
    kv_heads, head_dim = shape["num_key_value_heads"], shape["head_dim"]
    near, far, flat = rope_json.each(a)
    if flat:
        raise a.refused(
            "rope_parameters", "must hold sliding_attention and full_attention, an object for each"
        )
    near, far = near or ROPES["sliding_attention"], far or ROPES["full_attention"]
    wide = dict(
        kv_heads=0 if kv_heads == fields["num_kv_heads"] else kv_heads,
        head_dim=0 if head_dim == fields["head_dim"] else head_dim,
        shared_kv=bool(a["attention_k_eq_v"]),
    )
    specs = {
        "full_attention": full(rope=rope_json.parse(a, far, head_dim), **wide),
        **decoder.windowed(a, types, rope=rope_json.parse(a, near, fields["head_dim"])),
    }
    return ModelConfig(
        **fields,
        pattern=decoder.read_pattern(types, specs),
        block="sandwich",
        activation=gemma.read_activation(a),
        bias=("qkv", "out") if a["attention_bias"] else (),
        qk_norm=True,
        value_norm=True,
        query_scale=1.0,
        layer_scale=True,
        embed_scale=fields["embed_dim"] ** 0.5,
        logit_softcap=a["final_logit_softcapping"] or 0.0,
    )


def _wide(a: Attributes, types: list[str]) -> dict[str, int]:
    """num_key_value_heads and head_dim of the full layers, from either spelling.

    UserError unless all full layers, and no others, are told to differ, in nothing else.
    """
    shape = {name: a[name] for name in ("num_key_value_heads", "head_dim")}
    shape["num_key_value_heads"] = shape["num_key_value_heads"] or a["num_attention_heads"]
    if a.given("per_layer_config"):  # null or {}: they are as the others
        layers = a["per_layer_config"] or {}
        full_layers = {str(i) for i, kind in enumerate(types) if kind == "full_attention"}
        shapes = list(layers.values()) or [{}]
        known = TABLE.holds(shapes[0]) and all(
            name in shape and COUNT.holds(value) for name, value in shapes[0].items()
        )
        alike = all(each == shapes[0] for each in shapes)
        if not known or not alike or (layers and set(layers) != full_layers):
            raise a.refused(
                "per_layer_config",
                "is not supported: full layers, and no others, may have another head_dim and "
                "num_key_value_heads, all alike",
            )
        shape |= shapes[0]
    else:
        shape["head_dim"] = a["global_head_dim"]
        if a["attention_k_eq_v"] and a["num_global_key_value_heads"]:
            shape["num_key_value_heads"] = a["num_global_key_value_heads"]
    decoder.check_kv_heads(a, shape["num_key_value_heads"], "num_key_value_heads of full layers")
    name = "per_layer_config" if a.given("per_layer_config") else "global_head_dim"
    decoder.check_head_dim(a, shape["head_dim"], name)
    return shape


def write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """A config.json; `families.write` sees to it that it says all of `config`."""
    of = {spec.kind: spec for spec in config.pattern}
    near, far = of.get("sliding", config.pattern[0]), of.get("full", config.pattern[-1])
    types = decoder.layer_types(config)
    K, H = config.kv_shape(far)
    wide = {"num_key_value_heads": K, "head_dim": H}
    return decoder.write_sizes(config) | dict(
        hidden_activation=spelled(ACTIVATIONS, config.activation),
        attention_bias=bool(config.bias),
        **({"sliding_window": near.window} if near.window else {}),
        layer_types=types,
        final_logit_softcapping=config.logit_softcap or None,
        attention_k_eq_v=far.shared_kv,
        per_layer_config={str(i): wide for i, x in enumerate(types) if x == "full_attention"},
        rope_parameters={"sliding_attention": _rope(near), "full_attention": _rope(far)},
        hidden_size_per_layer_input=0,
    )


def _rope(spec: AttentionSpec) -> dict[str, Any]:
    if spec.rope is None:
        return {}
    scaling = rope_json.scaling(spec.rope) or {"rope_type": "default"}
    return {"rope_theta": spec.rope.base, **scaling}


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint."""
    return decoder.tensors(config, gemma.SANDWICH_NORMS)
