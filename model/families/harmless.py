"""Attributes of config.json that do not change the logits of a trained decoder.

    harmless("temperature", 0.6, found)        # True: a setting of generation
    harmless("rope_interleaved", False, found) # True: the models here do not interleave
    harmless("rope_interleaved", True, found)  # False: this file pairs other dims

An attribute is harmless whatever its value (IDLE, IDLE_KINDS), or at one value only (IDLE_AT), or
when it is null or turns off a part that these models do not have.
"""

import re
from collections.abc import Mapping
from typing import Any

IDLE = {
    # Where the file comes from, and which class opens it.
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "auto_map",
    "custom_pipelines",
    "finetuning_task",
    "is_llama_config",
    "language",
    "license",
    "model_name",
    "model_type",
    "name_or_path",
    "pipeline_tag",
    "tokenizer_class",
    # How a library stores, runs or returns it. The dtype of the tensors is told by the tensors.
    "attention_softmax_in_fp32",  # it always is
    "bf16",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "fp16",
    "fp32",
    "gradient_checkpointing",
    "is_decoder",
    "keys_to_ignore_at_inference",
    "output_attentions",
    "output_hidden_states",
    "output_past",
    "pretraining_tp",  # partial sums of the same product
    "return_dict",
    "softmax_in_fp32",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_last_hidden_states",
    "torch_dtype",
    "torchscript",
    "use_bfloat16",
    "use_cache",
    "use_return_dict",
    # Texts that it was trained on or is served with, which no table of positions limits.
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "model_max_length",
    "n_ctx",
    "seq_len",
    "seq_length",
    # Classifiers, which are other models on top.
    "_num_labels",
    "id2label",
    "label2id",
    "num_labels",
    "predict_special_tokens",
    "problem_type",
    # Generation.
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_logits",
    "output_scores",
    "penalty_alpha",
    "prefix",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "return_dict_in_generate",
    "stop_strings",
    "suppress_tokens",
    "target_lookbehind",
    "task_specific_params",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    # Training.
    "init_device",
    "init_std",
    "loss_type",
    "output_router_logits",
    "router_aux_loss_coef",
    "z_loss_coef",
}
IDLE_KINDS = re.compile(
    r"(\w+_token_(id|ids|index))"  # of marks, images and sound
    r"|(\w+_)?(p?drop|dropout)(_p|_prob|_rate)?"
    r"|summary_\w+"  # a head of GPT2DoubleHeadsModel
    r"|classifier_\w+"
    r"|_?(attn|experts)_implementation\w*"
    r"|_?(use_)?flash_att\w+"
    r"|use_(gradient_checkpointing|fused_\w+|sdpa\w*|xformers|liger\w*)"
    r"|transformers[._](js|version).*"
    r"|unsloth\w*"
)
# At this value the attribute leaves the model as it is without.
IDLE_AT = {
    "add_cross_attention": False,
    "alibi": False,
    "attention_bias": False,
    "attn_bias": False,
    "bias": False,  # a file whose tensors have one is refused by their names
    "causal": True,
    "embedding_multiplier": 1,
    "enable_moe_block": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "lm_head_bias": False,
    "logit_scale": 1,
    "logits_scaling": 1,
    "mlp_bias": False,
    "n_routed_experts": 0,
    "n_special": 0,
    "num_experts": 0,
    "num_local_experts": 0,
    "num_nextn_predict_layers": 0,
    "parallel_attn": False,
    "partial_rotary_factor": 1,
    "pruned_heads": {},
    "qkv_bias": False,
    "quantization": {},
    "quantization_config": {},
    "residual_multiplier": 1,
    "rope_interleave": False,
    "rope_interleaved": False,
    "rope_ratio": 1,
    "rotary_pct": 1,
    "scale_emb": 1,
    "use_alibi": False,
    "use_bias": False,
    "use_logn_attn": False,
    "use_mrope": False,
    "use_parallel_residual": False,
    "use_qk_norm": False,
    "use_qkv_bias": False,
    "use_scaled_rope": False,
    "use_sliding_window": False,
}
# Parts of these models themselves. A flag that is named after one and is off may take it away.
OWN_PARTS = re.compile(
    r"causal|rope|rotary|position|norm|glu|gate|mlp|ffn|act|scal|resid|skip|embed|bias|tie|head"
    r"|softmax|attn|attention|layer"
)
FULL = ("full_attention", "attention")  # names of the same layer type, then and now


def harmless(name: str, value: Any, found: Mapping[str, Any]) -> bool:
    """Returns whether an attribute that the class does not read changes no logits."""
    if value is None or name in IDLE or IDLE_KINDS.fullmatch(name):
        return True
    if name in IDLE_AT:
        return value == IDLE_AT[name]
    if name == "layer_types" and isinstance(value, list):
        return all(kind in FULL for kind in value)
    if name in ("sliding_window", "max_window_layers"):  # these have no effect without windows
        return found.get("use_sliding_window") is False
    return value is False and not OWN_PARTS.search(name)
