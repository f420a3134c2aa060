"""A SentencePiece `tokenizer.model` of others: LLaMA 1 and 2, Mistral, Gemma.

Normaliser and leading space are the model's own. Control symbols never come from text; symbols
that a model matches in text (Gemma: <start_of_turn>) do neither if they are marks.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from core import tokenizer_files, tokenizer_model
from core.config import UserError
from core.tokenizer_files import Added, Marks
from core.tokenizer_model import CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, ModelProto
from data.tokenizer_base import Stream, Tokenizer, encode_around
from data.tokenizer_bytes import ByteStream, Surface, piece_bytes

# What looks like a mark is one, <unused0> and [INST] alike, but for the tags of HTML that models
# of web pages have among their symbols. <s> is not in the list: it is a mark in most models.
_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_HTML = re.compile(
    r"</?(a|b|big|blockquote|body|br|caption|code|dd|del|div|dl|dt|em|h[1-6]|head|hr|html|i|img|"
    r"ins|kbd|li|ol|p|pre|small|span|strong|sub|sup|table|tbody|td|tfoot|th|thead|tr|tt|u|ul)>"
)


class SentencePiece(Tokenizer):
    """A model as its authors trained it, with the tokens that files beside it add."""

    def __init__(self, model: ModelProto, added: dict[str, Added], marks: Marks):
        if model.denormalizer_spec.precompiled_charsmap:
            raise UserError("it has a denormaliser, which is not supported")
        if model.trainer_spec.treat_whitespace_as_suffix:
            raise UserError("it writes spaces after words, which is not supported")
        self.bos, self.eos, self.pad = marks
        model = _with_marks(model, added)
        size = len(model.pieces)
        beyond = {content: token for content, token in added.items() if token.id >= size}
        self.vocab_size = 1 + max([size - 1, *(token.id for token in beyond.values())])
        self.fingerprint = _fingerprint(model, beyond, marks)

        special = {content: t.id for content, t in beyond.items() if _is_mark(content, t)}
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
        return ByteStream(self._surface, self._surface.to_bytes(after, begun=False)[1])

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
        added = tokenizer_files.added_tokens(directory)
        return SentencePiece(model, added, tokenizer_files.marks(directory))
    except RuntimeError as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _is_mark(piece: str, told: Added | None) -> bool:
    """What files beside the model say, else by its looks."""
    if told is not None and told.special is not None:
        return told.special
    return bool(_MARK.fullmatch(piece)) and not _HTML.fullmatch(piece)


def _with_marks(model: ModelProto, added: dict[str, Added]) -> ModelProto:
    """A copy whose marks are all control symbols: these never come from text."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for piece in copy.pieces:
        told = added.get(piece.piece)
        if piece.type == USER_DEFINED and _is_mark(piece.piece, told):
            piece.type = CONTROL
        elif piece.type == NORMAL and told is not None and told.special:
            piece.type = CONTROL  # the model may have learned it as a word, its users do not
    return copy


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
    """Of all that says which ids a text has; not of how the model was trained."""
    spec = model.trainer_spec
    parts = [
        [(piece.piece, piece.score, piece.type) for piece in model.pieces],
        model.normalizer_spec.SerializeToString(deterministic=True).hex(),
        [spec.model_type, spec.byte_fallback, spec.unk_surface],
        sorted(beyond.items()),
        marks,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
