"""Benchmarks: commands that print ratios to peers, measured interleaved in one run."""

from core.command import interrupt

interrupt.watch()
