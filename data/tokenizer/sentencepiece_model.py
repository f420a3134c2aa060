"""A SentencePiece `tokenizer.model` of others: LLaMA 1 and 2, Mistral, Gemma.

Normaliser and leading space are the model's own. Control symbols never come from text; symbols
that a model matches in text (Gemma: <start_of_turn>) do neither if they are marks.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from core.config import UserError
from core.tokenizer import tokenizer_files, tokenizer_model, tokenizer_special
from core.tokenizer.tokenizer_model import CONTROL, SPACE, UNKNOWN, ModelProto
from core.tokenizer.tokenizer_special import Added, Marks, is_mark
from data.tokenizer.base import Stream, Tokenizer, encode_around
from data.tokenizer.byte_level import ByteStream, Surface, piece_bytes


class SentencePiece(Tokenizer):
    """A model as its authors trained it, with the tokens that files beside it add.

    Its special pieces are control symbols.
    """

    def __init__(self, model: ModelProto, added: dict[str, Added], marks: Marks):
        self.bos, self.eos, self.pad = marks
        size = len(model.pieces)
        beyond = {content: token for content, token in added.items() if token.id >= size}
        self.vocab_size = 1 + max([size - 1, *(token.id for token in beyond.values())])
        self.fingerprint = _fingerprint(model, beyond, marks)

        special = {content: t.id for content, t in beyond.items() if is_mark(content, added)}
        self._always = {c: t.id for c, t in beyond.items() if c not in special}
        controls = {p.piece: i for i, p in enumerate(model.pieces) if p.type == CONTROL}
        self._asked = controls | special | self._always
        self._surface = _surface(model, self._always, self.vocab_size)
        self._first = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        self._rest = self._first
        if model.normalizer_spec.add_dummy_prefix:
            # After a mark a text goes on, so it gets no second leading space.
            model.normalizer_spec.add_dummy_prefix = False
            self._rest = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def stream(self, after: Iterable[int] = ()) -> Stream:
        return ByteStream(self._surface).skip(after)

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        tokens = self._asked if special else self._always
        return encode_around(texts, tokens, self._first.encode, self._rest.encode)

    def _decode(self, ids: list[int]) -> str:
        return self._surface.to_bytes(ids, begun=False)[0].decode("utf-8", "replace")


def load(directory: Path) -> SentencePiece:
    """The tokenizer.model in `directory`; UserError when it is damaged."""
    path = directory / tokenizer_files.MODEL
    model = tokenizer_model.read(path)
    try:
        marks = tokenizer_files.marks(directory)
        with tokenizer_files.shaped(directory):
            model = tokenizer_special.in_model(model, directory, marks)
            added = tokenizer_special.added_tokens(directory, marks)
        return SentencePiece(model, added, marks)
    except RuntimeError as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from None


def _surface(model: ModelProto, always: dict[str, int], vocab_size: int) -> Surface:
    table = piece_bytes(model)
    for i, piece in enumerate(model.pieces):
        if piece.type == UNKNOWN:
            table[i] = model.trainer_spec.unk_surface.encode()
    table += [b""] * (vocab_size - len(table))
    for content, i in always.items():
        table[i] = content.encode()
    normal = model.normalizer_spec
    opens = frozenset(
        i
        for i, piece in enumerate(model.pieces)
        if piece.piece.startswith(SPACE) and table[i].startswith(b" ")
    )
    hides = normal.add_dummy_prefix or normal.remove_extra_whitespaces
    return Surface(table, opens if hides else frozenset(), normal.remove_extra_whitespaces)


def _fingerprint(model: ModelProto, beyond: dict[str, Added], marks: Marks) -> str:
    """Returns a digest of all that decides the ids of a text; how it was trained is left out."""
    spec = model.trainer_spec
    parts = [
        [(piece.piece, piece.score, piece.type) for piece in model.pieces],
        model.normalizer_spec.SerializeToString(deterministic=True).hex(),
        [spec.model_type, spec.byte_fallback, spec.unk_surface],
        sorted(beyond.items()),
        marks,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
