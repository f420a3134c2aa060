"""SentencePiece BPE that gives back every string exactly, and lets no text make a mark.

    tokenizer = train(texts, vocab_size=4096, directory="runs/x/data/tokenizer")
    tokenizer.decode(tokenizer.encode("line one\n\tline two")) == "line one\n\tline two"

Ids 0-3 are the marks unk, bos, eos, pad; 4 is the newline, 5-260 are the bytes.
"""

import codecs
import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from core.config import UserError

FILE = "tokenizer.model"
UNK, BOS, EOS, PAD = range(4)
# SentencePiece writes a space as U+2581 and so reads U+2581 back as a space. We keep the two
# apart: U+2581 is written DLE 1, and DLE itself DLE 0. Both ways are exact for every string.
SPACE, ESCAPE = "\u2581", "\x10"
_ESCAPED = {ESCAPE + "0": ESCAPE, ESCAPE + "1": SPACE}


class Tokenizer:
    """Text to int32 ids and back. `fingerprint` is the same whenever the pieces are the same."""

    bos, eos, pad = BOS, EOS, PAD

    def __init__(self, model: bytes):
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._model.vocab_size()
        pieces = [self._model.id_to_piece(i) for i in range(self.vocab_size)]
        self.fingerprint = hashlib.sha256("\0".join(pieces).encode()).hexdigest()
        self._newline = self._model.piece_to_id("\n")
        self._bytes = [self._piece_bytes(i, piece) for i, piece in enumerate(pieces)]

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Tokenizer":
        """The tokenizer that `train` wrote. UserError when there is none or it is damaged."""
        path = Path(directory, FILE)
        if not path.is_file():
            raise UserError(f"there is no tokenizer at {path}; run python -m data.prepare first")
        try:
            return cls(path.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model: {error}") from None

    def encode(self, text: str) -> np.ndarray:
        """int32 [T], without marks."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int32 [T] for each text; quicker than one by one.

        Works line by line, each different line once: no piece crosses a newline, so the ids are
        those of the whole text, and short lines are quicker. UserError on half a surrogate pair.
        """
        lines = [escape(text).split("\n") for text in texts]
        distinct = list(dict.fromkeys(line for each in lines for line in each))
        try:
            "".join(distinct).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"a text to encode is not Unicode: {error}") from None
        ids = dict(zip(distinct, self._model.encode(distinct), strict=True))
        return [self._join([ids[line] for line in each]) for each in lines]

    def _join(self, lines: list[list[int]]) -> np.ndarray:
        joined = [i for line in lines for i in (*line, self._newline)]
        return np.array(joined[:-1], np.int32)

    def to_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 of the ids, still escaped; marks give nothing."""
        ids = [int(i) for i in ids]
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise UserError(f"token {wrong[0]} is not in the vocabulary of {self.vocab_size}")
        return b"".join(self._bytes[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD, marks disappear."""
        return unescape(self.to_bytes(ids).decode("utf-8", "replace"))

    def _piece_bytes(self, i: int, piece: str) -> bytes:
        if i in (UNK, BOS, EOS, PAD) or self._model.is_control(i):
            return b""
        if self._model.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # <0xAB>
        return piece.replace(SPACE, " ").encode()


class Stream:
    """Decodes token by token: what `push` and `flush` return adds up to `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds half characters
        self._held = ""  # an ESCAPE whose second half is still to come

    def push(self, token: int) -> str:
        """The text that this token completes, often empty; never half a character."""
        return self._emit(self._decoder.decode(self._tokenizer.to_bytes([token])))

    def flush(self) -> str:
        """What was held back: U+FFFD for a character that never came to its end."""
        return self._emit(self._decoder.decode(b"", final=True)) + self._held

    def _emit(self, text: str) -> str:
        text = self._held + text
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


def train(texts: Iterable[str], vocab_size: int, directory: str | os.PathLike) -> Tokenizer:
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
            max_sentence_length=2**30,  # longer ones would be dropped
            num_threads=1,  # BPE is the same for any number, but the file records it
            minloglevel=3,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from None
    Path(directory).mkdir(parents=True, exist_ok=True)
    Path(directory, FILE).write_bytes(model.getvalue())
    return Tokenizer(model.getvalue())


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
