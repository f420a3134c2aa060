"""Drops documents that cannot be used, and counts every one of them.

counts = Counter()
kept = list(curate(documents(config), counts))
counts["in"] == len(kept) + sum(counts[kind] for kind in REMOVED)
"""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

from data.texts.document import Document

REMOVED = ("empty", "binary", "undecodable", "duplicate")


@dataclasses.dataclass(frozen=True)
class Text:
    """A document that stays: its text, its length in bytes, and the sha256 of these bytes."""

    id: str
    text: str
    num_bytes: int
    digest: bytes

    @property
    def fraction(self) -> float:
        """A number in [0, 1) drawn from the text itself: it decides the split."""
        return int.from_bytes(self.digest[:6], "big") / 2**48

    def split(self, validation_fraction: float) -> str:
        """`validation` or `train`; equal texts always fall on the same side."""
        return "validation" if self.fraction < validation_fraction else "train"


def curate(found: Iterable[Document], counts: Counter) -> Iterator[Text]:
    """The documents that are UTF-8 text and not seen before; `counts` tells of the others.

    `counts` gains "in", "kept" and one number for each of REMOVED: empty (nothing but white
    space), binary (a NUL byte), undecodable (not UTF-8), duplicate (the same bytes as one before).
    """
    seen = set()
    for document in found:
        digest = hashlib.sha256(document.raw).digest()
        text = _decode(document.raw)
        reason = _reason(document.raw, text, digest in seen)
        counts["in"] += 1
        counts[reason or "kept"] += 1
        if not reason:
            seen.add(digest)
            yield Text(document.id, text, len(document.raw), digest)


def _decode(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _reason(raw: bytes, text: str | None, is_duplicate: bool) -> str:
    if b"\0" in raw:
        return "binary"
    if text is None:
        return "undecodable"
    if not text.strip():
        return "empty"
    return "duplicate" if is_duplicate else ""
