"""Benchmarks: commands that print ratios to peers, measured interleaved in one run."""
