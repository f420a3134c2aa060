"""One file per experiment: choices only, no logic."""
