"""The parts of the training loop around its step."""
