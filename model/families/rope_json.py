"""`Rope` from and to what config.json says of it, in the spelling of every version."""

import math
from collections.abc import Mapping
from typing import Any

from core.config import UserError
from model.families.attributes import (
    COUNT,
    FLAG,
    POSITIVE,
    TABLE,
    TEXT,
    VALUES,
    Attributes,
    items,
    named,
    number,
    shown,
)
from model.ops.rope import Rope

# Older files have rope_scaling, with the other three beside it. Newer files have all of it in
# rope_parameters.
DEFAULTS = {
    "rope_scaling": None,
    "rope_parameters": None,
    "rope_theta": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
}
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
IDLE = {  # of each rope_type: no version of transformers reads them there
    "default": ("original_max_position_embeddings",),
    "linear": ("original_max_position_embeddings",),
    "yarn": ("finetuned",),
}
FIELD_VALUES = {
    "rope_theta": VALUES["rope_theta"],
    "factor": number(low=1.0, high=1e6),
    "partial_rotary_factor": number(above=0.0, high=1.0),
    "original_max_position_embeddings": COUNT,
    "truncate": FLAG,
    **dict.fromkeys(("attention_factor", "low_freq_factor", "high_freq_factor"), POSITIVE),
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), number(low=0.0)),
    **dict.fromkeys(
        ("short_factor", "long_factor"), items(POSITIVE, "a list of numbers more than 0")
    ),
}
WITHIN = ("llama3", "yarn", "longrope")  # know the context that the frequencies were trained for


def read(a: Attributes, head_dim: int, theta: float = 10_000.0) -> Rope:
    """The one rotary embedding of a model, of `theta` where config.json says none."""
    new, old = a["rope_parameters"] or {}, a["rope_scaling"] or {}
    given = dict(old or new)
    if given.get("rope_theta") is None:
        given["rope_theta"] = a["rope_theta"] or theta
    # transformers takes rope_scaling where a file has both. It would lose another rope_theta.
    if old and new.get("rope_theta", given["rope_theta"]) != given["rope_theta"]:
        raise a.refused(
            "rope_parameters",
            f"has another rope_theta than rope_scaling beside it, whose is {given['rope_theta']}: "
            "put all of it into one of them",
        )
    return parse(a, given, head_dim)


def parse(a: Attributes, given: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary embedding of one dict of rope_parameters; UserError names what is not known."""
    implied = "factor" in given and given["factor"] is None  # null is how far the context went
    given, context = known(given), a["max_position_embeddings"]
    kind = given.pop("rope_type", given.get("type", "default"))
    given.pop("type", None)
    kind = "longrope" if kind == "su" else kind
    if not TEXT.holds(kind) or kind not in FIELDS:
        raise UserError(f"config.json: rope_type={shown(kind)} is none of {', '.join(FIELDS)}")
    of = f"rope_type={kind!r}"
    if kind in WITHIN and a["original_max_position_embeddings"]:  # beside the dict, it comes first
        given["original_max_position_embeddings"] = a["original_max_position_embeddings"]
    given = {"partial_rotary_factor": a["partial_rotary_factor"] or 1, **given}
    if given["partial_rotary_factor"] == 1:
        del given["partial_rotary_factor"]
    original = given.get("original_max_position_embeddings", context)
    if kind == "yarn" and implied and COUNT.holds(original):
        given["factor"] = context / original
    for field, value in list(given.items()):
        idle = field in IDLE.get(kind, ())
        idle |= kind == "default" and (field, value) == ("factor", 1)
        idle |= kind == "dynamic" and (field, value) == (
            "original_max_position_embeddings",
            context,
        )
        if idle:
            del given[field]
        elif field not in ("rope_theta", *FIELDS[kind]):
            raise UserError(
                f"config.json: {named(field)}={shown(value)} is not supported with {of}"
            )
        elif not FIELD_VALUES[field].holds(value):
            raise UserError(
                f"config.json: {field}={shown(value)} with {of} must be {FIELD_VALUES[field].text}"
            )
    if "rope_theta" not in given:
        raise UserError(f"config.json: rope_parameters={shown(given)} has no rope_theta")
    for field in NEEDED.get(kind, ()):
        if field not in given:
            raise UserError(f"config.json: {of} has no {field}")
    return _rope(kind, given, context, original, head_dim)


def known(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in given.items() if value is not None}


def each(a: Attributes) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(of sliding layers, of full ones, what is beside the two) in rope_parameters, {} for none."""
    rest = known(a["rope_parameters"] or {})
    near, far = (rest.pop(f"{kind}_attention", {}) for kind in ("sliding", "full"))
    if not TABLE.holds(near) or not TABLE.holds(far):
        raise a.refused(
            "rope_parameters",
            f"of model_type={a.model_type!r} must hold an object for sliding_attention, and one "
            "for full_attention",
        )
    return known(near), known(far), rest


def _rope(kind: str, given: Mapping[str, Any], context: int, original: int, head_dim: int) -> Rope:
    """The rotary embedding of fields that are all of their type and range."""
    base = float(given["rope_theta"])
    if kind == "default":
        return Rope(base)
    if kind == "longrope":
        divisors = {x: tuple(map(float, given[f"{x}_factor"])) for x in ("short", "long")}
        for x, values in divisors.items():
            if len(values) != head_dim // 2:
                raise UserError(
                    f"config.json: {x}_factor has {len(values)} numbers, but the heads of "
                    f"{head_dim} have {head_dim // 2} pairs"
                )
        # No context is longer: then transformers' attention_factor is 1, as it is of factor 1.
        factor = float(given.get("factor", max(1.0, context / original)))
        how = dict(divisors, attention_factor=_attention_factor(given, factor))
        if factor > 1 and original == 1 and not how["attention_factor"]:
            raise UserError(
                "config.json: original_max_position_embeddings=1 with rope_type='longrope' has no "
                "logarithm to divide by: give attention_factor"
            )
        return Rope(base, "longrope", factor, original, **how)
    if kind == "proportional":  # the rest of the pairs does not turn (Gemma 4)
        factor = float(given.get("factor", 1.0))
        fraction = float(given.get("partial_rotary_factor", 1.0))
        return Rope(base, "none" if factor == 1 else "linear", factor, fraction=fraction)
    factor = float(given["factor"])
    if kind == "linear":
        return Rope(base, "linear", factor)
    if kind == "dynamic":
        if head_dim == 2:
            raise UserError(
                "config.json: rope_type='dynamic' with heads of 2: one pair cannot be stretched"
            )
        return Rope(base, "dynamic", factor, context)
    if kind == "llama3":
        turns = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        names, more = ("low_freq_factor", "high_freq_factor"), {}
    else:  # 0 stands for the number of the paper
        turns = float(given.get("beta_slow") or 1), float(given.get("beta_fast") or 32)
        names = "beta_slow", "beta_fast"
        more = {
            "truncate": given.get("truncate", True),
            "attention_factor": _attention_factor(given, factor),
        }
    if turns[0] >= turns[1]:
        slow, fast = (f"{name}={turn:g}" for name, turn in zip(names, turns, strict=True))
        raise UserError(f"config.json: {fast} with rope_type={kind!r} must be more than {slow}")
    return Rope(base, kind, factor, original, *turns, **more)


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
    """Returns fields that every version reads: rope_theta, rope_scaling, and another context."""
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
