"""`Rope` from and to what config.json says of it, in the spelling of every version."""

import math
from collections.abc import Mapping
from typing import Any

from core.config import UserError
from model.families.attributes import Attributes
from model.rope import Rope

# rope_scaling of older files beside rope_theta; rope_parameters holds both in newer ones.
DEFAULTS = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None}
FIELDS = {  # of each rope_type, beside rope_theta
    "default": (),
    "linear": ("factor",),
    "proportional": ("factor", "partial_rotary_factor"),
    "dynamic": ("factor",),  # its original context is max_position_embeddings
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
}
NEEDED = {kind: ("factor",) for kind in ("linear", "dynamic", "yarn")}
NEEDED |= {"llama3": FIELDS["llama3"], "longrope": ("short_factor", "long_factor")}


def read(attributes: Attributes, context: int, theta: float = 10_000.0) -> Rope:
    """The one rotary embedding of a model; `context` is max_position_embeddings."""
    given = attributes["rope_parameters"] or attributes["rope_scaling"] or {}
    return parse({"rope_theta": attributes["rope_theta"] or theta, **given}, context)


def parse(given: Mapping[str, Any], context: int) -> Rope:
    """The rotary embedding of one dict of rope_parameters; UserError names what is not known."""
    given = {name: value for name, value in given.items() if value is not None}
    if "rope_theta" not in given:
        raise UserError(f"config.json: rope_parameters={given!r} has no rope_theta")
    base = float(given.pop("rope_theta"))
    kind = given.pop("rope_type", given.get("type", "default"))
    given.pop("type", None)
    kind = "longrope" if kind == "su" else kind
    if kind not in FIELDS:
        raise UserError(f"config.json: rope_type={kind!r} is none of {', '.join(FIELDS)}")
    if given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    for field, value in given.items():
        if field not in FIELDS[kind]:
            raise UserError(
                f"config.json: {field}={value!r} is not supported with rope_type={kind!r}"
            )
    for field in NEEDED.get(kind, ()):
        if field not in given:
            raise UserError(f"config.json: rope_type={kind!r} has no {field}")
    if kind == "default":
        return Rope(base)
    original = given.get("original_max_position_embeddings", context)
    if kind == "longrope":
        divisors = {x: tuple(map(float, given[f"{x}_factor"])) for x in ("short", "long")}
        factor = float(given.get("factor", context / original))
        how = dict(divisors, attention_factor=_attention_factor(given, factor))
        return Rope(base, "longrope", factor, original, **how)
    if kind == "proportional":  # the rest of the pairs does not turn (Gemma 4)
        factor, fraction = given.get("factor", 1.0), given.get("partial_rotary_factor", 1.0)
        return Rope(base, "none" if factor == 1 else "linear", factor, fraction=fraction)
    factor = float(given["factor"])
    if kind == "linear":
        return Rope(base, "linear", factor)
    if kind == "dynamic":
        return Rope(base, "dynamic", factor, context)
    if kind == "llama3":
        turns = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return Rope(base, "llama3", factor, original, *turns)
    turns = float(given.get("beta_slow", 1)), float(given.get("beta_fast", 32))
    how = dict(attention_factor=_attention_factor(given, factor))
    return Rope(base, "yarn", factor, original, *turns, given.get("truncate", True), **how)


def _attention_factor(given: Mapping[str, Any], factor: float) -> float:
    """The number given, or DeepSeek's ratio of two such as YaRN has; 0 for what the paper says."""

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    if "attention_factor" not in given and given.get("mscale") and given.get("mscale_all_dim"):
        return of(given["mscale"]) / of(given["mscale_all_dim"])
    return float(given.get("attention_factor", 0.0))


def context(rope: Rope, context: int) -> int:
    """Tokens that a model is meant for: a dynamic one's max_position_embeddings is less."""
    return int(rope.original * rope.factor) if rope.scaling == "dynamic" else context


def write(rope: Rope | None) -> dict[str, Any]:
    """What every version reads: rope_theta, rope_scaling, and the context if it is another."""
    if rope is None:
        return {}
    found = {"rope_theta": rope.base, "rope_scaling": scaling(rope)}
    if rope.scaling == "dynamic":
        found["max_position_embeddings"] = rope.original
    return found


def scaling(rope: Rope) -> dict[str, Any] | None:
    """The dict of rope_scaling; None where nothing is changed."""
    if rope.fraction < 1:
        more = {"factor": rope.factor} if rope.factor > 1 else {}
        return {"rope_type": "proportional", "partial_rotary_factor": rope.fraction, **more}
    if rope.scaling == "none":
        return None
    given: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.original and rope.scaling != "dynamic":
        given["original_max_position_embeddings"] = rope.original
    if rope.attention_factor:
        given["attention_factor"] = rope.attention_factor
    if rope.scaling == "yarn":
        given |= {"beta_slow": rope.slow, "beta_fast": rope.fast, "truncate": rope.truncate}
    if rope.scaling == "llama3":
        given |= {"low_freq_factor": rope.slow, "high_freq_factor": rope.fast}
    if rope.scaling == "longrope":
        given |= {"short_factor": list(rope.short), "long_factor": list(rope.long)}
    return given
