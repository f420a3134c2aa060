"""Steps compiled ahead of their first call, each once for the shapes that it is called with.

programs = Programs()
after = programs.run(("extend", 8, 512), jax.jit(step), model, now)
"""

import math
import time
from collections.abc import Hashable
from typing import Any


class CompiledSteps:
    """The compiled programs, by key, and the seconds that their compilation took."""

    def __init__(self):
        self.compiled: dict[Hashable, Any] = {}
        self.seconds = 0.0

    def run(self, key: Hashable, jitted: Any, *args: Any) -> Any:
        """The result of `jitted`, compiled at the first call with this key: one key, one shape."""
        if key not in self.compiled:
            began = time.perf_counter()
            self.compiled[key] = jitted.lower(*args).compile()
            self.seconds += time.perf_counter() - began
        return self.compiled[key](*args)


def bucket(size: int) -> int:
    """The next of eight sizes between powers of 2, all multiples of 64: up to 1/8 more, or 63."""
    step = max(64, 2 ** (math.floor(math.log2(max(size, 1))) - 3))
    return math.ceil(size / step) * step
