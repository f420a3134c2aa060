"""The prompts of RULER (Hsieh et al. 2024, arXiv 2404.06654); `evals.ruler.tasks` is the way in.

RULER's templates and figures are those of its code (github.com/NVIDIA/RULER,
scripts/data/synthetic); its word lists and essays are not here, so words and filler are our own.
"""
