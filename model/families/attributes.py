"""`config.json` of a checkpoint, read without guessing: every attribute is known, or refused."""

from collections.abc import Mapping
from typing import Any

from core.config import UserError

# What says nothing of the function that a model computes once it is trained.
IDLE = {
    "_attn_implementation",
    "_name_or_path",
    "_sliding_window_pattern",  # layer_types says it
    "architectures",
    "attention_dropout",
    "attn_pdrop",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "is_encoder_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "model_type",
    "n_ctx",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "resid_pdrop",
    "return_dict",
    "sep_token_id",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def spelled(choices: Mapping[Any, Any], value: Any) -> Any:
    """The first attribute value that `choices` takes for `value`; itself if none does."""
    return next((theirs for theirs, ours in choices.items() if ours == value), value)


class Attributes:
    """The attributes of a model, those left out at the published default of its class."""

    def __init__(self, found: Mapping[str, Any], defaults: Mapping[str, Any]):
        """`defaults` names all that the family reads; UserError for any other."""
        self.model_type = found["model_type"]
        for name, value in found.items():
            if name not in defaults and name not in IDLE:
                raise UserError(
                    f"config.json: {name}={value!r} is no attribute of model_type="
                    f"{self.model_type!r} that is understood here, so what it changes is not known"
                )
        self._values = {**defaults, **{k: v for k, v in found.items() if k in defaults}}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def must_be(self, **wanted: Any) -> None:
        """UserError unless each attribute has this value, or none."""
        for name, value in wanted.items():
            if self[name] not in (value, None):
                raise UserError(
                    f"config.json: {name}={self[name]!r} of model_type={self.model_type!r} is not "
                    f"supported; only {value!r} is"
                )

    def choice(self, name: str, choices: Mapping[Any, Any]) -> Any:
        """What `choices` has for the attribute; UserError names those there are."""
        value = self[name]
        if value not in choices:
            there = ", ".join(map(repr, choices))
            raise UserError(f"config.json: {name}={value!r} is not supported; these are: {there}")
        return choices[value]
