"""The command line of every entry point: `--config=FILE[:ARG]` and overrides of its fields.

    if __name__ == "__main__":
        cli.run(main, __doc__, data=DataConfig)

`main` receives the frozen Experiment. A UserError prints its message alone and exits with 2.
"""

import contextlib
import dataclasses
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

import ml_collections
from ml_collections.config_dict import RequiredValueError

from core import backend
from core.command import config_file, interrupt, literals, precedence
from core.config import (
    Experiment,
    Section,
    UserError,
    build,
    editable_section,
    freeze,
    section_class,
    type_hints,
    unknown_field,
)

log = logging.getLogger("cakrawala")

S = TypeVar("S", bound=Section)

USAGE = "--config=FILE[:ARG] [--config.section.field=value ...]"


def start_backend(experiment: Experiment) -> None:
    """The devices that the experiment asks for, with those of the other processes."""
    simulate = experiment.mesh.simulate if experiment.mesh else 0
    asked = os.environ.get("JAX_PLATFORMS", "cpu")
    if simulate and asked not in ("", "cpu"):
        log.info(f"mesh.simulate={simulate}: CPU devices, not those of JAX_PLATFORMS={asked}")
    backend.prepare(simulate)
    backend.join(simulate)


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
    with exits():
        if any(arg in ("-h", "--help") for arg in sys.argv[1:]):
            print(help_text(doc, classes))
            return
        experiment = parse(sys.argv[1:], classes)
        start(experiment)
        main(experiment)


# What the system says of a path that the user named: the user's mistake, status 2. All else that
# it says (a full disk, a broken one) is status 1.
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, and no folder; name another",
    errno.EISDIR: "name a file, not a folder",
    errno.EEXIST: "name another",
    errno.EACCES: "change its permissions, or name another",
    errno.EPERM: "change its permissions, or name another",
    errno.EROFS: "name a path on a disk that can be written",
    errno.ENAMETOOLONG: "shorten the name",
    errno.ELOOP: "the links lead in a circle; name another",
    errno.ENXIO: "name a usual file",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """Does what every command does around its work: logs to stderr, and ends with one message.

    A UserError exits with 2, Ctrl-C with 130, and what the system refuses (a path, a full disk, a
    reader of stdout that left) with one line too. Anything else is a mistake of ours, and has its
    traceback.
    """
    _streams()
    handler = logging.StreamHandler(sys.stderr)
    log.setLevel(logging.INFO)
    log.propagate = False  # our own lines as they are; other libraries keep theirs
    log.addHandler(handler)
    with interrupt.raised() as asked:
        try:
            yield
            sys.stdout.flush()  # what cannot be written is known now, not when Python ends
        except (Exception, KeyboardInterrupt) as error:
            status, text = ending(error, bool(asked))
            if not status:
                raise
            if status == interrupt.STATUS:
                interrupt.tell()
            else:
                _written(sys.stderr, f"error: {text}\n")
            _written(sys.stdout, "")
            sys.exit(status)
        finally:
            log.removeHandler(handler)


def ending(error: BaseException, interrupted: bool) -> tuple[int, str]:
    """(exit status, message) of an error that ends a command; status 0 if it is not the user's.

    What fails because a Ctrl-C came in the middle of it (`interrupted`) is no error of its own.
    """
    if interrupted or isinstance(error, KeyboardInterrupt):
        return interrupt.STATUS, ""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, BrokenPipeError):  # as in `... | head`
        return 1, "the reader of the output left before its end"
    if isinstance(error, OSError) and error.errno in REMEDIES and error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return 2, f"{name}: {error.strerror}: {REMEDIES[error.errno]}"
    if isinstance(error, OSError) and error.errno in FULL:
        stdout = "what was being written" if _written(sys.stdout, "") else "stdout"
        name = stdout if error.filename is None else error.filename
        return 1, f"{name}: {error.strerror}; it is not complete"
    return 0, ""


def _streams() -> None:
    """Readies stdout and stderr: a closed one takes everything and keeps nothing.

    Stdout shows a character that its encoding lacks as an escape, as stderr does.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _written(stream: TextIO, text: str) -> bool:
    """Writes and flushes; if that fails, nothing of it is tried again when Python ends."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def parse(argv: Sequence[str], classes: dict[str, type[Section]]) -> Experiment:
    """The experiment that the arguments describe, checked; the needed sections are there."""
    files = [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
    if len(files) != 1 or not files[0]:
        given = f", not {len(files)} ({', '.join(files)})" if len(files) > 1 else ""
        raise UserError(f"exactly one --config is needed{given}; usage: {USAGE}")
    config = load(files[0])
    try:
        add_sections(config, files[0], classes)
        overrides = [arg for arg in argv if not arg.startswith("--config=")]
        refuse_twice(overrides)
        for arg in overrides:
            override(config, arg, files[0])
        precedence.settle(config, overrides)
        experiment = freeze(config)
    except RequiredValueError as error:
        raise UserError(f"{files[0]}: {error}") from None
    for name, cls in classes.items():
        section = getattr(experiment, name)
        if not isinstance(section, cls):
            raise UserError(
                f"{files[0]}: section {name!r} is {type(section).__name__}, but this command "
                f"needs {cls.__name__}"
            )
    return experiment


load = config_file.load


def add_sections(
    config: ml_collections.ConfigDict, file: str, classes: dict[str, type[Section]]
) -> None:
    """Adds the needed sections that the file does not have, with their defaults."""
    for name, cls in classes.items():
        if config.get(name) is not None:
            continue
        fields = dataclasses.fields(cls)
        needed = [field.name for field in fields if field.default is dataclasses.MISSING]
        if needed:
            raise UserError(
                f"{file} has no section {name!r}: this command needs {cls.__name__}, which has "
                f"no default of {', '.join(needed)}; add {name}={cls.__name__}(...) to Experiment"
            )
        with config.unlocked():
            config[name] = editable_section(cls())


def refuse_twice(argv: Iterable[str]) -> None:
    """UserError for a field that is given two values: which one is meant?"""
    given: dict[str, str] = {}
    for arg in argv:
        name = arg.partition("=")[0]
        if given.setdefault(name, arg) != arg:
            raise UserError(f"{name} is given twice, as {given[name]} and as {arg}: give it once")


SECTIONS = {f.name for f in dataclasses.fields(Experiment)} - {"name", "workdir"}


def override(config: ml_collections.ConfigDict, arg: str, file: str) -> None:
    """Applies one `--config.section.field=value` to the config of `file`."""
    name, equals, text = arg.partition("=")
    if not name.startswith("--config.") or not equals:
        raise UserError(f"{arg} is not understood; usage: {USAGE}")
    head, *rest = name.removeprefix("--config.").split(".")
    if head not in _names(config):
        raise UserError(unknown_field(head, head, _names(config)))
    section = config[head]
    if section is None and head in SECTIONS:
        raise UserError(
            f"{file} has no section {head!r}, and this command reads none: leave {name} out, or "
            f"add {head}=... to Experiment"
        )
    if not isinstance(section, ml_collections.ConfigDict):
        if rest:
            raise UserError(f"{head} has no fields of its own")
        if not text.strip():
            raise UserError(f"{name}= is empty: give a value, or leave it out")
        config[head] = text  # name or workdir
        return
    if not rest:
        raise UserError(f"{head} is a section: set one of {', '.join(_names(section))}")
    field = rest[0]
    if field not in _names(section):
        raise UserError(unknown_field(f"{head}.{field}", field, _names(section)))
    if rest[1:]:
        raise UserError(f"{head}.{field} has no fields of its own")
    section[field] = read_field(section_class(config, head), field, text)


def read_field(cls: type[Section], name: str, text: str) -> Any:
    """The value that `text` means for a field of a section."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    hint = type_hints(cls)[name]
    return literals.value(text, hint, field.metadata.get("commas", ""))


def _names(node: ml_collections.ConfigDict) -> list[str]:
    return [name for name in node if not name.startswith("_")]


def flags(argv: Sequence[str], cls: type[S]) -> S:
    """The section `cls` from arguments `--field=value`; a bare `--field` is True."""
    hints, values = type_hints(cls), {}
    names = [field.name for field in dataclasses.fields(cls)]
    refuse_twice(argv)
    for arg in argv:
        name, equals, text = arg.partition("=")
        if not name.startswith("--"):
            raise UserError(f"{arg} is not understood: it should be --name=value")
        name = name[2:]
        if name not in names:
            raise UserError(unknown_field(f"--{name}", name, names))
        if not equals and hints[name] is not bool:
            raise UserError(f"--{name} has no value: give one, --{name}=...")
        values[name] = read_field(cls, name, text) if equals else True
    return build(cls, values)


def help_text(doc: str, classes: dict[str, type[Section]]) -> str:
    """Returns the text of `--help`: the doc, then each field with its default and meaning."""
    lines = [doc.strip(), "", f"usage: {USAGE}", "", literals.HELP]
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
