"""Inference: text and scores from a bundle."""

from core.command import environment, interrupt

interrupt.watch()
environment.check()
