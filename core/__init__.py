"""Configuration, sharding, checkpoints, metrics. Knows nothing of models or data."""
