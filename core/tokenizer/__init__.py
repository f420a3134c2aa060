"""The files of a tokenizer in a bundle."""
