"""Locks on folders: two runs that would write the same files do not run at once.

    with lock.hold(workdir, "workdir"): ...

The kernel keeps the lock (flock), and drops it when its process ends in whatever way: after
kill -9 nothing is left to clean up. The file .lock stays, and says who holds it.
"""

import contextlib
import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from core.config import UserError
from core.storage.files import LOCK

log = logging.getLogger("cakrawala")


@contextlib.contextmanager
def hold(folder: Path, remedy: str, shared: bool = False) -> Iterator[None]:
    """Holds the lock of `folder`; many may hold it `shared`, one alone otherwise.

    Raises UserError, which ends with `remedy`, if another process (or this one) holds it. A file
    system without locks is logged.
    """
    path = folder / LOCK
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if shared:  # a folder that cannot be written changes for nobody
            yield
            return
        raise UserError(f"{folder} cannot be written: {error.strerror}; {remedy}") from None
    try:
        _take(file, folder, remedy, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _take(file: int, folder: Path, remedy: str, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, 1000, 0).decode(errors="replace").strip() or "another process"
        raise UserError(f"{folder} is in use by {holder}: wait for it, or {remedy}") from None
    except OSError as error:  # some network file systems
        log.warning(
            "%s cannot be locked (%s): see to it that no other run uses it", folder, error.strerror
        )
    if kind == fcntl.LOCK_EX or not os.fstat(file).st_size:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = f"process {os.getpid()} on {socket.gethostname()} ({command}), since {now}\n"
        os.ftruncate(file, 0)
        os.pwrite(file, holder.encode(errors="replace"), 0)
