"""From logits to tokens: settings of a row, the sampler, beam search, log-probabilities."""
