"""Opens a tokenizer, whichever kind it is.

tokenizer = load("runs/x/tokenizer")  # or a Hugging Face directory

tokenizer_trained.py         our own SentencePiece, and how it is trained
tokenizer_huggingface.py     a tokenizer.json
tokenizer_sentencepiece.py   a tokenizer.model of others
"""

import os
from pathlib import Path

from core.config import UserError
from core.tokenizer import tokenizer_files, tokenizer_model
from data.tokenizer import huggingface, sentencepiece_model
from data.tokenizer.base import Tokenizer
from data.tokenizer.trained import Trained


def load(directory: str | os.PathLike) -> Tokenizer:
    """The tokenizer in `directory`. UserError when there is none or it is damaged."""
    directory = Path(directory)
    kind = tokenizer_files.kind(directory)
    if kind is None:
        names = f"{tokenizer_files.JSON} or {tokenizer_files.MODEL}"
        inside = directory / "tokenizer"
        remedy = f"name {inside}" if inside.is_dir() else "run python -m data.prepare first"
        raise UserError(f"there is no tokenizer in {directory} ({names}); {remedy}")
    if kind == "trained":
        return Trained(tokenizer_model.read(directory / tokenizer_files.MODEL))
    reader = huggingface if kind == "huggingface" else sentencepiece_model
    tokenizer = reader.load(directory)
    marks = dict(bos=tokenizer.bos, pad=tokenizer.pad, eos=max(tokenizer.eos, default=None))
    for name, i in marks.items():
        if i is not None and i >= tokenizer.vocab_size:
            raise UserError(
                f"{directory}: the files beside the tokenizer say that {name} is {i}, but it has "
                f"only {tokenizer.vocab_size} tokens: correct generation_config.json or config.json"
            )
    return tokenizer
