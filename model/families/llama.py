"""LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783) and, of the same names, Mistral and Qwen.

Falcon 3, Yi, TinyLlama and others are LlamaForCausalLM too.
"""

from typing import Any

from model.attention.spec import full, sliding
from model.config import ModelConfig
from model.families import decoder, rope_json
from model.families.attributes import ACTIVATIONS, Attributes, spelled
from model.families.tensor import Tensor
from model.ops.rope import Rope

SIZES = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "activation": None,  # some say once more what the MLP is
    "layer_types": None,
    **rope_json.DEFAULTS,
}
MISTRAL = dict(intermediate_size=14_336, num_key_value_heads=8, max_position_embeddings=131_072)
QWEN = dict(vocab_size=151_936, intermediate_size=22_016, max_position_embeddings=32_768)
WINDOWS = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28)
DEFAULTS = {  # of each model_type, as transformers publishes them
    "llama": {**SIZES, "attention_bias": False, "mlp_bias": False},
    "mistral": {**SIZES, **MISTRAL, "sliding_window": 4096},
    "qwen2": {**SIZES, **QWEN, **WINDOWS, "num_key_value_heads": 32},
    "qwen3": {
        **SIZES,
        **QWEN,
        **WINDOWS,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
    },
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
GATED = {**ACTIVATIONS, "swiglu": "silu"}  # names of the activation, and of the MLP that has it
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def read(model_type: str, found: dict[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    a = Attributes(found, DEFAULTS[model_type])
    fields = decoder.read_sizes(a)
    rope = rope_json.read(a, fields["head_dim"])
    fields["context"] = rope_json.context(rope, fields["context"])
    activation = a.choice("hidden_act", ACTIVATIONS)
    if a["activation"] is not None and a.choice("activation", GATED) != activation:
        raise a.refused("activation", f"and hidden_act={a['hidden_act']!r} are not the same")
    types = _layer_types(model_type, a)
    specs = {"full_attention": full(rope=rope), **decoder.windowed(a, types, rope=rope)}
    biased = ("qkv",) if model_type == "qwen2" else ()
    if model_type in ("llama", "qwen3") and a["attention_bias"]:
        biased = ("qkv", "out")
    if model_type == "llama" and a["mlp_bias"]:
        biased = (*biased, "mlp")
    return ModelConfig(
        **fields,
        pattern=decoder.read_pattern(types, specs),
        activation=activation,
        bias=biased,
        qk_norm=model_type == "qwen3",
    )


def _layer_types(model_type: str, a: Attributes) -> list[str]:
    """The type of each layer, as the class of `model_type` in transformers has it."""
    count = a["num_hidden_layers"]
    if model_type.startswith("qwen"):
        windows = a["use_sliding_window"] and a["sliding_window"] is not None
        first = a["max_window_layers"] if windows else count
        usual = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
        types = decoder.read_layer_types(a, usual)
        if "sliding_attention" in types and not windows:  # the class would set the window to None
            name = "sliding_window" if a["use_sliding_window"] else "use_sliding_window"
            raise a.refused(name, "with layers of sliding_attention in layer_types: correct one")
        return types
    # These classes do not read layer_types, so it may only repeat what they do.
    windows = model_type == "mistral" and a["sliding_window"] is not None
    usual = ["sliding_attention" if windows else "full_attention"] * count
    if decoder.read_layer_types(a, usual) != usual:
        raise a.refused("layer_types", f"of model_type={model_type!r}: all are {usual[0]} there")
    return usual


def write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """A config.json; `families.write` sees to it that it says all of `config`."""
    found = decoder.write_sizes(config)
    found["hidden_act"] = spelled(ACTIVATIONS, config.activation)
    found |= rope_json.write(config.pattern[0].rope)
    window = decoder.window(config)
    if model_type == "mistral":
        found["sliding_window"] = window
    if model_type.startswith("qwen"):
        types = decoder.layer_types(config)
        found |= dict(
            use_sliding_window=window is not None, sliding_window=window, layer_types=types
        )
    if model_type in ("llama", "qwen3"):
        found["attention_bias"] = "out" in config.bias
    if model_type == "llama":
        found["mlp_bias"] = "mlp" in config.bias
    return found


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a checkpoint."""
    return decoder.tensors(config, NORMS)


def llama(layers: int, D: int, N: int, K: int, F: int, **fields) -> ModelConfig:
    """A published size; heads are of 128, as nearly all are."""
    pattern = (full(rope=fields.pop("rope", Rope())),)
    sizes = dict(num_layers=layers, embed_dim=D, num_heads=N, num_kv_heads=K, mlp_dim=F)
    usual = dict(vocab_size=128_256, head_dim=128, norm_eps=1e-5, tied_head=False)
    return ModelConfig(**{**sizes, **usual, "pattern": pattern, **fields})


def _llama3(factor: float) -> Rope:
    return Rope(500_000.0, "llama3", factor, original=8192, slow=1.0, fast=4.0)


LLAMA2 = dict(vocab_size=32_000, context=4096)
LLAMA3 = dict(rope=Rope(500_000.0), context=8192)
LLAMA31 = dict(rope=_llama3(8.0), context=131_072)
LLAMA32 = dict(rope=_llama3(32.0), context=131_072, tied_head=True)
QWEN25 = dict(rope=Rope(1e6), context=32_768, norm_eps=1e-6, bias=("qkv",))
QWEN3 = dict(rope=Rope(1e6), context=40_960, norm_eps=1e-6, qk_norm=True, vocab_size=151_936)
PRESETS = {
    "llama-2-7b": llama(32, 4096, 32, 32, 11_008, **LLAMA2),
    "llama-2-13b": llama(40, 5120, 40, 40, 13_824, **LLAMA2),
    "llama-2-70b": llama(80, 8192, 64, 8, 28_672, **LLAMA2),
    "llama-3-8b": llama(32, 4096, 32, 8, 14_336, **LLAMA3),
    "llama-3-70b": llama(80, 8192, 64, 8, 28_672, **LLAMA3),
    "llama-3.1-8b": llama(32, 4096, 32, 8, 14_336, **LLAMA31),
    "llama-3.1-70b": llama(80, 8192, 64, 8, 28_672, **LLAMA31),
    "llama-3.1-405b": llama(126, 16_384, 128, 8, 53_248, **LLAMA31),
    "llama-3.2-1b": llama(16, 2048, 32, 8, 8192, head_dim=64, **LLAMA32),
    "llama-3.2-3b": llama(28, 3072, 24, 8, 8192, **LLAMA32),
    "mistral-7b": llama(
        32, 4096, 32, 8, 14_336, vocab_size=32_000, context=32_768, pattern=(sliding(4096),)
    ),
    "qwen-2.5-0.5b": llama(
        24, 896, 14, 2, 4864, vocab_size=151_936, head_dim=64, **QWEN25, tied_head=True
    ),
    "qwen-2.5-7b": llama(28, 3584, 28, 4, 18_944, vocab_size=152_064, **QWEN25),
    "qwen-3-0.6b": llama(28, 1024, 16, 8, 3072, **QWEN3, tied_head=True),
    "qwen-3-8b": llama(36, 4096, 32, 8, 12_288, **QWEN3),
}
