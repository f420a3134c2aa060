"""Sampling: settings of a row, logits to tokens, beam search, log-probabilities."""
