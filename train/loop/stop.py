"""The request to stop a run by a signal: one answer, the same in every process.

with Stop() as stop:
    for step in ...:
        if reason := stop.asked(): ...
"""

import os
import signal

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Notes the first SIGTERM or Ctrl-C; a second one acts as usual.

    In a run of several processes JAX's own handler notes SIGTERM and tells all of them, and
    `asked` turns true in all at the same call: every process must call it equally often. Python's
    handler would take the place of JAX's, so there only Ctrl-C has one, which passes it on.
    """

    def __init__(self):
        self._signal, self._calls, self._usual = "", 0, {}
        self._together = jax.distributed.is_initialized()

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT,) if self._together else SIGNALS:
            self._usual[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error) -> None:
        self._restore()

    def _note(self, number: int, frame) -> None:
        self._restore()
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._signal = signal.Signals(number).name

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        self._usual = {}

    def asked(self) -> str:
        """Returns the signal that asks to stop; empty while none does."""
        if self._together and not self._signal:
            self._calls += 1
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self._signal = "SIGTERM"
        return self._signal
