"""A table of rows that grows in a file: JSON lines, appended as they come.

    with rows_file.RowsFile(config.output, "decode.output", [("decode.prompts", path)]) as rows:
        rows.append([{"text": ...}])  # lines that are in the file when this returns

UserError before the work begins if the file cannot be written, or holds something else than JSON
lines. A file that is there keeps its lines. A file that cannot be written later on, as on a full
disk, ends the program with one message and status 1; the rows before that stay, whole.
"""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from core.config import UserError
from core.storage import json_lines, output

log = logging.getLogger("cakrawala")

ENDS = signal.SIGTERM, signal.SIGHUP
BLOCK = 2**16  # bytes that are read first, from the end of a file


class RowsFile:
    """JSON lines that are appended to a file as they come; nothing at all if `path` is empty."""

    def __init__(self, path: str, field: str, inputs: output.Inputs = ()):
        """Opens the file. `field` is the setting that names it, and `inputs` are what is read."""
        self.path, self._field, self.count, self._had = path, field, 0, 0
        self._file: int | None = None
        self.is_stdout = bool(path) and output.is_stdout(path)
        self.kept = "" if self.is_stdout else path  # the file that has the rows, if one has
        if path and not self.is_stdout:
            target = output.where(path, field, inputs)
            try:
                self._file = _open(target, path, field)
                with _locked(self._file):
                    self._had = _check_tail(self._file, target, path, field)
                    _check_space(self._file)
            except OSError as error:
                self.close()
                raise UserError(output.cannot(field, path, error)) from None
            except UserError:
                self.close()
                raise

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes each row as a line of its own; they are in the file when this returns.

        Ends the program with status 1 if one cannot be written; those before it stay whole.
        """
        for row in rows:
            self.append_line(_line(row))

    def append_line(self, line: str) -> None:
        """Writes the line of a row."""
        # A signal waits, or a row could be there and not be counted.
        with _uninterrupted(self._file):
            try:
                if self.is_stdout:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                elif self._file is not None:
                    _append(self._file, line.encode())
            except BrokenPipeError:
                if self.is_stdout:
                    raise
                self._fail("its reader left")
            except OSError as error:
                self._fail(error.strerror)
            self.count += 1

    def sync(self) -> None:
        """Returns when all is on the disk; ends the program with status 1 if that fails."""
        try:
            if self._file is not None and stat.S_ISREG(os.fstat(self._file).st_mode):
                os.fsync(self._file)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
                self._fail(error.strerror)

    def _fail(self, why: str | None) -> NoReturn:
        rows = "1 row is" if self.count == 1 else f"{self.count} rows are"
        sys.exit(
            f"error: {self._field}={self.path} cannot be written: {why}; {rows} in it from this "
            "run, each of them whole"
        )

    def told(self) -> str:
        """Returns what to tell the user at the end."""
        rows = f"{self.count} row" + "s" * (self.count != 1)
        return f"{rows} in {self.path}" + ", after those that it had" * bool(self._had)

    def close(self) -> None:
        """Closes the file; a disk that tells only now that it is full ends the program too."""
        try:
            self.sync()
        finally:
            file, self._file = self._file, None
            if file is not None:
                os.close(file)

    def __enter__(self) -> "RowsFile":
        """SIGTERM and SIGHUP end the work as Ctrl-C does: every `finally` may still append."""
        for number in ENDS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _end)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        for number in ENDS:
            if signal.getsignal(number) is _end:
                signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)  # the status that shells give


def _open(target: Path, path: str, field: str) -> int:
    """Opens a file to append to. A FIFO that no one reads yet is waited for."""
    how = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    try:
        file = os.open(target, how | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(target).st_mode):
            raise
        log.info("%s=%s waits for its reader", field, path)
        return os.open(target, how, 0o666)
    os.set_blocking(file, True)
    return file


def _check_tail(file: int, target: Path, path: str, field: str) -> int:
    """Returns the bytes that a file has, once its last line is known to be a JSON object."""
    size = os.fstat(file).st_size
    if not stat.S_ISREG(os.fstat(file).st_mode) or not size:
        return 0
    line = _last_line(target, size)
    remedy = "rows are appended to JSON lines alone; name another file"
    if not line.endswith(b"\n"):
        raise UserError(
            f"{field}={path} is there already, and its last line is cut off (no newline ends it): "
            f"{remedy}, or complete or remove that line"
        )
    try:
        found = json_lines.parse(line, lenient=True)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{field}={path} is there already, and its last line is no JSON object: {remedy}"
        )
    return size


def _last_line(target: Path, size: int) -> bytes:
    """The last line of a file of `size` bytes, with the newline that ends it if there is one."""
    line, start, block = b"", size, BLOCK
    with open(target, "rb") as file:
        while start and b"\n" not in line[:-1]:
            start, end, block = max(0, start - block), start, 2 * block
            file.seek(start)
            line = file.read(end - start) + line
    return line[line[:-1].rfind(b"\n") + 1 :]


def _check_space(file: int) -> None:
    """Raises OSError if nothing can be written: a full disk, or /dev/full."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.write(file, b"")
    elif os.fstat(file).st_size == 0:
        os.write(file, b"\n")
        os.ftruncate(file, 0)


def _append(file: int, line: bytes) -> None:
    """Writes a line whole, or leaves the file as it was and raises OSError."""
    with _locked(file):
        done = 0
        try:
            while done < len(line):
                done += os.write(file, line[done:])
        except OSError:
            size = os.fstat(file).st_size
            if done and stat.S_ISREG(os.fstat(file).st_mode):
                os.ftruncate(file, size - done)
            raise


@contextlib.contextmanager
def _uninterrupted(file: int | None) -> Iterator[None]:
    """Holds signals back until a row is written; not where a reader may keep us waiting."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or file is None or not stat.S_ISREG(os.fstat(file).st_mode):
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDS)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    came = []
    for number in handlers:
        signal.signal(number, lambda *args: came.append(args))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in came[:1]:
            handlers[number](number, frame)


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    """Holds the file against other runs that append to it, on file systems that can."""
    can = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        can = False
    try:
        yield
    finally:
        if can:
            fcntl.flock(file, fcntl.LOCK_UN)


def _line(row: Mapping[str, Any]) -> str:
    """The line of a row; a number that JSON has not (nan, inf) is null."""
    try:
        text = json.dumps(row, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(row))
    return text + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
