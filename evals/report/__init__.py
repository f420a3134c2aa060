"""The parts of the context-window report of `python -m evals.bench`."""
