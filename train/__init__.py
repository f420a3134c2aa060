"""Pre-training: loss, optimizer, step, loop."""

from core import interrupt

interrupt.watch()
