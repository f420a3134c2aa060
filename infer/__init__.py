"""From a bundle to text and scores."""

from core import environment, interrupt

interrupt.watch()
environment.check()
