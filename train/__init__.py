"""Pre-training: loss, optimizer, step, loop."""

from core import environment, interrupt

interrupt.watch()
environment.check()
