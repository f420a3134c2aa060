"""Texts of the command line as values of fields, by the annotation of the field.

    value("1e3", int)                      1000.0, which `config.convert` makes 1000
    value("1024,2048", tuple[int, ...])    (1024, 2048)
    value("a, b", tuple[str, ...])         ("a, b",): a plain text is one
    value("('a', 'b')", tuple[str, ...])   ("a", "b"): a Python literal gives several

Nothing is refused here for its type or its range: `config.convert` does that and names the field.
"""

import ast
import contextlib
import glob
import math
import os
import types
import typing
import warnings
from typing import Any

WORDS = {"true": True, "false": False, "null": None, "none": None}
# What Python's parser raises for texts: brackets left open, brackets nested without end, ...
UNREADABLE = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)
HELP = (
    "A field of several values takes numbers or names with commas between them: 1024,2048. Texts\n"
    "may hold commas, so a plain text is one; write several as a Python literal: \"('a', 'b')\".\n"
    "Paths are split at commas unless the whole is there: a.txt,b.txt. Nothing after = is ()."
)


def value(text: str, hint: Any, commas: str = "") -> Any:
    """Returns what `text` means for a field annotated `hint`; the text itself if nothing else.

    `commas` says what separates the texts of a tuple: as in `config.setting`.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.strip().lower() in ("none", "null"):
            return None
        return value(text, next(a for a in args if a is not type(None)), commas)
    if _is_text(hint):
        return text
    if origin is tuple:
        return _several(text, args[0], commas)
    if hint in (int, float):
        # int("007") and float("nan") are numbers, though not as Python's own literals.
        with contextlib.suppress(ValueError):
            return hint(text)
    if text.strip().lower() in WORDS:
        return WORDS[text.strip().lower()]
    found = _literal(text)
    if hint is float and type(found) is int:  # 0xff; a ConfigDict would fail to make it a float
        with contextlib.suppress(OverflowError):
            return float(found)
        return math.inf
    return found


def _several(text: str, item: Any, commas: str) -> tuple:
    if not text:
        return ()
    found = _literal(text)
    if isinstance(found, tuple | list):
        return tuple(found)
    if typing.get_origin(item) is typing.Literal:
        commas = "names"
    if item in (int, float):
        return tuple(value(part, item) for part in text.split(",") if part.strip())
    if not _is_text(item):
        return (found,)
    if commas == "names" or (commas == "paths" and "," in text and not _is_there(text)):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return (text,)


def _is_text(hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(hint))
    return hint is str


def _is_there(pattern: str) -> bool:
    pattern = os.path.expanduser(pattern)
    return os.path.lexists(pattern) or bool(glob.glob(pattern, recursive=True))


def _literal(text: str) -> Any:
    """The Python literal that `text` is, else `text`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of "\d" within quotes
        try:
            return ast.literal_eval(text.strip())
        except UNREADABLE:
            return text
