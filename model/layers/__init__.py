"""Norm, attention and MLP of a block."""
