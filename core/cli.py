"""The command line of every entry point: `--config=FILE[:ARG]` and overrides of its fields.

    if __name__ == "__main__":
        cli.run(main, __doc__, data=DataConfig)

`main` receives the frozen Experiment. A UserError prints its message alone and exits with 2.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ml_collections

from core import backend
from core.config import Experiment, Section, UserError, build, freeze, unknown_field

S = TypeVar("S", bound=Section)

USAGE = "--config=FILE[:ARG] [--config.section.field=value ...]"


def start_backend(experiment: Experiment) -> None:
    """The devices that the experiment asks for, with those of the other processes."""
    backend.prepare(experiment.mesh.simulate if experiment.mesh else 0)
    backend.join()


def run(
    main: Callable[[Experiment], Any],
    doc: str,
    *,
    start: Callable[[Experiment], None] = start_backend,
    **classes: type[Section],
) -> None:
    """Parses sys.argv, calls `main(experiment)`, and turns user errors into exit status 2.

    `classes` are the sections that the command needs; `doc` is what `--help` prints first;
    `start` readies the devices.
    """
    if any(arg in ("-h", "--help") for arg in sys.argv[1:]):
        print(help_text(doc, classes))
        return
    with exits():
        experiment = parse(sys.argv[1:], classes)
        start(experiment)
        main(experiment)


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """What every command does around its work: logs to stderr, exits with 2 on a UserError."""
    log = logging.getLogger("cakrawala")
    handler = logging.StreamHandler(sys.stderr)
    log.setLevel(logging.INFO)
    log.propagate = False  # our own lines as they are; other libraries keep theirs
    log.addHandler(handler)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our stdout left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    finally:
        log.removeHandler(handler)


def parse(argv: Sequence[str], classes: dict[str, type[Section]]) -> Experiment:
    """The experiment that the arguments describe, checked; the needed sections are there."""
    files = [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
    if len(files) != 1 or not files[0]:
        raise UserError(f"exactly one --config is needed; usage: {USAGE}")
    config = load(files[0])
    for arg in argv:
        if not arg.startswith("--config="):
            override(config, arg)
    experiment = freeze(config)
    for name, cls in classes.items():
        if not isinstance(getattr(experiment, name), cls):
            raise UserError(
                f"{files[0]} has no section {name!r}: this command needs {cls.__name__}"
            )
    return experiment


def load(spec: str) -> ml_collections.ConfigDict:
    """The ConfigDict of `FILE.py[:ARG]`, from its `get_config(ARG)`."""
    path, _, arg = spec.partition(":")
    if not Path(path).is_file():
        raise UserError(f"--config={path}: there is no such file")
    module_spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if "get_config" not in vars(module):
        raise UserError(f"--config={path} defines no function get_config(arg)")
    return module.get_config(arg)


def override(config: ml_collections.ConfigDict, arg: str) -> None:
    """Applies one `--config.section.field=value`."""
    name, equals, text = arg.partition("=")
    if not name.startswith("--config.") or not equals:
        raise UserError(f"{arg} is not understood; usage: {USAGE}")
    *parents, field = path = name.removeprefix("--config.").split(".")
    node = config
    for depth, part in enumerate(path):
        if not isinstance(node, ml_collections.ConfigDict):
            raise UserError(f"{'.'.join(path[:depth])} has no fields of its own")
        if part not in node:
            raise UserError(unknown_field(".".join(path[: depth + 1]), part, _names(node)))
        node = node[part]
    if isinstance(node, ml_collections.ConfigDict):
        raise UserError(f"{'.'.join(path)} is a section: set one of {', '.join(_names(node))}")
    parent = config
    for part in parents:
        parent = parent[part]
    parent[field] = literal(text, node)


def _names(node: ml_collections.ConfigDict) -> list[str]:
    return [name for name in node if not name.startswith("_")]


def literal(text: str, current: Any) -> Any:
    """The value of an override: a Python literal, `true`/`false`/`null`, else the text itself.

    Text stays text where the field holds text, and `a,b` is a tuple where it holds a tuple.
    """
    if isinstance(current, str):
        return text
    named = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = tuple(text.split(",")) if isinstance(current, tuple) else text
    if isinstance(current, tuple) and not isinstance(value, tuple | list):
        return (value,)
    return value


def flags(argv: Sequence[str], cls: type[S]) -> S:
    """The section `cls` from arguments `--field=value`; a bare `--field` is True."""
    fields, values = {f.name: f for f in dataclasses.fields(cls)}, {}
    for arg in argv:
        name, equals, text = arg.partition("=")
        if not name.startswith("--"):
            raise UserError(f"{arg} is not understood: it should be --name=value")
        name = name[2:]
        if name not in fields:
            raise UserError(unknown_field(f"--{name}", name, fields))
        values[name] = literal(text, fields[name].default) if equals else True
    return build(cls, values)


def help_text(doc: str, classes: dict[str, type[Section]]) -> str:
    """What `--help` prints: the doc, then each field with its default and meaning."""
    lines = [doc.strip(), "", f"usage: {USAGE}"]
    for section, cls in classes.items():
        lines += ["", f"{section}:", *fields_text(f"config.{section}.", cls)]
    return "\n".join(lines)


def fields_text(prefix: str, cls: type[Section]) -> list[str]:
    """A line for each field: its flag, its default and its meaning."""
    lines = []
    for field in dataclasses.fields(cls):
        default = "(needed)" if field.default is dataclasses.MISSING else repr(field.default)
        head = f"  --{prefix}{field.name}={default}"
        lines.append(f"{head:<50} {field.metadata.get('doc', '')}".rstrip())
    return lines
