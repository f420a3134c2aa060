"""From a bundle to text, to scores and to the context-window report."""

from core import interrupt

interrupt.watch()
