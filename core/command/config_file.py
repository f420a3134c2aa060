"""Config files: the ConfigDict that `FILE.py[:ARG]` describes, or one message why there is none.

config = load("configs/quickstart.py:tiny")
"""

import contextlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from core.config import (
    Experiment,
    Section,
    UserError,
    editable,
    editable_section,
    shown,
)

FORM = "def get_config(arg=''): return editable(Experiment(...))"


def load(spec: str) -> ml_collections.ConfigDict:
    """The ConfigDict of `FILE.py[:ARG]`, from its `get_config(ARG)`.

    UserError, for a file that cannot be read or run, that names its line at fault.
    """
    path, arg = split(spec)
    name = f"config_{Path(path).stem}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={path} is not a Python file")
    with mistakes(path, module_spec.origin):
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module  # dataclasses look up the module that they are written in
        module_spec.loader.exec_module(module)
    if "get_config" not in vars(module):
        raise UserError(f"--config={path} defines no function get_config(arg)")
    arguments = _arguments(module.get_config, path, arg)
    with mistakes(path, module_spec.origin):
        found = module.get_config(*arguments)
    if isinstance(found, Experiment):
        return editable(found)
    if not isinstance(found, ml_collections.ConfigDict):
        raise UserError(
            f"--config={path}: get_config returned {shown(found)}, but it must return "
            "editable(Experiment(...))"
        )
    # A file may assign a whole section after editable(): config.train = TrainConfig(steps=3).
    for field, section in dict(found.items()).items():
        if isinstance(section, Section):
            with found.ignore_type():
                found[field] = editable_section(section)
    return found


def split(spec: str) -> tuple[str, str]:
    """(file, argument) of `FILE[:ARG]`; a name that exists may hold colons, as the argument may."""
    ends = [i for i, letter in enumerate(spec) if letter == ":"]
    path = next((spec[:i] for i in [len(spec), *ends] if os.path.isfile(spec[:i])), None)
    if path is not None:
        return path, spec[len(path) + 1 :]
    path = spec.partition(":")[0]
    if os.path.isdir(path):
        raise UserError(f"--config={path} is a folder: name a Python file in it")
    try:
        os.stat(path)
    except FileNotFoundError:
        raise UserError(f"--config={path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--config={shown(path)} cannot be read: {error}") from None
    raise UserError(f"--config={path} is no file, but a device or a pipe: name a Python file")


@contextlib.contextmanager
def mistakes(path: str, origin: str | None) -> Iterator[None]:
    """Turns whatever the code of the file raises into a UserError that names file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)[1:]]
        files = [f.filename for f in traceback.extract_tb(error.__traceback__)[1:]]
        own = [line for line, file in zip(lines, files, strict=True) if file == origin]
        where = f"{path} line {own[-1]}" if own else path
        if isinstance(error, SyntaxError) and error.filename:
            written = path if error.filename == origin else error.filename
            where = f"{written} line {error.lineno}" if error.lineno else written
            what = f"{type(error).__name__}: {error.msg}"
        elif isinstance(error, SystemExit):
            what = f"it ends the program (SystemExit: {error.code})"
        elif isinstance(error, UserError):
            # Messages of our own that name the file are whole: "configs/family.py:huge is ..."
            raise UserError(str(error) if path in str(error) else f"{where}: {error}") from None
        raise UserError(f"{where}: {what}") from None


def _arguments(get_config: Any, path: str, arg: str) -> tuple[str, ...]:
    """Returns the arguments of get_config: `arg`, or none where it takes none."""
    if not callable(get_config):
        raise UserError(f"--config={path}: get_config={shown(get_config)} is no function: {FORM}")
    try:
        signature = inspect.signature(get_config)
    except (TypeError, ValueError):  # of a function that is not written in Python
        return (arg,)
    for arguments in ((arg,), ())[: 1 if arg else 2]:
        with contextlib.suppress(TypeError):
            signature.bind(*arguments)
            return arguments
    if arg:
        with contextlib.suppress(TypeError):
            signature.bind()
            raise UserError(f"--config={path} takes no argument: leave out :{arg}")
    raise UserError(
        f"--config={path}: get_config{signature} must take one argument, the text after the "
        f"colon: {FORM}"
    )
