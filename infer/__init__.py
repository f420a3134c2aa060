"""From a bundle to text and scores."""

from core.command import environment, interrupt

interrupt.watch()
environment.check()
