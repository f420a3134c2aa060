"""Documents from files, datasets and generators."""
