"""Text of ids by a table of bytes: what the two kinds of SentencePiece models share."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from core.tokenizer.tokenizer_model import BYTE, CONTROL, SPACE, ModelProto
from data.tokenizer.base import Stream, Utf8, checked


class Surface(NamedTuple):
    """The bytes of each id. A model that writes a space before a text hides it again."""

    table: Sequence[bytes]  # b"" for marks
    opens: frozenset[int] = frozenset()  # pieces whose first space vanishes where a text begins
    all_spaces: bool = False  # whether not one but all of the spaces there vanish

    def to_bytes(self, ids: Iterable[int], begun: bool) -> tuple[bytes, bool]:
        """(UTF-8 of the ids, whether the text has begun), given whether it had before."""
        out = []
        for i in checked(ids, len(self.table)):
            raw = self.table[i]
            if not begun and i in self.opens:
                raw, begun = raw[1:], not self.all_spaces
            begun = begun or bool(raw)
            out.append(raw)
        return b"".join(out), begun


class ByteStream(Stream):
    """Holds back the bytes of half a character."""

    def __init__(self, surface: Surface):
        self._surface, self._begun = surface, False
        self._utf8 = Utf8()

    def push(self, token: int) -> str:
        return self.take([token])

    def skip(self, tokens: Iterable[int]) -> Self:
        self.take(tokens)
        self._utf8.settle()
        return self

    def take(self, tokens: Iterable[int]) -> str:
        """Returns the text that these tokens complete."""
        raw, self._begun = self._surface.to_bytes(tokens, self._begun)
        return self._utf8.read(raw)

    def flush(self) -> str:
        return self._utf8.read(b"", final=True)


def piece_bytes(model: ModelProto) -> list[bytes]:
    """The bytes of each piece."""
    return [_bytes(piece.piece, piece.type) for piece in model.pieces]


def _bytes(piece: str, kind: int) -> bytes:
    if kind == CONTROL:
        return b""
    if kind == BYTE:
        return bytes([int(piece[3:5], 16)])  # <0xAB>
    return piece.replace(SPACE, " ").encode()
