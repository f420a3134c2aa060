"""Pre-training: loss, optimizer, step, loop."""
