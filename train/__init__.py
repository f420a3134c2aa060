"""Pre-training: loss, optimizer, step, loop."""

from core.command import environment, interrupt

interrupt.watch()
environment.check()
