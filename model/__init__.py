"""The transformer: attention, blocks, caches."""

from core import environment, interrupt

interrupt.watch()
environment.check()
