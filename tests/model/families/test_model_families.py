"""config.json to our config and back, what is refused, and the layouts of tensors."""

import dataclasses
import json

import family_cases as cases
import numpy as np
import pytest

from core import sharding, tree
from core.config import UserError
from model import families, transformer
from model.attention.spec import full, nsa, sliding
from model.config import ModelConfig
from model.ops.rope import Rope

# As their publishers count them.
PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen-2.5-0.5b": 494_032_768,
    "qwen-2.5-7b": 7_615_616_512,
    "qwen-3-0.6b": 596_049_920,
    "qwen-3-8b": 8_190_735_360,
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "falcon-180b": 178_557_088_768,
    "falcon-rw-1b": 1_311_625_216,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,  # of the text, as in the next two
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
}
# config.json of published checkpoints as their files say it, in the spelling of their time.
PUBLISHED = {
    "gpt2-124m": """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}},
        "vocab_size": 50257}""",
    "llama-2-7b": """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0",
        "use_cache": true, "vocab_size": 32000}""",
    "llama-3.1-8b": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 128256}""",
    "mistral-7b": """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}""",
    "qwen-2.5-7b": """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
        "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false,
        "vocab_size": 152064}""",
    "falcon-7b": """{"alibi": false, "apply_residual_connection_post_layernorm": false,
        "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"}, "bias": false,
        "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "hidden_size": 4544,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon",
        "multi_query": true, "new_decoder_architecture": false, "num_attention_heads": 71,
        "num_hidden_layers": 32, "parallel_attn": true, "torch_dtype": "bfloat16",
        "transformers_version": "4.27.4", "use_cache": true, "vocab_size": 65024}""",
    "falcon-40b": """{"alibi": false, "architectures": ["FalconForCausalLM"],
        "attention_dropout": 0.0, "bias": false, "hidden_size": 8192,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon",
        "multi_query": true, "new_decoder_architecture": true, "num_attention_heads": 128,
        "num_hidden_layers": 60, "num_kv_heads": 8, "parallel_attn": true,
        "vocab_size": 65024}""",
    "gemma-2-27b": """{"architectures": ["Gemma2ForCausalLM"], "attention_bias": false,
        "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608,
        "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2",
        "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256000}""",
    "gemma-3-4b": """{"architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999, "model_type": "gemma3", "mm_tokens_per_image": 256,
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
        "model_type": "gemma3_text", "num_hidden_layers": 34, "rope_scaling":
        {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152}}""",
}


def json_of(name):
    return json.loads(PUBLISHED[name])


@pytest.mark.parametrize("name", families.PRESETS)
def test_presets_have_as_many_parameters_as_published(name, one_device):
    model = transformer.abstract(families.PRESETS[name], sharding.whole())
    assert tree.num_elements(model) == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_say_the_presets(name):
    assert families.read(json_of(name)) == families.PRESETS[name]


@pytest.mark.parametrize("name", families.PRESETS)
def test_what_is_written_reads_back(name):
    config = families.PRESETS[name]
    assert families.read(json.loads(json.dumps(families.write(config)))) == config


@pytest.mark.parametrize("name", cases.NAMES)
def test_what_is_written_of_a_golden_reads_back(name):
    config = families.read(cases.golden(name).config)
    assert families.read(json.loads(json.dumps(families.write(config)))) == config


@pytest.mark.parametrize("name", cases.NAMES)
def test_tensors_are_those_of_the_file_and_come_back_bit_for_bit(name):
    config = families.read(cases.golden(name).config)
    found = {families.canonical(key, config): x for key, x in cases.weights(name).items()}
    tensors = families.tensors(config)
    assert {tensor.name for tensor in tensors} == set(found)
    for tensor in tensors:
        parts = tensor.layout.split(found[tensor.name])
        assert len(parts) == len(tensor.params)
        assert found[tensor.name].shape == tensor.layout.shape
        np.testing.assert_array_equal(tensor.layout.join(*parts), found[tensor.name])


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-3.2-1b", "falcon-40b", "gemma-3-1b"])
def test_tensors_hold_each_parameter_once(name, one_device):
    config = families.PRESETS[name]
    leaves = tree.named_leaves(transformer.abstract(config, sharding.whole()))
    held = {}
    for tensor in families.tensors(config):
        for param in tensor.params:
            held.setdefault(param, []).append(tensor.layer)
    assert held.keys() == leaves.keys()
    for param, layers in held.items():
        stacked = param.startswith("stages")
        assert layers == (list(range(leaves[param].shape[0])) if stacked else [None])


REFUSED = [  # a published file, what is changed in it, and what the message names
    (
        "llama-3.1-8b",
        dict(model_type="mamba"),
        ["model_type='mamba'", *families.FAMILIES, "gemma3"],
    ),
    ("llama-3.1-8b", dict(model_type=None), ["model_type=None"]),
    ("llama-3.1-8b", dict(quantization_config={"bits": 4}), ["quantization_config={'bits': 4}"]),
    ("llama-3.1-8b", dict(hidden_act="swish2"), ["hidden_act='swish2'", "'silu'"]),
    ("llama-3.1-8b", dict(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5"]),
    ("llama-3.1-8b", dict(hidden_size=None), ["model_type='llama' is damaged"]),
    ("llama-3.1-8b", dict(vocab_size="many"), ["vocab_size='many'"]),
    ("llama-3.1-8b", dict(num_attention_heads=30), ["num_heads=30", "num_kv_heads=8"]),
    (
        "llama-3.1-8b",
        dict(rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        ["rope_type='spiral'"],
    ),
    (
        "llama-3.1-8b",
        dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "speed": 3}),
        ["speed=3", "rope_type='linear'"],
    ),
    ("llama-3.1-8b", dict(rope_scaling={"type": "yarn"}), ["no factor"]),
    ("llama-3.1-8b", dict(rope_scaling={"type": "llama3", "factor": 8.0}), ["has no original_max"]),
    ("gpt2-124m", dict(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx"]),
    ("gemma-2-27b", dict(use_bidirectional_attention=True), ["use_bidirectional_attention"]),
    (
        "qwen-2.5-7b",
        dict(layer_types=["full_attention", "chunked_attention"] * 14),
        ["'chunked_attention'", "full_attention"],
    ),
]


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED, ids=str)
def test_unknown_families_and_attributes_are_refused_by_name(name, changes, named):
    with pytest.raises(UserError) as caught:
        families.read({**json_of(name), **changes})
    for text in named:
        assert text in str(caught.value)


def test_a_model_that_no_family_can_say_is_refused():
    llama = families.PRESETS["llama-3.2-1b"]
    for pattern in ((nsa(),), (sliding(64, sinks=4),), (full(rope=None), full())):
        with pytest.raises(UserError, match="no family of .*llama.* can say this model"):
            families.write(dataclasses.replace(llama, pattern=pattern))


def test_a_model_trained_here_is_written_as_the_family_it_is_of():
    sizes = dict(vocab_size=512, context=64, num_layers=2, embed_dim=32, mlp_dim=64)
    config = ModelConfig(**sizes, num_heads=4, num_kv_heads=2, head_dim=16)
    assert families.write(config)["model_type"] == "llama"
    windows = dataclasses.replace(config, pattern=(sliding(8),))
    assert families.write(windows)["model_type"] == "mistral"
    mixed = dataclasses.replace(config, qk_norm=True, pattern=(full(), sliding(8)))
    assert families.write(mixed)["model_type"] == "qwen3"


def test_ropes_of_old_files_and_new_ones_are_the_same():
    llama = {"model_type": "llama", "max_position_embeddings": 32_768}
    new = dict(rope_theta=1e6, rope_type="yarn", factor=4.0)
    old = dict(rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 4.0})
    one, other = families.read({**llama, "rope_parameters": new}), families.read({**llama, **old})
    assert one == other
    assert one.pattern[0].rope.original == 32_768
    dynamic = families.read({**llama, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert dynamic.context == 65_536
    assert dynamic.pattern[0].rope == Rope(10_000.0, "dynamic", 2.0, 32_768)


@pytest.mark.parametrize(
    ("preset", "found", "canonical"),
    [
        ("gpt2-124m", "h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        ("gpt2-124m", "h.0.attn.bias", None),
        ("gpt2-124m", "transformer.h.0.attn.masked_bias", None),
        ("gpt2-124m", "h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.bias"),
        ("llama-2-7b", "model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("llama-2-7b", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llama-2-7b", "lm_head.weight", "lm_head.weight"),
        ("gemma-3-4b", "language_model.model.norm.weight", "model.norm.weight"),
        ("gemma-3-4b", "model.language_model.norm.weight", "model.norm.weight"),
        ("gemma-3-4b", "vision_tower.vision_model.embeddings.patch_embedding.bias", None),
        ("gemma-3-4b", "multi_modal_projector.mm_soft_emb_norm.weight", None),
    ],
)
def test_names_of_files_are_those_of_the_whole_model(preset, found, canonical):
    assert families.canonical(found, families.PRESETS[preset]) == canonical
