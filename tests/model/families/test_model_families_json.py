"""config.json as people have them: old spellings, what changes nothing, what matters, nonsense.

The authority for what a spelling means is the class of the model_type in transformers 5.24.
"""

import family_cases as cases
import pytest

from core.config import UserError
from model import families

NAN, INF = float("nan"), float("inf")
SIZES = dict(vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
LLAMA = dict(SIZES, model_type="llama", intermediate_size=96, max_position_embeddings=128)
LLAMA["num_key_value_heads"] = 4
MISTRAL, QWEN2 = dict(LLAMA, model_type="mistral"), dict(LLAMA, model_type="qwen2")
GEMMA = dict(LLAMA, model_type="gemma", head_dim=16, num_key_value_heads=1)
GEMMA2, GEMMA3 = dict(GEMMA, model_type="gemma2"), dict(GEMMA, model_type="gemma3_text")
GEMMA4 = dict(GEMMA, model_type="gemma4_text", hidden_size_per_layer_input=0)
GPT2 = dict(model_type="gpt2", vocab_size=256, n_embd=64, n_layer=4, n_head=4, n_positions=128)
FALCON = dict(SIZES, model_type="falcon")
TANH, FULL, NEAR = "gelu_pytorch_tanh", "full_attention", "sliding_attention"
YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=32)
LONGROPE = dict(type="longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8, factor=4.0)
FLAT = dict(rope_type="default", rope_theta=1e6)
OLD_FALCON = dict(vocab_size=256, hidden_size=64, n_layer=4, n_head=4)
WIDE = {"0": {"head_dim": 16}, "3": {"head_dim": 16}}
EDGES = [FULL, NEAR, NEAR, FULL]

SAME = [  # two spellings of one model: as it came, and as today's transformers writes it
    (dict(GEMMA, hidden_act="gelu"), dict(GEMMA, hidden_act=TANH)),
    (dict(GEMMA, hidden_act="gelu", hidden_activation=None), dict(GEMMA, hidden_act=TANH)),
    (dict(GEMMA, hidden_act=TANH, hidden_activation=TANH), dict(GEMMA, hidden_act=TANH)),
    (dict(GEMMA, hidden_activation="gelu"), dict(GEMMA, hidden_act=TANH)),
    (dict(GEMMA2, hidden_act="gelu"), dict(GEMMA2, hidden_activation=TANH)),
    (dict(LLAMA, hidden_act="swish"), dict(LLAMA, hidden_act="silu")),
    (dict(LLAMA, hidden_act="gelu_new"), dict(LLAMA, hidden_act=TANH)),
    (dict(GPT2, activation_function="gelu_fast"), dict(GPT2, activation_function="gelu_new")),
    # Sizes under other names.
    (dict(model_type="gpt2", max_position_embeddings=128, **SIZES), GPT2),
    (dict(n_embed=64, **{k: v for k, v in FALCON.items() if k != "hidden_size"}), FALCON),
    (dict(OLD_FALCON, model_type="RefinedWebModel", multi_query=True, parallel_attn=True), FALCON),
    (
        dict(OLD_FALCON, model_type="RefinedWebModel", alibi=True, bias=True),
        dict(FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    ),
    (
        dict(OLD_FALCON, model_type="RefinedWeb", n_head_kv=2, parallel_attn=True),
        dict(FALCON, new_decoder_architecture=True, num_kv_heads=2),
    ),
    (dict(FALCON, ff_factor=4), FALCON),
    (dict(FALCON, multi_query=None), dict(FALCON, multi_query=False)),
    # RoPE: rope_scaling comes first, rope_type before type, a context beside the dict before both.
    (dict(LLAMA, rope_scaling={}, rope_parameters=FLAT), dict(LLAMA, rope_theta=1e6)),
    (
        dict(LLAMA, rope_scaling=dict(YARN, rope_theta=1e6), rope_parameters=FLAT),
        dict(LLAMA, rope_parameters=dict(YARN, rope_theta=1e6)),
    ),
    (
        dict(LLAMA, rope_scaling=dict(type="yarn", rope_type="linear", factor=2.0)),
        dict(LLAMA, rope_parameters=dict(rope_type="linear", rope_theta=10_000.0, factor=2.0)),
    ),
    (
        dict(LLAMA, rope_scaling=LONGROPE, original_max_position_embeddings=32),
        dict(LLAMA, rope_scaling=dict(LONGROPE, original_max_position_embeddings=32)),
    ),
    (dict(LLAMA, rope_scaling=dict(YARN, factor=None)), dict(LLAMA, rope_scaling=YARN)),
    (
        dict(LLAMA, rope_scaling=dict(YARN, beta_fast=0, beta_slow=None, finetuned=True)),
        dict(LLAMA, rope_scaling=dict(YARN, beta_fast=32.0, beta_slow=1.0)),
    ),
    (
        dict(LLAMA, rope_scaling=dict(LONGROPE, factor=None, original_max_position_embeddings=256)),
        dict(LLAMA, rope_scaling=dict(LONGROPE, factor=1, original_max_position_embeddings=256)),
    ),
    (
        dict(GEMMA3, rope_theta=5e5, rope_scaling=dict(rope_type="linear", factor=8.0)),
        dict(
            GEMMA3,
            rope_parameters={
                NEAR: dict(rope_type="default", rope_theta=10_000.0),
                FULL: dict(rope_type="linear", factor=8.0, rope_theta=5e5),
            },
        ),
    ),
    (dict(GEMMA3, rope_local_base_freq=None, rope_parameters={FULL: None}), GEMMA3),
    # Windows: none without use_sliding_window, whatever sliding_window says.
    (dict(QWEN2, sliding_window=32, max_window_layers=1), QWEN2),
    (dict(QWEN2, use_sliding_window=True, sliding_window=None, max_window_layers=0), QWEN2),
    (dict(QWEN2, layer_types=["attention"] * 4), QWEN2),
    (dict(GEMMA3, sliding_window_pattern=3), dict(GEMMA3, layer_types=[NEAR, NEAR, FULL, NEAR])),
    (
        dict(GEMMA4, global_head_dim=16),
        dict(GEMMA4, per_layer_config={}),
    ),
    (dict(GEMMA4, global_head_dim=32), dict(GEMMA4, per_layer_config={"3": {"head_dim": 32}})),
    (dict(GEMMA4, per_layer_config=None), dict(GEMMA4, global_head_dim=16)),
    (dict(GEMMA4, use_bidirectional_attention="vision"), GEMMA4),
    (
        dict(model_type="gemma3", text_config=GEMMA3, vision_config={}, boi_token_index=3)
        | dict(vision_soft_tokens_per_image=280, dtype="bfloat16", eos_token_id=[1, 106]),
        GEMMA3,
    ),
]

HARMLESS = {  # of each model_type
    "gpt2": dict(
        _num_labels=1,
        id2label={"0": "LABEL_0"},
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        summary_type="cls_index",
        classifier_dropout=0.1,
        add_cross_attention=False,
        is_decoder=True,
        output_past=True,
        n_special=0,
        n_ctx=1024,
        layer_types=[FULL] * 4,
    ),
    "llama": dict(
        is_llama_config=True,
        rope_interleaved=False,
        use_mrope=False,
        max_sequence_length=2048,
        tokenizer_class="LlamaTokenizer",
        unsloth_version="2024.9",
        unsloth_fixed=True,
        use_flash_attn=True,
        _attn_implementation_autoset=True,
        attn_implementation="sdpa",
        rope_ratio=1,
        num_nextn_predict_layers=0,
        residual_multiplier=1.0,
        partial_rotary_factor=1.0,
        layer_types=[FULL] * 4,
        sliding_window=None,
        quantization_config=None,
        pretraining_tp=2,
        pruned_heads={},
        mlp_bias=None,
        initializer_range=None,
        activation="swiglu",
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        max_length=4096,
        num_beams=1,
        bad_words_ids=[[1]],
        pad_token_id=-1,
        unk_token_id=0,
        mask_token_id=None,
        resid_pdrop=0.1,
        attention_probs_dropout_prob=0.1,
        use_something_of_others=False,
    ),
    "llama with the windows of others off": dict(
        use_sliding_window=False, sliding_window=4096, max_window_layers=28
    ),
    "mistral": dict(layer_types=[NEAR] * 4, attention_bias=False, rope_scaling=None),
    "qwen2": dict(attention_bias=False, head_dim=None, use_mrope=False),
    "falcon": dict(
        apply_residual_connection_post_layernorm=False, multi_query=True, num_kv_heads=4
    ),
    "gemma": dict(use_bidirectional_attention=None, cache_implementation="hybrid"),
    "gemma3_text": dict(_sliding_window_pattern=6, rope_parameters=FLAT),
}

MATTERS = [  # refused, and what the message names
    (dict(LLAMA, **{"a new\nline": 1}), r"'a new\nline'=1"),
    (dict(LLAMA, rope_scaling={"a\n": 1}), r"'a\n'=1"),
    (dict(LLAMA, rope_interleaved=True), "rope_interleaved=True"),
    (dict(LLAMA, attention_multiplier=1.0), "attention_multiplier=1.0"),
    (dict(LLAMA, logit_scale=0.0625), "logit_scale=0.0625"),
    (dict(LLAMA, residual_multiplier=0.22), "residual_multiplier=0.22"),
    (dict(LLAMA, clip_qkv=8.0), "clip_qkv=8.0"),
    (dict(LLAMA, use_qk_norm=True), "use_qk_norm=True"),
    (dict(LLAMA, is_causal=False), "is_causal=False"),
    (dict(LLAMA, use_rope=False), "use_rope=False"),
    (dict(LLAMA, is_encoder_decoder=True), "is_encoder_decoder=True"),
    (dict(LLAMA, pruned_heads={"0": [1]}), "pruned_heads={'0': [1]}"),
    (dict(LLAMA, partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (dict(LLAMA, layer_types=[FULL, NEAR] * 2), "layer_types=['full_attention', 'slid"),
    (dict(LLAMA, layer_types=[FULL] * 3), "has 3 layers, but num_hidden_layers=4"),
    (dict(LLAMA, sliding_window=32), "sliding_window=32"),
    (dict(LLAMA, quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
    (dict(LLAMA, activation="gelu"), "activation='gelu' and hidden_act='silu'"),
    (dict(LLAMA, hidden_size=66), "hidden_size=66 is not a multiple of num_attention_heads=4"),
    (dict(LLAMA, num_key_value_heads=3), "num_attention_heads=4 is not a multiple of num_key_val"),
    (dict(LLAMA, head_dim=17), "head_dim=17"),
    (dict(LLAMA, rope_scaling=YARN, rope_parameters=FLAT), "another rope_theta than rope_scaling"),
    (
        dict(LLAMA, rope_scaling=dict(LONGROPE, long_factor=[1.0])),
        "long_factor has 1 numbers, but the heads of 16 have 8 pairs",
    ),
    (
        dict(LLAMA, rope_scaling=dict(YARN, beta_slow=40)),
        "beta_fast=32 with rope_type='yarn' must be more than beta_slow=40",
    ),
    (dict(LLAMA, rope_scaling=dict(type="default", factor=8.0)), "factor=8.0 is not supported"),
    (dict(MISTRAL, layer_types=[FULL] * 4), "layer_types=['full_att"),
    (dict(MISTRAL, attention_bias=True), "attention_bias=True"),
    (dict(QWEN2, layer_types=[NEAR] * 4), "use_sliding_window=False with layers of"),
    (dict(GPT2, hidden_size=32), "hidden_size=32 and n_embd=64"),
    (dict(GPT2, scale_attn_weights=None), "scale_attn_weights=None"),
    (dict(GPT2, n_inner=0), "n_inner=0"),
    (dict(FALCON, n_embed=32), "n_embed=32 and hidden_size=64"),
    (dict(FALCON, ff_factor=3), "ff_factor=3 does not make 256"),
    (dict(FALCON, multi_query=False, num_kv_heads=2), "num_kv_heads=2 without"),
    (dict(GEMMA, hidden_act="gelu", hidden_activation="silu"), "hidden_activation='silu'"),
    (dict(GEMMA2, final_logit_softcapping=0), "final_logit_softcapping=0 must be"),
    (dict(GEMMA2, query_pre_attn_scalar=-256), "query_pre_attn_scalar=-256 must be"),
    (dict(GEMMA2, sliding_window=None), "sliding_window=None with layers of sliding_attention"),
    (dict(GEMMA2, sliding_window_size=8), "sliding_window_size=8 and sliding_window=4096"),
    (dict(GEMMA3, sliding_window_pattern=0), "sliding_window_pattern=0"),
    (dict(GEMMA3, head_dim=None), "head_dim=None"),
    (dict(GEMMA3, rope_parameters=dict(FLAT, factor=8.0, rope_type="linear")), "rope_parameters="),
    (dict(GEMMA4, rope_parameters=FLAT), "rope_parameters="),
    (dict(GEMMA4, rope_theta=5e5), "rope_theta=500000.0"),
    (dict(GEMMA4, layer_types=EDGES, per_layer_config={"0": {"skip": [1]}}), "per_layer_config="),
    (dict(GEMMA4, layer_types=EDGES, per_layer_config=dict(WIDE, x={})), "per_layer_config="),
    (dict(model_type="gemma3", text_config=None), "text_config=None"),
    (dict(model_type="gemma3", text_config=LLAMA), "text_config={'vocab_size"),
    (
        dict(model_type="gemma3", text_config=GEMMA3, quantization_config={"bits": 4}),
        "quantization_config={'bits': 4}",
    ),
    (
        dict(model_type="gemma3", text_config=GEMMA3, tie_word_embeddings=False),
        "tie_word_embeddings=False",
    ),
]


@pytest.mark.parametrize(("old", "new"), SAME)
def test_old_spellings_mean_what_the_class_of_today_makes_of_them(old, new):
    assert families.read(old) == families.read(new)


def test_gemma_of_the_exact_gelu_is_not_written_as_gelu():
    """Its class would read that as the approximation."""
    exact = families.read(dict(GEMMA, hidden_act="gelu_python"))
    assert exact.activation == "gelu"
    assert families.write(exact)["hidden_act"] == "gelu_python"
    assert families.read(families.write(exact)) == exact


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_nothing_is_read(name):
    models = (LLAMA, MISTRAL, QWEN2, GPT2, FALCON, GEMMA, GEMMA3)
    base = {each["model_type"]: each for each in models}[name.split()[0]]
    assert families.read({**base, **HARMLESS[name]}) == families.read(base)


@pytest.mark.parametrize(("found", "named"), MATTERS)
def test_what_matters_is_refused_as_the_file_spells_it(found, named):
    with pytest.raises(UserError) as caught:
        families.read(found)
    assert str(caught.value).startswith("config.json")
    assert named in str(caught.value)


BAD = [None, 0, -1, 3, 0.5, -0.5, NAN, INF, 1e300, 10**400, 10**5000, True, "", "8", [], [1], {}]
BAD += [["full_attention"], {"a": 1}, {"rope_type": ["x"]}, {"1": {"head_dim": 3}}]
FUZZED = "gpt2", "llama-longrope", "mistral", "qwen-2-window", "falcon-rw", "gemma-3", "gemma-4"


@pytest.mark.parametrize("name", FUZZED)
def test_nonsense_in_any_attribute_is_named(name):
    """It is read or refused by name, nothing else, and what is read can be said again."""
    good = cases.golden(name).config
    keys = {*good, *families.FAMILIES[good["model_type"]].DEFAULTS[good["model_type"]]}
    ropes = good.get("rope_parameters") or {}
    files = [(key, {**good, key: value}) for key in keys for value in BAD]
    for field in ropes:
        files += [(field, {**good, "rope_parameters": {**ropes, field: x}}) for x in BAD]
    for key, found in files:
        try:
            config = families.read(found)
        except UserError as error:
            assert str(error).startswith("config.json"), key
            named = key in str(error) or "rope_" in str(error) or "per_layer_config" in str(error)
            assert named, f"{key}: {error}"
        else:
            assert config.num_layers <= 10_000
            hash(config)


@pytest.mark.parametrize("value", [None, 3, "", [], [1], {"model_type": 3}, {"num_heads": {}}])
@pytest.mark.parametrize("key", ["model_type", "text_config"])
def test_nonsense_around_the_text_model(key, value):
    with pytest.raises(UserError, match="config.json"):
        families.read({"model_type": "gemma3", "text_config": GEMMA3, key: value})
