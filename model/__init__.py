"""The transformer: attention, blocks, caches."""

from core import interrupt

interrupt.watch()
