"""Evaluation: how far a model sees, how fast, and at what cost."""

from core.command import environment, interrupt

interrupt.watch()
environment.check()
