"""How a command ends that is interrupted, or whose output cannot be written."""

import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from config_cases import ROOT

from core.command import cli, interrupt
from core.config import UserError


@pytest.fixture(autouse=True)
def not_told(monkeypatch):
    monkeypatch.setattr(interrupt, "_told", False)


def ends(capfd, work) -> tuple[int, str]:
    """(exit status, stderr) of a command that does `work`; a signal handler of ours is put back."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop, cli.exits():
        work()
    assert signal.getsignal(signal.SIGINT) is before
    return stop.value.code, capfd.readouterr().err


def fails(error):
    def work():
        raise error

    return work


def test_ctrl_c_is_one_line_and_130(capfd):
    assert ends(capfd, lambda: signal.raise_signal(signal.SIGINT)) == (130, "interrupted\n")


def test_what_breaks_because_of_ctrl_c_is_no_error_of_its_own(capfd):
    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise RuntimeError("half of it is there")

    assert ends(capfd, work) == (130, "interrupted\n")


def test_ctrl_c_in_a_destructor_is_not_lost(capfd):
    class Held:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def work():
        held = Held()
        del held
        time.sleep(20)

    began = time.perf_counter()
    assert ends(capfd, work) == (130, "interrupted\n")
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize(
    "package", ["bench.train", "data.prepare", "infer.decode", "model.convert", "train.aot"]
)
def test_ctrl_c_while_a_command_imports(package):
    command = [sys.executable, "-X", "importtime", "-m", package]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    # The line of a package comes when all of its __init__.py has run; hundreds come after it.
    for line in process.stderr:
        if line.rstrip().endswith(f"| {package.partition('.')[0]}"):
            break
    process.send_signal(signal.SIGINT)
    rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.wait(), rest) == (130, ["interrupted\n"])


class Stopped(BaseException):
    """What stops a test's second Ctrl-C in place of os._exit."""


def test_a_second_ctrl_c_ends_the_process_at_once(monkeypatch, capfd):
    def exit(status):
        raise Stopped(status)

    monkeypatch.setattr(os, "_exit", exit)
    with pytest.raises(Stopped, match="130"), interrupt.raised():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == "interrupted\n"


# OpenSSL's loop lasts for hours, and Python runs no handler in it: as in a compiler.
STUCK = """
import hashlib
from core.command import interrupt
with interrupt.raised():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"x", 2**31 - 1)
"""


def test_a_second_ctrl_c_reaches_a_main_thread_in_c():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.stdout.readline()
        for _ in range(2):
            time.sleep(0.2)  # two signals that come at once are one
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "interrupted\n")


def test_sigint_stays_ignored_where_it_was(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m"])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt.watch()
        with interrupt.raised():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("train.steps=0: no"), 2, "error: train.steps=0: no\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.txt"),
            2,
            "error: a.txt: Permission .*",
        ),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", b"a"),
            2,
            "error: a: Is a directory: .*",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "a"),
            2,
            "error: a: File name too long: .*",
        ),
        (
            OSError(errno.ENOSPC, "No space left", "a"),
            1,
            "error: a: No space left; it is not comp.*",
        ),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "error: the reader of the output left .*"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_one_message_and_a_status(capfd, error, status, message):
    found, err = ends(capfd, fails(error))
    assert found == status and re.fullmatch(
        message, err.rstrip("\n") + "\n" * message.endswith("\n")
    )


def test_mistakes_of_ours_keep_their_traceback():
    for error in (RuntimeError("x"), OSError(errno.ECONNREFUSED, "refused")):
        with pytest.raises(type(error)), cli.exits():
            raise error


@pytest.mark.parametrize("kind", ["full", "broken", "closed"])
def test_a_stdout_that_takes_nothing(monkeypatch, capfd, kind):
    if kind == "full":
        stream = open("/dev/full", "w")  # noqa: SIM115
    elif kind == "broken":
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    else:
        stream = None
    monkeypatch.setattr(sys, "stdout", stream)
    if kind == "closed":
        with cli.exits():
            print("x")
        return
    said = {"full": "stdout: No space left on device", "broken": "the reader of the output left"}
    status, err = ends(capfd, lambda: print("x"))
    assert status == 1 and err.startswith(f"error: {said[kind]}") and err.count("\n") == 1
    stream.close()  # writes nothing any more, so it cannot fail when Python ends


def test_characters_that_stdout_cannot_show_are_escapes(monkeypatch, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as stream, cli.exits():
        monkeypatch.setattr(sys, "stdout", stream)
        cli._streams()
        print("caf\u00e9")
    assert (tmp_path / "out").read_bytes() == b"caf\\xe9\n"
