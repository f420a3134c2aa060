"""The transformer: attention, blocks, caches."""
