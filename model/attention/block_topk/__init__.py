"""Blocks of keys that queries choose from the data: MoBA, NSA."""
