"""An even sample of a stream of text, of a bounded size, without knowing the whole.

sample = Sample(max_bytes=16_000_000)
for text in texts:
    sample.add(text)
train(sample.texts(), ...)
"""

import hashlib
import heapq
from collections.abc import Iterator

UNIT = 16384  # characters: small beside the sample, large beside a word


class TextSample:
    """Keeps the pieces of text whose hashes are smallest: the same for any order of the texts."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._heap = []  # (minus the hash, piece as UTF-8): the largest hash is on top

    def add(self, text: str) -> None:
        """Offers a text; pieces of it or of earlier ones go as soon as there is too much."""
        for start in range(0, len(text), UNIT):
            piece = text[start : start + UNIT].encode()
            key = -int.from_bytes(hashlib.sha256(piece).digest()[:8], "big")
            heapq.heappush(self._heap, (key, piece))
            self.num_bytes += len(piece)
            # One piece stays, however small the limit, so that there is something to learn from.
            while self.num_bytes > self.max_bytes and len(self._heap) > 1:
                self.num_bytes -= len(heapq.heappop(self._heap)[1])

    def texts(self) -> Iterator[str]:
        """The pieces kept, in the order of their hashes."""
        return (piece.decode() for _, piece in sorted(self._heap, reverse=True))
