"""Gemma 1, 2 and 3 (arXiv 2403.08295, 2408.00118, 2503.19786); of Gemma 3 the text model."""

from typing import Any

from model.attention.spec import AttentionSpec, full, sliding
from model.config import ModelConfig
from model.families import decoder, rope_json
from model.families.attributes import ACTIVATIONS, Attributes, spelled
from model.families.tensor import Tensor
from model.ops.rope import Rope

SIZES = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": None,  # but of Gemma 1, hidden_activation says it
    "attention_bias": False,
    "use_bidirectional_attention": None,
    **rope_json.DEFAULTS,
}
LAYERS = dict(
    sliding_window=4096,
    layer_types=None,
    query_pre_attn_scalar=256,
    final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0,
    sliding_window_size=None,  # sliding_window says it
)
GEMMA1 = dict(hidden_size=3072, intermediate_size=24_576, num_hidden_layers=28)
GEMMA3 = dict(vocab_size=262_208, max_position_embeddings=131_072)
DEFAULTS = {  # of each model_type, as transformers publishes them
    "gemma": {
        **SIZES,
        **GEMMA1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": None,
    },
    "gemma2": {**SIZES, **LAYERS},
    "gemma3_text": {
        **SIZES,
        **LAYERS,
        **GEMMA3,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "sliding_window_pattern": 6,
        "_sliding_window_pattern": None,  # layer_types says it
        "rope_local_base_freq": None,
    },
}
ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
SANDWICH_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


# The first files of Gemma 1 say "gelu" and mean the tanh approximation that it was trained with.
# So the exact GELU has another name there, and "gelu" is the last name for the approximation.
LEGACY = {name: ours for name, ours in ACTIVATIONS.items() if name != "gelu"}
LEGACY["gelu"] = "gelu_tanh"


def read(model_type: str, found: dict[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    a = Attributes(found, DEFAULTS[model_type])
    a.must_be(use_bidirectional_attention=False)
    fields = decoder.read_sizes(a)
    if model_type == "gemma":
        fields |= dict(pattern=(full(rope=rope_json.read(a, fields["head_dim"])),))
    else:
        fields |= dict(
            pattern=_pattern(model_type, a, fields["head_dim"]),
            block="sandwich",
            query_scale=a["query_pre_attn_scalar"] ** -0.5,
            logit_softcap=a["final_logit_softcapping"] or 0.0,
        )
    fields["context"] = rope_json.context(fields["pattern"][-1].rope, fields["context"])
    return ModelConfig(
        **fields,
        activation=read_activation(a),
        bias=("qkv", "out") if a["attention_bias"] else (),
        norm="rms_offset",
        qk_norm=model_type == "gemma3_text",
        embed_scale=fields["embed_dim"] ** 0.5,
    )


def read_activation(a: Attributes) -> str:
    """The activation: of hidden_act in Gemma 1, of hidden_activation in the others.

    UserError where the attribute that does not count says something else.
    """
    name, other, choices = "hidden_activation", "hidden_act", ACTIVATIONS
    if a.model_type == "gemma":
        name, other, choices = other, name, LEGACY
    activation = a.choice(name, choices)
    if a[other] is not None and a.choice(other, LEGACY) != activation:
        raise a.refused(other, f"and {name}={a[name]!r} are not the same: leave {other} out")
    return activation


def _pattern(model_type: str, a: Attributes, head_dim: int) -> tuple[AttentionSpec, ...]:
    every = a["sliding_window_pattern"] if model_type == "gemma3_text" else 2
    if model_type == "gemma3_text" and a["layer_types"] is None:
        a.same("_sliding_window_pattern", "sliding_window_pattern")
    a.same("sliding_window_size", "sliding_window")
    usual = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention"
        for i in range(a["num_hidden_layers"])
    ]
    types = decoder.read_layer_types(a, usual)
    if model_type == "gemma3_text":
        near, far = _ropes(a, head_dim)
    else:
        near = far = rope_json.read(a, head_dim)
    cap = a["attn_logit_softcapping"] or 0.0
    specs = {
        "full_attention": full(rope=far, softcap=cap),
        **decoder.windowed(a, types, rope=near, softcap=cap),
    }
    return decoder.read_pattern(types, specs)


def _ropes(a: Attributes, head_dim: int) -> tuple[Rope, Rope]:
    """(of sliding layers, of full ones): newer files have a dict for each."""
    near, far, flat = rope_json.each(a)
    # What older files say beside the dicts, or in place of them.
    far = {"rope_theta": a["rope_theta"] or 1e6, **far, **rope_json.known(a["rope_scaling"] or {})}
    near = {"rope_theta": a["rope_local_base_freq"] or 1e4, **near}
    near, far = (rope_json.parse(a, given, head_dim) for given in (near, far))
    # transformers reads no flat dict here. It may repeat what the full layers have.
    if flat and rope_json.parse(a, {"rope_theta": far.base, **flat}, head_dim) != far:
        raise a.refused(
            "rope_parameters", "must hold sliding_attention and full_attention, an object for each"
        )
    return near, far


def write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """A config.json; `families.write` sees to it that it says all of `config`."""
    activation = spelled(LEGACY if model_type == "gemma" else ACTIVATIONS, config.activation)
    found = decoder.write_sizes(config) | {"attention_bias": bool(config.bias)}
    found |= {"hidden_activation": activation}
    if model_type == "gemma":
        return found | rope_json.write(config.pattern[0].rope) | {"hidden_act": activation}
    of = {spec.kind: spec for spec in config.pattern}
    near, far = of.get("sliding", config.pattern[0]), of.get("full", config.pattern[0])
    found |= rope_json.write(far.rope)
    if near.window:
        found["sliding_window"] = near.window
    found |= dict(
        layer_types=decoder.layer_types(config),
        query_pre_attn_scalar=_whole((config.query_scale or config.head_dim**-0.5) ** -2),
        final_logit_softcapping=config.logit_softcap or None,
        attn_logit_softcapping=far.softcap or None,
    )
    if model_type == "gemma3_text" and near.rope is not None:
        found["rope_local_base_freq"] = near.rope.base
    return found


def _whole(x: float) -> int | float:
    """The whole number that x is, but for the rounding of a square root."""
    return round(x) if abs(x - round(x)) < 1e-6 * x else x


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint."""
    return decoder.tensors(config, SANDWICH_NORMS if config.block == "sandwich" else NORMS)


def gemma(layers: int, D: int, N: int, K: int, F: int, **fields) -> ModelConfig:
    """A published size; heads are of 256, as nearly all are."""
    sizes = dict(num_layers=layers, embed_dim=D, num_heads=N, num_kv_heads=K, mlp_dim=F)
    usual = dict(vocab_size=256_000, context=8192, head_dim=256, activation="gelu_tanh")
    return ModelConfig(**{**sizes, **usual, **fields}, norm="rms_offset", embed_scale=D**0.5)


def _gemma2(*sizes: int, query: int = 256, **fields) -> ModelConfig:
    pattern = sliding(4096, softcap=50.0), full(softcap=50.0)
    style = dict(block="sandwich", query_scale=query**-0.5, logit_softcap=30.0)
    return gemma(*sizes, pattern=pattern, **style, **fields)


def _gemma3(*sizes: int, window: int = 1024, query: int = 256, far: float = 8.0, **fields):
    rope = Rope(1e6, "linear", far) if far > 1 else Rope(1e6)
    usual = dict(vocab_size=262_208, context=131_072)
    style = dict(block="sandwich", query_scale=query**-0.5, qk_norm=True)
    pattern = (*[sliding(window)] * 5, full(rope=rope))
    return gemma(*sizes, **{**usual, **style, "pattern": pattern, **fields})


SMALL3 = dict(vocab_size=262_144, context=32_768, window=512, far=1.0)
PRESETS = {
    "gemma-2b": gemma(18, 2048, 8, 1, 16_384, pattern=(full(),)),
    "gemma-7b": gemma(28, 3072, 16, 16, 24_576, pattern=(full(),)),
    "gemma-2-2b": _gemma2(26, 2304, 8, 4, 9216),
    "gemma-2-9b": _gemma2(42, 3584, 16, 8, 14_336),
    "gemma-2-27b": _gemma2(46, 4608, 32, 16, 36_864, query=144, head_dim=128),
    "gemma-3-270m": _gemma3(18, 640, 4, 1, 2048, **SMALL3),
    "gemma-3-1b": _gemma3(26, 1152, 4, 1, 6912, **SMALL3),
    "gemma-3-4b": _gemma3(34, 2560, 8, 4, 10_240),
    "gemma-3-12b": _gemma3(48, 3840, 16, 8, 15_360),
    "gemma-3-27b": _gemma3(62, 5376, 32, 16, 21_504, query=168, head_dim=128),
}
