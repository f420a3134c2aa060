"""Files of results: checked before the work begins, and never in place of a file of the user's.

    report = output.File(config.output, "aot.output", output.is_json("topology", "fits"))
    report.write(text)  # whole or not at all

UserError, when it is made, if the file cannot be written or is there and not ours. A file that
cannot be written later on ends the program with one message and status 1.

`-`, /dev/stdout and every other name of stdout write to stdout; devices and FIFOs are written to
as they are. Tables that grow are in core/storage/rows_file.py.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from core.config import UserError
from core.storage import files

log = logging.getLogger("cakrawala")

SIGNATURE = "\n<!-- written by Cakrawala, unchanged if the SHA-256 of all above is "
Inputs = Iterable[tuple[str, str | Path]]  # fields, and the files or folders that they name


class File:
    """A file that is written once, whole; nothing at all if `path` is empty."""

    def __init__(
        self,
        path: str | Path,
        field: str,
        is_ours: Callable[[bytes], bool],
        inputs: Inputs = (),
    ):
        """Raises UserError if the file cannot be written, or is there and not `is_ours`."""
        self.path, self._field, self._is_ours = str(path), field, is_ours
        self.is_stdout = bool(path) and is_stdout(self.path)
        self.kept = "" if self.is_stdout else self.path  # the file that has it, if one has
        self._target: Path | None = None
        if not path or self.is_stdout:
            return
        target = where(self.path, field, inputs)
        try:
            if is_foreign(target, is_ours):
                raise UserError(
                    f"{field}={path} is there already, and this command did not write it: name "
                    "another file, or move it away"
                )
            if target.is_file() or not target.exists():
                files.probe(target.parent)
            elif not target.is_fifo():
                _check_device(target)
        except OSError as error:
            raise UserError(cannot(field, path, error)) from None
        self._target = target

    def write(self, content: str) -> None:
        """Writes the file; ends the program with status 1 if that fails, and leaves what was.

        A file that someone else put there since the work began stays; ours gets another name.
        """
        if self.is_stdout:
            print(content, end="", flush=True)
        elif self._target is not None:
            try:
                if is_foreign(self._target, self._is_ours):
                    other = self._target.with_name(f"{self._target.name}.{os.getpid()}")
                    log.warning("%s is another's by now: %s is written", self.path, other)
                    self._target = other
                files.replace(self._target, content.encode())
            except OSError as error:
                sys.exit(f"error: {self._field}={self.path} cannot be written: {error.strerror}")


def is_foreign(path: Path, is_ours: Callable[[bytes], bool]) -> bool:
    """Returns whether a file is there that this program did not write, and is not empty."""
    content = path.read_bytes() if path.is_file() else b""
    return bool(content) and not is_ours(content)


def is_json(*keys: str) -> Callable[[bytes], bool]:
    """Returns a test whether a file is a JSON object with these keys, or a list of such."""

    def test(content: bytes) -> bool:
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return False
        values = value if isinstance(value, list) else [value]
        return all(isinstance(each, dict) and each.keys() >= {*keys} for each in values)

    return test


def begins_with(start: str) -> Callable[[bytes], bool]:
    """Returns a test whether a file begins with this text."""
    return lambda content: content.startswith(start.encode())


def signed(text: str) -> str:
    """Returns a page of Markdown with a last line that tells if it was changed since."""
    return f"{text}{SIGNATURE}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_page(title: str) -> Callable[[bytes], bool]:
    """Returns a test whether a file is a page that begins so and, if signed, is as it was."""

    def test(content: bytes) -> bool:
        text, mark, _ = content.decode(errors="replace").rpartition(SIGNATURE)
        if mark and content != signed(text).encode():
            return False
        return content.startswith(title.encode())

    return test


def is_stdout(path: str) -> bool:
    """Returns whether `path` is a name of stdout: -, /dev/stdout, or the file it was sent to."""
    if path == "-":
        return True
    try:
        same = os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError, AttributeError):  # no such file; no stdout, or no real one
        return False
    # /dev/null is where several may write; they do not stand in each other's way.
    return same and not os.path.samefile(path, os.devnull)


def where(path: str, field: str, inputs: Inputs) -> Path:
    """Returns where `path` leads, links followed; its folder is made if it is not there.

    UserError for a folder, for a place that cannot be, and for what the program reads.
    """
    if "\0" in path:
        raise UserError(f"{field}={path!r} holds a NUL, which no name of a file can")
    if path.endswith("/") or os.path.isdir(path):
        raise UserError(f"{field}={path} is a folder: name a file, as {path.rstrip('/')}/x")
    if os.path.exists(path) and Path(path).is_block_device():
        raise UserError(f"{field}={path} is a disk: name a file on it")
    target = Path(os.path.realpath(path))
    for name, given in inputs:
        if given and _holds(str(given), target):
            raise UserError(f"{field}={path} is the file of {name}={given}: name another to write")
    if os.path.exists(path) and not os.path.isfile(path):
        return Path(path)  # a pipe in /dev/fd leads to no path
    if os.path.islink(path) and not target.parent.is_dir():
        raise UserError(
            f"{field}={path} is a link to {target}, but {target.parent} is not there: is its disk "
            "mounted? Make the folder, or name another file"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(cannot(field, path, error)) from None
    return target


def _holds(given: str, target: Path) -> bool:
    """Returns whether `target` is the file `given` (- is stdin), or lies in the folder `given`."""
    try:
        if given == "-":
            return os.path.samestat(os.stat(target), os.fstat(sys.stdin.fileno()))
        if target.is_relative_to(os.path.realpath(given)):
            return True
        return os.path.samefile(given, target)
    except (OSError, ValueError, AttributeError):  # one of them is not there
        return False


def cannot(field: str, path: str | Path, error: OSError) -> str:
    """Returns the message for a file that the system does not let us write."""
    where = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
    return f"{field}={path} cannot be written: {error.strerror}{where}; name another file"


def _check_device(target: Path) -> None:
    file = os.open(target, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(file, b"")
    finally:
        os.close(file)
