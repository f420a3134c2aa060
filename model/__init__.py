"""The transformer: attention, blocks, caches."""

from core.command import environment, interrupt

interrupt.watch()
environment.check()
