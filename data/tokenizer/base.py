"""Interface of all tokenizers: text to ids without marks, ids to text, whole or as they come.

ids = tokenizer.encode("a text")                  # int32 [T]; "<s>" in a text is text
ids = tokenizer.encode("<s>a text", special=True)  # unless asked
stream = tokenizer.stream()
"".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
"""

import abc
import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

import numpy as np

from core.config import UserError


class Stream(abc.ABC):
    """Decodes token by token: what it returns adds up to `decode` of all ids.

    After a prompt it returns what the text of both has beyond that of the prompt, and the
    character that the prompt leaves unfinished if these tokens complete it:

        prompt  61 e2 82      "a", and U+FFFD for half a character
        new     ac 62         the euro sign and "b"
        or new  62            "b"
    """

    @abc.abstractmethod
    def push(self, token: int) -> str:
        """The text that this token completes, often empty; never half a character."""

    @abc.abstractmethod
    def skip(self, tokens: Iterable[int]) -> Self:
        """Takes a prompt, before all other tokens, and returns the stream."""

    @abc.abstractmethod
    def flush(self) -> str:
        """Returns what was held back: U+FFFD for a character that never came to its end."""


class Utf8:
    """Reads bytes that come in parts as UTF-8, whose errors become U+FFFD."""

    def __init__(self):
        self._reader = codecs.getincrementaldecoder("utf-8")("replace")
        self._half = b""  # of a character, from the prompt, as long as it lacks its end

    def read(self, raw: bytes, final: bool = False) -> str:
        """Returns the characters that `raw` completes; `final`: no byte follows."""
        text = self._reader.decode(raw, final)
        if self._half:
            self._half += raw
            if text:
                is_broken = text[0] == "\ufffd" and not self._half.startswith(b"\xef\xbf\xbd")
                self._half = b""
                return text[is_broken:]  # the text of the prompt has that U+FFFD
        return text

    def settle(self) -> None:
        """Ends the prompt."""
        self._half, _ = self._reader.getstate()


class Tokenizer(abc.ABC):
    """Text to int32 ids and back. `fingerprint` is the same whenever texts and marks are."""

    vocab_size: int  # ids go below it
    fingerprint: str  # sha256
    bos: int | None  # None: texts do not start with one
    eos: tuple[int, ...]  # any of them ends a text; the first stands between documents
    pad: int | None

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """int32 [T] without marks, but with those that `text` spells if `special`."""
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        """One int32 [T] for each text; quicker than one by one.

        UserError on half a surrogate pair.
        """
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"a text to encode is not Unicode: {error}") from None
        return [np.array(ids, np.int32) for ids in self._encode(texts, special)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD, marks disappear."""
        return self._decode(checked(ids, self.vocab_size))

    @abc.abstractmethod
    def stream(self, after: Iterable[int] = ()) -> Stream:
        """Decodes tokens that come one by one, to continue the text of the ids `after`."""

    @abc.abstractmethod
    def _encode(self, texts: Sequence[str], special: bool) -> list[Sequence[int]]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


def checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` as a list; UserError on one that is not in the vocabulary."""
    ids = [int(i) for i in ids]
    wrong = [i for i in ids if not 0 <= i < vocab_size]
    if wrong:
        raise UserError(f"token {wrong[0]} is not in the vocabulary of {vocab_size}")
    return ids


def overlap(text: str, pattern: str) -> int:
    """Returns the length of the longest end of `text` that `pattern` starts with, but is not."""
    longest = min(len(text), len(pattern) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(pattern[:n])), 0)


def encode_around(
    texts: Sequence[str],
    tokens: Mapping[str, int],
    encode: Callable[[list[str]], list[list[int]]],
    encode_rest: Callable[[list[str]], list[list[int]]] | None = None,
) -> list[list[int]]:
    """The ids of texts in which each of `tokens` is its id and `encode` makes the rest.

    `encode_rest` takes what is not the first stretch of a text. Of two tokens that begin at
    one place the longer counts.
    """
    if not tokens:
        return encode(list(texts))
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    cut = [[part for part in pattern.split(text) if part] for text in texts]
    first, rest = [], []
    for parts in cut:
        stretches = [part for part in parts if part not in tokens]
        first += stretches[:1]
        rest += stretches[1:]
    found = iter(encode(first)), iter((encode_rest or encode)(rest))
    return [_joined(parts, tokens, *found) for parts in cut]


def _joined(parts, tokens, first, rest) -> list[int]:
    ids, source = [], first
    for part in parts:
        if part in tokens:
            ids.append(tokens[part])
        else:
            ids += next(source)
            source = rest
    return ids
