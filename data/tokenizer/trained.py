"""SentencePiece BPE that gives back every string exactly, and lets no text make a mark.

    tokenizer = train(texts, vocab_size=4096, directory="runs/x/data/tokenizer")
    tokenizer.decode(tokenizer.encode("line one\n\tline two")) == "line one\n\tline two"

Ids 0-3 are the marks unk, bos, eos, pad; 4 is the newline, 5-260 are the bytes.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import sentencepiece

from core.config import UserError
from core.tokenizer import tokenizer_files, tokenizer_model
from core.tokenizer.tokenizer_model import (
    BOS,
    EOS,
    ESCAPE,
    MAX_SENTENCE,
    PAD,
    SPACE,
    UNK,
    ModelProto,
)
from data.tokenizer.base import Stream, Tokenizer, encode_around
from data.tokenizer.byte_level import ByteStream, Surface, piece_bytes

_ESCAPED = {ESCAPE + "0": ESCAPE, ESCAPE + "1": SPACE}


class Trained(Tokenizer):
    """A model of `train`."""

    bos, eos, pad = BOS, (EOS,), PAD

    def __init__(self, proto: ModelProto):
        self._model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        self.vocab_size = len(proto.pieces)
        pieces = [piece.piece for piece in proto.pieces]
        self.fingerprint = hashlib.sha256("\0".join(pieces).encode()).hexdigest()
        self._newline = pieces.index("\n")
        self._marks = {pieces[i]: i for i in (BOS, EOS, PAD)}
        table = piece_bytes(proto)
        table[UNK] = b""  # bytes spell what no piece does
        self._surface = Surface(table)

    def stream(self, after: Iterable[int] = ()) -> Stream:
        return TrainedStream(ByteStream(self._surface)).skip(after)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 of the ids, still escaped; marks give nothing."""
        return self._surface.to_bytes(ids, begun=True)[0]

    def _decode(self, ids: list[int]) -> str:
        return unescape(self.to_bytes(ids).decode("utf-8", "replace"))

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return encode_around(texts, self._marks if special else {}, self._encode_lines)

    def _encode_lines(self, texts: list[str]) -> list[list[int]]:
        """Works line by line, each different line once.

        No piece crosses a newline, so the ids are those of the whole text, and short lines are
        quicker.
        """
        lines = [escape(text).split("\n") for text in texts]
        distinct = list(dict.fromkeys(line for each in lines for line in each))
        ids = dict(zip(distinct, self._model.encode(distinct), strict=True))
        return [self._join([ids[line] for line in each]) for each in lines]

    def _join(self, lines: list[list[int]]) -> list[int]:
        return [i for line in lines for i in (*line, self._newline)][:-1]


class TrainedStream(Stream):
    """Takes the escape back, half of which may be the end of a token."""

    def __init__(self, escaped: ByteStream):
        self._escaped = escaped
        self._held = ""  # an ESCAPE whose second half is still to come
        self._shown = 0  # characters of it that the text of the prompt has

    def push(self, token: int) -> str:
        return self._emit(self._escaped.push(token))

    def skip(self, tokens: Iterable[int]) -> Self:
        self._emit(self._escaped.take(tokens))
        self._escaped.skip(())
        self._shown = len(self._held)
        return self

    def flush(self) -> str:
        return self._emit(self._escaped.flush()) + self._held[self._shown :]

    def _emit(self, text: str) -> str:
        if not text:
            return ""
        if text[0] in "01":
            self._shown = 0  # the ESCAPE becomes another character
        text, self._shown = (self._held + text)[self._shown :], 0
        self._held = ESCAPE if text.endswith(ESCAPE) else ""
        return unescape(text.removesuffix(self._held))


def escape(text: str) -> str:
    """Text without SPACE, from which `unescape` gives back `text`, whatever it holds."""
    if ESCAPE not in text and SPACE not in text:
        return text
    return text.replace(ESCAPE, ESCAPE + "0").replace(SPACE, ESCAPE + "1")


def unescape(text: str) -> str:
    """The inverse of `escape`; an ESCAPE that stands alone stays as it is."""
    if ESCAPE not in text:
        return text
    return re.sub(ESCAPE + "[01]", lambda match: _ESCAPED[match[0]], text)


def train(texts: Iterable[str], vocab_size: int, directory: str | os.PathLike) -> Trained:
    """Learns `vocab_size` pieces and writes them to `directory`; same texts, same bytes.

    UserError when the texts do not support so many pieces or need more.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=map(escape, texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=UNK,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=PAD,
            max_sentence_length=MAX_SENTENCE,  # longer ones would be dropped
            num_threads=1,  # BPE is the same for any number, but the file records it
            minloglevel=3,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from None
    Path(directory).mkdir(parents=True, exist_ok=True)
    path = Path(directory, tokenizer_files.MODEL)
    path.write_bytes(model.getvalue())
    return Trained(tokenizer_model.read(path))


def _explain(message: str, vocab_size: int) -> str:
    # SentencePiece says what would fit: "... a value <= 317", or "262 vs 275".
    if match := re.search(r"value <= (\d+)", message):
        return (
            f"data.vocab_size={vocab_size} is more than the text supports: "
            f"set it to {match[1]} or less, or give more text"
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"data.vocab_size={vocab_size} is less than the characters of the text need: "
            f"set it to {match[1]} or more"
        )
    return f"the tokenizer cannot be trained (data.vocab_size={vocab_size}): {message}"
