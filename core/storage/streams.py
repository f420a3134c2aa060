"""stdout and stderr while results go to a file too: whoever reads them may leave.

    with streams.guarded(kept="out.jsonl"):
        print(text)

Without `kept`, a reader of stdout who leaves ends the program as usual (`... | head`). With it the
work goes on in silence: the results are in the file.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class Guarded:
    """A text stream that drops what it cannot write, from the first time on."""

    def __init__(self, stream: TextIO | None):
        # None is a stream that was closed (`>&-`).
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.error: OSError | None = None  # why it writes no more

    def write(self, text: str) -> int:
        """Writes a text; a character that the encoding lacks becomes an escape (\\u2603)."""
        try:
            self._unless_broken(self.stream.write, text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            text = text.encode(encoding, "backslashreplace").decode(encoding)
            self._unless_broken(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Passes on what is buffered."""
        self._unless_broken(self.stream.flush)

    def _unless_broken(self, do: Callable[..., Any], *args: Any) -> None:
        if self.error is not None:
            return
        try:
            do(*args)
        except OSError as error:
            self.error = error
            # What is buffered would fail again when Python ends: it goes nowhere.
            with contextlib.suppress(OSError, ValueError):  # a stream without a file
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def guarded(kept: str) -> Iterator[None]:
    """Guards stdout and stderr if `kept` names the file that has the results too.

    Where stdout fails for another reason than its reader, the end of it all is one message and
    status 1.
    """
    if not kept:
        yield
        return
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = guard, _ = tuple(map(Guarded, before))
    try:
        yield
        guard.flush()
    finally:
        sys.stdout, sys.stderr = before
    if guard.error is not None and not isinstance(guard.error, BrokenPipeError):
        sys.exit(
            f"error: stdout cannot be written: {guard.error.strerror}; all results are in {kept}"
        )
