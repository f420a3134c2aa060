"""HOW a block of scores is computed: one forward and one backward each."""
