"""Peers in processes of their own that work in turns, so that all meet the same machine."""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any


class Worker:
    """A process that does one task a line of input and answers with a line of JSON."""

    def __init__(self, python: str, module: str):
        command = [python, "-m", module]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the parent's; without it the worker's input ends
        )

    def run(self, task: Any = None) -> dict[str, Any]:
        """{"seconds", "peak_bytes"} of one task; the other workers only wait meanwhile."""
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            self.last = json.loads(self._process.stdout.readline() or "{}")
        except KeyboardInterrupt:
            self._process.kill()
            raise
        except BrokenPipeError:  # it ended before it read its task
            self.last = {}
        if not self.last:
            sys.exit(f"{' '.join(self._process.args)} ended; its message is above")
        return self.last

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def serve(work: Callable[[Any], None]) -> None:
    """The worker's side: calls `work(task)` for each line of input."""
    for line in sys.stdin:
        task = json.loads(line)
        began = time.perf_counter()
        work(task)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"seconds": time.perf_counter() - began, "peak_bytes": peak}
        print(json.dumps(answer), flush=True)
