"""From a bundle to text, to scores and to the context-window report."""

from core import environment, interrupt

interrupt.watch()
environment.check()
