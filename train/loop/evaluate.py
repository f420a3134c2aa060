"""Evaluation: mean loss and bits per byte on the validation split."""

import itertools
import math
from collections.abc import Iterable

from data.batch import Batch
from model.transformer import Transformer
from train.loop.feed import BatchSharder
from train.step import eval_step


def evaluate(
    model: Transformer,
    batches: Iterable[Batch],
    feed: BatchSharder,
    text_bytes: float,
    limit: int = 0,
) -> dict[str, float]:
    """Returns eval_loss (nats a token) and bits_per_byte, over all batches or the first `limit`.

    Bits per byte count everything needed to tell the text, each token and the document's end,
    over `text_bytes`, which are those of the same batches (`Validation.text_bytes`).
    """
    nll = tokens = 0.0
    for batch in itertools.islice(batches, limit or None):
        batch_nll, batch_tokens = eval_step(model, feed(batch))
        nll, tokens = nll + float(batch_nll), tokens + float(batch_tokens)
    return {"eval_loss": nll / tokens, "bits_per_byte": nll / math.log(2) / text_bytes}
