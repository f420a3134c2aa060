"""Attention: what is seen (spec), where keys meet queries (attend), how (kernels)."""
