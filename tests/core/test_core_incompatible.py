"""The tables of fields that do not go together, walked pair by pair."""

import dataclasses

import pytest

from core.config import UserError
from evals.config import BenchConfig
from infer.config import DecodeConfig, ScoreConfig
from train.config import TrainConfig

SECTIONS = DecodeConfig, ScoreConfig, BenchConfig, TrainConfig
SET = {  # a value that is not the default, where the default does not give one
    "allowed_tokens": (5,),
    "banned_tokens": (5,),
    "cache_host": True,
    "compare": ("a", "b"),
    "draft": "runs/small",
    "draft_step": 3,
    "k_cache": "int8",
    "logit_bias": ((5, 1.0),),
    "prompt": "a",
    "prompts": "b.txt",
    "start": "runs/a",
    "start_step": 3,
    "stop": ("x",),
    "stop_tokens": (5,),
    "top_p": 0.5,
    "topology": "v5p:2x2x1",
    "typical_p": 0.5,
    "v_cache": "int4",
    "weights": "int4",
    "weights_group": 32,
}


def other(section, name: str):
    """A valid value of the field that is not its default."""
    (field,) = (field for field in dataclasses.fields(section) if field.name == name)
    if name in SET:
        return SET[name]
    return not field.default if isinstance(field.default, bool) else field.default + 1


def cases(table: str):
    return [
        pytest.param(section, *pair, why, id="-".join((section.__name__, *pair)))
        for section in SECTIONS
        for pair, why in getattr(section, table).items()
    ]


@pytest.mark.parametrize(("section", "a", "b", "why"), cases("EXCLUSIVE"))
def test_of_two_fields_one_is_set(section, a, b, why):
    values = {name: other(section, name) for name in (a, b)}
    with pytest.raises(UserError) as error:
        section(**values)
    for part in (f"{a}={values[a]!r} with {b}={values[b]!r}", why, f"or {b}="):
        assert part in str(error.value)


@pytest.mark.parametrize(("section", "a", "b", "why"), cases("NEEDS"))
def test_a_field_needs_another(section, a, b, why):
    with pytest.raises(UserError) as error:
        section(**{a: other(section, a)})
    for part in (f"{a}={other(section, a)!r} with {b}=", why, f"set {b} too, or take {a}="):
        assert part in str(error.value)


def test_the_tables_name_fields():
    for section in SECTIONS:
        names = {field.name for field in dataclasses.fields(section)}
        pairs = {name for pair in (*section.EXCLUSIVE, *section.NEEDS) for name in pair}
        assert pairs <= names
