"""Evaluation: mean loss and bits per byte on the validation split."""

import itertools
import math
from typing import Any

from data.loader import Validation
from model.transformer import Transformer
from train.feed import Feed
from train.step import eval_step


def evaluate(
    model: Transformer, batches: Validation, feed: Feed, split: dict[str, Any], limit: int = 0
) -> dict[str, float]:
    """eval_loss (nats a token) and bits_per_byte, over all batches or the first `limit`.

    `split` is the manifest's entry: its text bytes, and its tokens without the documents' bos.
    Bits per byte count everything needed to tell the text: each token and the document's end.
    Under a limit the bytes are those of the average token.
    """
    nll = tokens = 0.0
    for batch in itertools.islice(batches, limit or None):
        batch_nll, batch_tokens = eval_step(model, feed(batch))
        nll, tokens = nll + float(batch_nll), tokens + float(batch_tokens)
    text_bytes = split["bytes"] * tokens / (split["tokens"] - split["documents"])
    return {"eval_loss": nll / tokens, "bits_per_byte": nll / math.log(2) / text_bytes}
