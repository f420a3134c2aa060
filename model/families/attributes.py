"""`config.json` of a checkpoint, read without guessing: every attribute is known, or refused.

    a = Attributes({"model_type": "llama", "hidden_size": 64}, DEFAULTS["llama"])
    a["hidden_size"], a["num_hidden_layers"]    # 64, and the default of its class

Every value is checked here, before a family computes with it, so that a message names the
attribute as config.json spells it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from core.config import UserError
from model.families.harmless import harmless

# Several names are of one function, as in transformers; the first of each is the one we write.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu2": "relu2",
}


class Values(NamedTuple):
    """The values that an attribute may have, in words and as a test; null is asked elsewhere."""

    text: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int = 2**31 - 1) -> Values:
    """Whole numbers from low to high; no array is longer than the highest."""
    text = f"a whole number from {low} to {high}"
    return Values(text, lambda x: type(x) is int and low <= x <= high)


def number(above: float = 0.0, low: float | None = None, high: float = 1e30) -> Values:
    """Numbers more than `above`, or from `low` on if it is given; neither infinite nor NaN."""
    text = f"a number more than {above:g}" if low is None else f"a number of {low:g} or more"

    def holds(x: Any) -> bool:
        if type(x) not in (int, float) or not -high <= x <= high:  # NaN is in no range
            return False
        return x > above if low is None else x >= low

    return Values(f"{text}, up to {high:g}", holds)


def items(each: Values, of: str) -> Values:
    """Lists of such values, with one at least."""
    return Values(of, lambda x: type(x) is list and len(x) > 0 and all(map(each.holds, x)))


COUNT, INDEX, POSITIVE = whole(1), whole(0), number()
FLAG = Values("true or false", lambda x: type(x) is bool)
TEXT = Values("a text", lambda x: type(x) is str)
TABLE = Values("an object", lambda x: type(x) is dict)
NAMES = items(TEXT, "a list of texts")
LAYERS = whole(1, 10_000)

VALUES = {  # every attribute that a family reads
    **dict.fromkeys(
        [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "n_positions",
            "n_embd",
            "n_head",
            "n_inner",
            "num_kv_heads",
            "ffn_hidden_size",
            "ff_factor",
            "sliding_window",
            "sliding_window_size",
            "sliding_window_pattern",
            "_sliding_window_pattern",
            "global_head_dim",
            "num_global_key_value_heads",
            "original_max_position_embeddings",
            "n_embed",
        ],
        COUNT,
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), LAYERS),
    **dict.fromkeys(
        [
            "max_window_layers",
            "hidden_size_per_layer_input",
            "vocab_size_per_layer_input",
            "num_kv_shared_layers",
            "num_experts",
            "top_k_experts",
            "moe_intermediate_size",
        ],
        INDEX,
    ),
    **dict.fromkeys(
        [
            "rms_norm_eps",
            "layer_norm_epsilon",
            "initializer_range",
            "query_pre_attn_scalar",
            "final_logit_softcapping",
            "attn_logit_softcapping",
            "partial_rotary_factor",
        ],
        POSITIVE,
    ),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), number(above=1)),
    **dict.fromkeys(
        [
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "use_sliding_window",
            "scale_attn_weights",
            "scale_attn_by_inverse_layer_idx",
            "reorder_and_upcast_attn",
            "add_cross_attention",
            "alibi",
            "new_decoder_architecture",
            "multi_query",
            "parallel_attn",
            "bias",
            "attention_k_eq_v",
            "apply_residual_connection_post_layernorm",
            "use_double_wide_mlp",
            "enable_moe_block",
        ],
        FLAG,
    ),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation", "activation_function"), TEXT),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "per_layer_config"), TABLE),
    "layer_types": NAMES,
    "num_ln_in_parallel_attn": whole(1, 2),
    "use_bidirectional_attention": Values(
        "true, false or a text", lambda x: type(x) in (bool, str)
    ),
}
# Null says something here, though it is not what the class has when the attribute is left out.
NULL = {
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_size_per_layer_input",
    "num_key_value_heads",
    "num_kv_shared_layers",
    "sliding_window",
}
# Null is as if the attribute were left out: these numbers are for weights not trained yet.
NULL_IS_NOTHING = {"initializer_range"}


def spelled(choices: Mapping[Any, Any], value: Any) -> Any:
    """The first attribute value that `choices` takes for `value`; itself if none does."""
    return next((theirs for theirs, ours in choices.items() if ours == value), value)


def shown(value: Any) -> str:
    """A value for a message, cut off where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits, or more levels, than Python writes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 160 else f"{text[:157]}..."


def named(name: str) -> str:
    """The name of an attribute for a message, quoted where it is not like one."""
    return name if name.isidentifier() else shown(name)


class Attributes:
    """The attributes of a model, those left out at the published default of its class."""

    def __init__(self, found: Mapping[str, Any], defaults: Mapping[str, Any]):
        """`defaults` names all that the family reads; UserError for any other that may matter."""
        self.model_type = found["model_type"]
        found = {k: v for k, v in found.items() if v is not None or k not in NULL_IS_NOTHING}
        for name, value in found.items():
            if name in defaults:
                self._check(name, value, defaults[name])
            elif not harmless(name, value, found):
                raise UserError(
                    f"config.json: {named(name)}={shown(value)} is no attribute of model_type="
                    f"{self.model_type!r} that is understood here, so what it changes is not known"
                )
        self._given = {name: value for name, value in found.items() if name in defaults}
        self._values = {**defaults, **self._given}

    def _check(self, name: str, value: Any, default: Any) -> None:
        values = VALUES[name]
        # Python took a null flag for false. A head that is tied or not must be told.
        if value is None and name != "tie_word_embeddings":
            if default is None or name in NULL or values is FLAG:
                return
        elif values.holds(value):
            return
        raise UserError(
            f"config.json of model_type={self.model_type!r} is damaged: "
            f"{name}={shown(value)} must be {values.text}"
        )

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def given(self, name: str) -> bool:
        """Whether config.json has the attribute, null or not."""
        return name in self._given

    def refused(self, name: str, why: str) -> UserError:
        """The error that names an attribute, its value, and why it cannot be."""
        return UserError(f"config.json: {name}={shown(self[name])} {why}")

    def must_be(self, **wanted: Any) -> None:
        """UserError unless each attribute has this value; null is none, and a flag's false."""
        for name, value in wanted.items():
            found = self[name]
            if found is None and (value is not True):
                continue
            if found != value:
                raise self.refused(
                    name, f"of model_type={self.model_type!r} is not supported; only {value!r} is"
                )

    def choice(self, name: str, choices: Mapping[Any, Any]) -> Any:
        """Returns the choice for the attribute; UserError names the choices there are."""
        if self[name] not in choices:
            there = ", ".join(map(repr, choices))
            raise self.refused(name, f"is not supported; these are: {there}")
        return choices[self[name]]

    def same(self, name: str, other: str) -> None:
        """UserError if both are there, for one number, and differ."""
        if None not in (self[name], self[other]) and self[name] != self[other]:
            raise self.refused(
                name, f"and {other}={shown(self[other])} say one thing twice, and differ"
            )

    def head_dim(self, width: str, heads: str) -> int:
        """The width of a head that no attribute tells; UserError if the heads do not fit."""
        head_dim, rest = divmod(self[width], self[heads])
        if rest:
            raise self.refused(width, f"is not a multiple of {heads}={self[heads]}")
        return head_dim
