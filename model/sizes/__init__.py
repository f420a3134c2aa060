"""Parameters, bytes and FLOPs of a model, without running it."""
