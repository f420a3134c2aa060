"""Ctrl-C ends a command with one line on stderr and status 130, at whatever moment it comes.

    package/__init__.py:  interrupt.watch()            the seconds of imports before main()
    core/cli.py:          with interrupt.raised(): ...  the work: KeyboardInterrupt, files tidied up

The first Ctrl-C during the work raises KeyboardInterrupt, so that every `finally` runs. The second
one ends the process at once.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

STATUS = 130  # what shells give a process that SIGINT ended: 128 + 2
AGAIN = 0.05  # seconds until a KeyboardInterrupt that was lost in a destructor is raised again

_told = False  # the line stands on stderr


def tell() -> None:
    """Writes the line, once; a stderr that is closed or full gets none."""
    global _told
    if not _told:
        _told = True
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")


def at_once(number: int, frame: FrameType | None) -> None:
    """The handler outside of the work: there is nothing to tidy up, and importing may not fail."""
    tell()
    os._exit(STATUS)


def watch() -> None:
    """Ends the process at a Ctrl-C while `python -m package.module` still imports.

    Python imports the package first, and until it has found the module sys.argv[0] is "-m": for a
    program that imports us as a library this does nothing. SIGINT stays ignored where it was, as
    for a job in the background of a script.
    """
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, at_once)


@contextlib.contextmanager
def raised() -> Iterator[list[int]]:
    """Raises KeyboardInterrupt at the first Ctrl-C within; the list given then has one item.

    Python cannot raise it out of a destructor: there it is only printed. It is raised again then.
    """
    usual, hook, asked = signal.getsignal(signal.SIGINT), sys.unraisablehook, []
    ours = usual in (signal.default_int_handler, at_once)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, at_once)
        asked.append(number)
        raise KeyboardInterrupt

    def unraisable(what: "sys.UnraisableHookArgs") -> None:
        if not asked or what.exc_type is not KeyboardInterrupt:
            hook(what)
            return
        signal.signal(signal.SIGINT, ask)
        again = threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        again.start()

    signal.signal(signal.SIGINT, ask)
    sys.unraisablehook = unraisable
    try:
        yield asked
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, usual)
