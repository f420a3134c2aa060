"""Ctrl-C ends a command with one line on stderr and status 130, at whatever moment it comes.

    package/__init__.py:  interrupt.watch()             the seconds of imports before main()
    core/command/cli.py:  with interrupt.raised(): ...  the work: KeyboardInterrupt, files tidied up

The first Ctrl-C during the work raises KeyboardInterrupt, so that every `finally` runs. Python
raises it between two of its own instructions: a compiler in C++ ends its minute first. The second
Ctrl-C ends the process at once, there too.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STATUS = 130  # what shells give a process that SIGINT ended: 128 + 2
AGAIN = 0.05  # seconds until a KeyboardInterrupt that was lost in a destructor is raised again
PATIENCE = 1.0  # seconds that the main thread has to come to its handler after a second Ctrl-C

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

    def stuck() -> None:
        # A command with a handler of its own, as train.pretrain, may have good use for two.
        if not asked and signal.getsignal(signal.SIGINT) is ask:
            at_once(signal.SIGINT, None)

    # Python writes the number of each signal into this pipe, even while the main thread is in C++.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_count, args=(reader, stuck), daemon=True).start()
    signal.signal(signal.SIGINT, ask)
    sys.unraisablehook = unraisable
    try:
        yield asked
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, usual)
        signal.set_wakeup_fd(before)
        os.close(writer)  # which ends the thread


def _count(reader: int, stuck: Callable[[], None]) -> None:
    """Calls `stuck` PATIENCE seconds after a second Ctrl-C."""
    with os.fdopen(reader, "rb", buffering=0) as numbers:
        pressed = 0
        while number := numbers.read(1):
            pressed += number[0] == signal.SIGINT
            if pressed == 2:
                timer = threading.Timer(PATIENCE, stuck)
                timer.daemon = True
                timer.start()
