"""The schema of experiments: frozen dataclasses, checked when built, edited as a ConfigDict.

A config file returns `editable(Experiment(...))`; the command line edits that; `freeze` turns
it back into the same dataclasses and checks every name, type and range:

    config = editable(Experiment(name="debug", train=TrainConfig(steps=100)))
    config.train.steps = 200
    experiment = freeze(config)
"""

import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import ml_collections

T = TypeVar("T")
type_hints = functools.cache(typing.get_type_hints)  # takes longer than all checks of a section
_CLASS = "_class"  # key under which an editable section remembers its dataclass
SHOWN = 80  # characters of a value in messages
LARGEST = 2**63 - 1  # larger integers fit into no array and no file of ours


class UserError(ValueError):
    """A mistake of the user: entry points print the message alone and exit with 2."""


class Unsupported(UserError, NotImplementedError):
    """A combination of choices that cannot work; the message says what would."""


def setting(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    commas: typing.Literal["", "names", "paths"] = "",
) -> Any:
    """A field with its meaning and its range: `low` and `high` included, `above` not.

    `commas` says which texts of a tuple commas separate on the command line: names hold none, and
    paths are one where the whole is there. Without it a text is one, with all of its commas.
    """
    metadata = dict(doc=doc, low=low, high=high, above=above, commas=commas)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Section:
    """Base of every part of a config: checks types, ranges and pairs, then its own `check`.

    The tables have pairs of fields and why: of EXCLUSIVE one at most is set, of NEEDS the first is
    nothing without the second. core/command/precedence.py reads them too.
    """

    EXCLUSIVE: ClassVar[dict[tuple[str, str], str]] = {}
    NEEDS: ClassVar[dict[tuple[str, str], str]] = {}

    def __post_init__(self):
        hints = type_hints(type(self))
        for field in dataclasses.fields(self):
            value = convert(hints[field.name], getattr(self, field.name), field.name)
            _check_range(field, value)
            object.__setattr__(self, field.name, value)
        self._check_pairs()
        self.check()

    def _check_pairs(self) -> None:
        off = {field.name: field.default for field in dataclasses.fields(self)}

        def is_set(name: str) -> bool:
            return getattr(self, name) != off[name]

        def both(a: str, b: str) -> str:
            return f"{a}={shown(getattr(self, a))} with {b}={shown(getattr(self, b))}"

        for (a, b), why in self.EXCLUSIVE.items():
            if is_set(a) and is_set(b):
                choice = f"{a}={off[a]!r} or {b}={off[b]!r}"
                raise Unsupported(f"{both(a, b)}: {why}; take {choice}")
        for (a, b), why in self.NEEDS.items():
            if is_set(a) and not is_set(b):
                raise UserError(f"{both(a, b)}: {why}; set {b} too, or take {a}={off[a]!r}")

    def check(self) -> None:
        """Raises UserError when fields contradict each other; sections override it."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment. Every command takes the same one and reads the sections it needs."""

    name: str
    workdir: str = ""
    data: Any = None
    model: Any = None
    mesh: Any = None
    train: Any = None
    aot: Any = None
    decode: Any = None
    score: Any = None
    bench: Any = None
    recall: Any = None

    def __post_init__(self):
        if not self.workdir:
            object.__setattr__(self, "workdir", f"runs/{self.name}")


def sections(experiment: Experiment) -> dict[str, Section]:
    """The sections that this experiment fills, by name."""
    values = {f.name: getattr(experiment, f.name) for f in dataclasses.fields(experiment)}
    return {name: value for name, value in values.items() if isinstance(value, Section)}


def shown(value: Any) -> str:
    """Returns `value` as messages show it: as Python writes it, cut off where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of over 4,300 digits
        return f"a long {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` asks; UserError that names `where`, value and type.

    Accepts what JSON and the command line give: an int for a float, a whole float such as 1e3 for
    an int, a list for a tuple, a mapping for a Section.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return convert(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        if any(type(value) is type(arg) and value == arg for arg in args):
            return value
        raise UserError(f"{where}={shown(value)} is not one of {', '.join(map(repr, args))}")
    if origin is tuple and isinstance(value, list | tuple) and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise UserError(f"{where}={shown(value)} must have {len(args)} items: {hint}")
        pairs = enumerate(zip(args, value, strict=True))
        return tuple(convert(arg, item, f"{where}[{i}]") for i, (arg, item) in pairs)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(hint, type) and issubclass(hint, Section) and isinstance(value, Mapping):
        return build(hint, value, where)
    if hint in (int, float) and type(value) in (int, float):
        return _number(hint, value, where)
    expected = origin or hint
    if isinstance(value, expected) and not (isinstance(value, bool) and expected is not bool):
        return value
    name = str(hint) if origin else expected.__name__
    raise UserError(f"{where}={shown(value)} is {type(value).__name__}, but it must be {name}")


def _number(hint: type, value: int | float, where: str) -> int | float:
    """The same number as an int or a float; UserError if it is none, or beyond all we can hold."""
    if hint is int and type(value) is float and not value.is_integer():
        raise UserError(f"{where}={value!r} is float, but it must be int")
    if not (abs(value) <= LARGEST if hint is int else _finite(value)):
        reason = "beyond the integers of 64 bits" if hint is int else "not finite"
        raise UserError(f"{where}={shown(value)} is {reason}: give a usual number")
    return hint(value)


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def _check_range(field: dataclasses.Field, value: Any) -> None:
    low, high, above = (field.metadata.get(key) for key in ("low", "high", "above"))
    if value is None or (low is None and high is None and above is None):
        return
    for number in value if isinstance(value, tuple) else (value,):
        too_low = (low is not None and number < low) or (above is not None and number <= above)
        if not too_low and (high is None or number <= high):
            continue
        limits = [f">= {low}"] * (low is not None) + [f"> {above}"] * (above is not None)
        limits += [f"<= {high}"] * (high is not None)
        raise UserError(
            f"{field.name}={shown(value)} is out of range: it must be {' and '.join(limits)}"
        )


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from a mapping; errors carry the dotted path of the field."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in fields:
            raise UserError(unknown_field(f"{prefix}{name}", str(name), fields))
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is missing: {cls.__name__} needs a value for it")
    hints = type_hints(cls)
    values = {name: convert(hints[name], value, prefix + name) for name, value in values.items()}
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


def unknown_field(path: str, name: str, valid: typing.Iterable[str]) -> str:
    """The message for a misspelled field: names the nearest valid one, or lists them all."""
    near = difflib.get_close_matches(name, valid, n=1)
    if near:
        return f"{path} is not a field; did you mean {path[: -len(name)]}{near[0]}?"
    return f"{path} is not a field; the fields are {', '.join(sorted(valid))}"


def editable(experiment: Experiment) -> ml_collections.ConfigDict:
    """A ConfigDict to edit; each section keeps its dataclass for `freeze`."""
    config = ml_collections.ConfigDict(type_safe=False)
    for field in dataclasses.fields(experiment):
        value = getattr(experiment, field.name)
        config[field.name] = editable_section(value) if isinstance(value, Section) else value
    return config.lock()


def editable_section(section: Section) -> ml_collections.ConfigDict:
    """The part of `editable` that holds one section."""
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    values[_CLASS] = type(section)
    return ml_collections.ConfigDict(values, type_safe=False).lock()


def section_class(config: ml_collections.ConfigDict, name: str) -> type[Section]:
    """The dataclass of an editable section; UserError if it was not made from one."""
    cls = config[name].get(_CLASS)
    if not isinstance(cls, type) or not issubclass(cls, Section):
        raise UserError(
            f"section {name!r} is a plain dictionary: give {name}= of Experiment an object of its "
            "class, such as TrainConfig(...)"
        )
    return cls


def freeze(config: ml_collections.ConfigDict) -> Experiment:
    """The checked, immutable experiment that `config` describes."""
    values = dict(config.items())
    for name, value in values.items():
        if isinstance(value, ml_collections.ConfigDict):
            fields = {field: item for field, item in value.items() if field != _CLASS}
            values[name] = build(section_class(config, name), fields, name)
    return build(Experiment, values)


def to_dict(value: Any) -> Any:
    """Plain dicts, lists and numbers, ready for JSON; empty sections are left out."""
    if dataclasses.is_dataclass(value):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        keep_none = isinstance(value, Section)
        return {name: to_dict(v) for name, v in pairs if keep_none or v is not None}
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return value


def to_json(experiment: Experiment) -> str:
    """JSON that `from_json` reads back to an equal experiment."""
    return json.dumps(to_dict(experiment), indent=2) + "\n"


def from_json(text: str, **classes: type[Section]) -> Experiment:
    """An experiment with the sections named in `classes`; the others are left out.

    A reader names only what it needs: `from_json(text, model=ModelConfig)`.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"it holds {shown(values)}, and no object")
    kept = {name: v for name, v in values.items() if name in classes or not isinstance(v, dict)}
    for name, cls in classes.items():
        if name in kept:
            if not isinstance(kept[name], dict):
                raise UserError(f"{name}={shown(kept[name])} is no section: it must be an object")
            kept[name] = build(cls, kept[name], name)
    return build(Experiment, kept)
