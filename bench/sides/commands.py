"""Helpers of the commands here: flags that hold several numbers, and processes of their own."""

import argparse
import subprocess
import sys
from collections.abc import Callable


def whole(text: str) -> int:
    """A flag's number, 1 or more."""
    if not text.isdecimal() or not 0 < int(text[:20]) < 2**63:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number of 1 or more")
    return int(text)


def several(one: Callable[[str], int | str]) -> Callable[[str], list]:
    """A flag of values with commas between, each of them read by `one`."""

    def read(text: str) -> list:
        return [one(part.strip()) for part in text.split(",")]

    return read


def choice(*names: str) -> Callable[[str], str]:
    """A flag's name, one of `names`."""

    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return read


def call(command: list[str], **how) -> subprocess.CompletedProcess:
    """Runs a process to its end; if it fails, its own message is the one on stderr.

    Ctrl-C reaches the parent alone, which ends the child: both would tell of it otherwise.
    """
    done = subprocess.run(command, start_new_session=True, **how)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed; its message is above")
    return done
