"""Variables that JAX reads while it is imported, before a command could tell what is wrong.

    package/__init__.py:  environment.check()     before the package's modules import JAX

Without it a number that is none ends in JAX's stack trace.
"""

import os
import sys


def check() -> None:
    """Ends the process with one message and status 2 if JAX_NUM_CPU_DEVICES is no number."""
    number = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
    if not number.isdecimal() or int(number) < 1:
        print(
            f"error: JAX_NUM_CPU_DEVICES={number}: it is a number of devices, 1 or more; unset it "
            "for one device",
            file=sys.stderr,
        )
        sys.exit(2)
