"""Decodes a tokenizer.json's tokens one by one, as its library decodes a whole list of them.

    decoder = Decoder(json.loads(content)["decoder"])
    stream = decoder.stream(spellings)  # spellings[i] is the token of id i, None if it says nothing

The library's decoder is a sequence of steps. Here each step takes a piece of text, gives out what
no later token can change, and keeps the rest:

    tokens        U+2581 a   <0xE2>  <0x82>  |  <0xAC>   b       | is where a prompt may end
    Replace       space  a
    ByteFallback         a   kept    kept       kept     euro sign, b
    Fuse, Strip          a                               euro sign, b

No step looks back at tokens it has seen, so a token costs the same however long the text is.
"""

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import tokenizers
from tokenizers import models

from core.config import UserError
from data.tokenizer.base import Stream, Utf8, checked, overlap

# These steps change every token on its own, and the first one perhaps in another way.
_TOKENWISE = ("Replace", "Metaspace", "WordPiece", "Strip")
CACHED = 1 << 18  # pieces whose text is remembered: a vocabulary
# The library reads two digits with a parser that takes a plus sign for one.
_BYTE = re.compile(r"<0x([+0-9A-Fa-f][0-9A-Fa-f])>")


class Step:
    """A step that changes nothing."""

    def push(self, pieces: list[str]) -> list[str]:
        """Returns the pieces that are certain after these."""
        return pieces

    def settle(self) -> list[str]:
        """Ends the prompt. Returns the complete characters that the step keeps."""
        return []

    def flush(self) -> list[str]:
        """Returns what the step keeps: there is no further piece."""
        return []


class Tokenwise(Step):
    """Changes each piece by a function; the first piece of a text by another."""

    def __init__(self, first: Callable[[str], str], later: Callable[[str], str]):
        self._first, self._later, self._begun = first, later, False

    def push(self, pieces: list[str]) -> list[str]:
        changed = [self._later(piece) for piece in pieces]
        if pieces and not self._begun:
            self._begun = True
            changed[0] = self._first(pieces[0])
        return changed


class WordEnds(Step):
    """BPEDecoder: the mark for the end of a word is a space, but nothing in the last token."""

    def __init__(self, suffix: str):
        self._suffix, self._kept = suffix, ""

    def push(self, pieces: list[str]) -> list[str]:
        changed = []
        for piece in pieces:
            head, mark, tail = piece.partition(self._suffix)
            changed.append(self._kept.replace(self._suffix, " ") + head)
            self._kept = mark + tail
        return changed

    def flush(self) -> list[str]:
        return [self._kept.replace(self._suffix, "")]


class ByteFallback(Step):
    """Joins runs of byte tokens such as <0xE2>.

    A run is text if all of it is UTF-8. Otherwise each of its bytes is U+FFFD, also those that
    are characters. So a run is kept until it ends or until it cannot become UTF-8 any more.
    """

    def __init__(self):
        self._begin()

    def _begin(self) -> None:
        self._run, self._broken = bytearray(), False
        self._prompt = 0  # bytes of the prompt
        self._settled = 0  # bytes of its complete characters
        self._reader = codecs.getincrementaldecoder("utf-8")("strict")

    def push(self, pieces: list[str]) -> list[str]:
        changed = []
        for piece in pieces:
            byte = _byte(piece)
            if byte is None:
                changed += [*self.flush(), piece]
            elif self._broken:
                changed.append("\ufffd")
            else:
                self._run += byte
                try:
                    self._reader.decode(byte)
                except UnicodeDecodeError:
                    self._broken = True
                    changed.append("\ufffd" * (len(self._run) - self._prompt))
        return changed

    def settle(self) -> list[str]:
        self._prompt, self._settled = len(self._run), len(self._run) - self._unfinished
        return [self._run[: self._settled].decode()] if self._run and not self._broken else []

    def flush(self) -> list[str]:
        if not self._run:
            return []
        run, prompt, settled = self._run, self._prompt, self._settled
        broken, unfinished = self._broken, self._unfinished
        self._begin()
        if broken:  # which was shown
            return []
        return ["\ufffd" * (len(run) - prompt) if unfinished else run[settled:].decode()]

    @property
    def _unfinished(self) -> int:
        """Bytes of a character at the end of the run that lacks some."""
        return len(self._reader.getstate()[0])


class ByteLevel(Step):
    """Reads each character as a byte, and the bytes of all tokens as UTF-8."""

    def __init__(self):
        self._utf8 = Utf8()

    def push(self, pieces: list[str]) -> list[str]:
        return [self._utf8.read(b"".join(map(_spelled_bytes, pieces)))]

    def settle(self) -> list[str]:
        self._utf8.settle()
        return []

    def flush(self) -> list[str]:
        return [self._utf8.read(b"", final=True)]


class Substitute(Step):
    """Replaces a string in the whole text; keeps an end that may be the start of the string."""

    def __init__(self, old: str, new: str):
        self._old, self._new, self._kept = old, new, ""
        self._shown = 0  # characters of what is kept that the text of the prompt has

    def push(self, pieces: list[str]) -> list[str]:
        *whole, rest = "".join([self._kept, *pieces]).split(self._old)
        keep = overlap(rest, self._old)
        self._kept = rest[len(rest) - keep :]
        parts = [*whole, rest[: len(rest) - keep]]
        shown = min(self._shown, len(parts[0]))
        parts[0] = parts[0][shown:]
        self._shown = 0 if whole else self._shown - shown
        return [self._new.join(parts)]

    def settle(self) -> list[str]:
        self._shown = len(self._kept)
        return []

    def flush(self) -> list[str]:
        return [self._kept[self._shown :]]


class Strip(Step):
    """Takes at most `start` and `stop` characters off the ends of the whole text."""

    def __init__(self, char: str, start: int, stop: int):
        self._char, self._start, self._stop, self._kept = char, start, stop, ""

    def push(self, pieces: list[str]) -> list[str]:
        text = "".join(pieces)
        while self._start and text:
            if text[0] != self._char:
                self._start = 0
            else:
                text, self._start = text[1:], self._start - 1
        text = self._kept + text
        # Spaces at the end go only if the text ends with them.
        keep = min(len(text) - len(text.rstrip(self._char)), self._stop)
        self._kept = text[len(text) - keep :]
        return [text[: len(text) - keep]]


class Steps(Stream):
    """The steps one after the other."""

    def __init__(self, spellings: Sequence[str | None], steps: Sequence[Step]):
        self._spellings, self._steps = spellings, steps

    def push(self, token: int) -> str:
        return self.take([token])

    def skip(self, tokens: Iterable[int]) -> Self:
        self.take(tokens)
        for i, step in enumerate(self._steps, 1):
            self._through(step.settle(), i)
        return self

    def take(self, tokens: Iterable[int]) -> str:
        """Returns the text that these tokens complete."""
        spelled = [self._spellings[i] for i in checked(tokens, len(self._spellings))]
        return self._through([piece for piece in spelled if piece is not None], 0)

    def flush(self) -> str:
        ends = [self._through(step.flush(), i) for i, step in enumerate(self._steps, 1)]
        return "".join(ends)

    def _through(self, pieces: list[str], start: int) -> str:
        for step in self._steps[start:]:
            if pieces:
                pieces = step.push(pieces)
        return "".join(pieces)


class Decoder:
    """The rules of a decoder, read once. UserError when it has one that is not known here."""

    def __init__(self, rules: dict[str, Any] | None):
        rules = _flat(rules)
        self.is_byte_level = any(rule["type"] == "ByteLevel" for rule in rules)
        fused = False
        self._makers = [lambda: Tokenwise(str, " {}".format)] if not rules else []
        for rule in rules:
            self._makers.append(_maker(rule, fused))
            fused = fused or rule["type"] in ("Fuse", "ByteLevel")

    def stream(self, spellings: Sequence[str | None]) -> Steps:
        """Decodes ids that come one by one; `spellings` has the token of each id."""
        return Steps(spellings, [make() for make in self._makers])


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary stands for.

    GPT-2 keeps the printable bytes of Latin-1 and numbers all others from U+0100 on.
    """
    others = iter(range(256, 512))
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


@functools.lru_cache(CACHED)
def _spelled_bytes(piece: str) -> bytes:
    """The bytes of a byte-level token; an added token may be text of other characters."""
    alphabet = byte_alphabet()
    known = all(char in alphabet for char in piece)
    return bytes(alphabet[char] for char in piece) if known else piece.encode()


@functools.lru_cache(CACHED)
def _byte(piece: str) -> bytes | None:
    """The byte of a byte token, None for others."""
    match = _BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else None


def _flat(rules: dict[str, Any] | None) -> list[dict[str, Any]]:
    if rules is None:
        return []
    if rules["type"] == "Sequence":
        return [each for inner in rules["decoders"] for each in _flat(inner)]
    return [rules]


def _maker(rule: dict[str, Any], fused: bool) -> Callable[[], Step]:
    """Makes a step. Once tokens are `fused` the text is one piece that comes in parts."""
    kind = rule["type"]
    if kind == "Fuse":
        return Step
    if kind == "Strip" and fused:
        return functools.partial(Strip, rule["content"], rule["start"], rule["stop"])
    if kind == "Replace" and fused and rule["pattern"].get("String"):
        return functools.partial(Substitute, rule["pattern"]["String"], rule["content"])
    if kind in _TOKENWISE and not fused:
        return functools.partial(Tokenwise, *_functions(rule))
    if kind == "BPEDecoder" and not fused and rule["suffix"]:
        return functools.partial(WordEnds, rule["suffix"])
    if kind == "ByteFallback" and not fused:
        return ByteFallback
    if kind == "ByteLevel" and not fused:
        return ByteLevel
    where = " on the whole text" if fused else ""
    raise UserError(f"its decoder has the step {json.dumps(rule)}{where}, which is not supported")


def _functions(rule: dict[str, Any]) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Returns the library's step for the first token of a text, and for all others."""
    model = tokenizers.Tokenizer(models.BPE())
    empty = json.loads(model.to_str())
    step = tokenizers.Tokenizer.from_str(json.dumps(empty | {"decoder": rule})).decoder

    @functools.lru_cache(CACHED)
    def first(piece: str) -> str:
        return step.decode([piece])

    @functools.lru_cache(CACHED)
    def later(piece: str) -> str:
        # No step gives the last token another text than one before it.
        return step.decode(["x", piece])[len(first("x")) :]

    return first, later
