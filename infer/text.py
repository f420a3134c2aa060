"""Text in and text out: prompts from files, and the text of a row as its tokens come."""

import dataclasses
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.config import UserError
from core.storage import json_lines
from data.tokenizer.base import Tokenizer, overlap


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The start of a row. Text starts with bos, if the tokenizer has one."""

    text: str | None  # None when token ids were given
    tokens: np.ndarray  # int32 [T], bos included
    where: str = ""  # what errors name
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # others of its line


def read(path: str, field: str, tokenizer: Tokenizer | None, vocab_size: int) -> list[Prompt]:
    """The prompts of a .jsonl or a .txt (one a line, an empty line included), or of stdin (-).

    Stdin is .jsonl if it starts with a brace. In .jsonl blank lines are skipped. A byte order mark
    is left out, and lines may end as on Windows. `field` is what errors name.
    """
    is_json = path.lower().endswith(".jsonl")
    if path != "-":
        if not Path(path).is_file():
            raise UserError(f"{field}={path}: there is no such file")
        if not is_json and not path.lower().endswith(".txt"):
            raise UserError(f"{field}={path}: only .txt and .jsonl are understood, and - for stdin")
    try:
        content = _stdin(field) if path == "-" else _decode(Path(path).read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{field}={path} is not UTF-8: {error}; convert it") from None
    except OSError as error:
        raise UserError(f"{field}={path} cannot be read: {error.strerror}") from None
    if path == "-":
        is_json = content.lstrip().startswith("{")
    lines = content.removesuffix("\n").split("\n") if content else []
    if not is_json:
        prompts = [
            from_text(line, f"{field}={path} line {number}", tokenizer)
            for number, line in enumerate(lines, 1)
        ]
    else:
        prompts = [
            _from_json(line, f"{field}={path} line {number}", tokenizer, vocab_size)
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    if not prompts:
        raise UserError(f"{field}={path} is empty")
    return prompts


def _stdin(field: str) -> str:
    if sys.stdin is None:
        raise UserError(f"{field}=-, but stdin is closed: name a file")
    if isinstance(sys.stdin, io.TextIOWrapper):  # in UTF-8, whatever the locale says
        return _decode(sys.stdin.buffer.read())
    return sys.stdin.read()


def _decode(raw: bytes) -> str:
    """A text in UTF-8, with newlines alone at the ends of its lines."""
    return io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8-sig").read()


def from_text(text: str, where: str, tokenizer: Tokenizer | None) -> Prompt:
    """The prompt bos + text; `where` is what errors name."""
    if tokenizer is None:
        raise UserError(
            "the bundle has no tokenizer, so it takes no text: "
            'give a .jsonl whose lines are {"tokens": [...]}'
        )
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    tokens = np.concatenate([bos, tokenizer.encode(text)]).astype(np.int32)
    if not tokens.size:
        raise UserError(
            f"{where} is an empty text, and texts of this tokenizer begin with no mark, so the "
            "model has nothing to read: give at least one character"
        )
    return Prompt(text, tokens, where)


def _from_json(line: str, where: str, tokenizer: Tokenizer | None, vocab_size: int) -> Prompt:
    try:
        row = json_lines.parse(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}".replace(": it is", " is", 1)) from None
    if isinstance(row, dict):  # null is as good as nothing
        row = {name: value for name, value in row.items() if value is not None}
    if not isinstance(row, dict) or ("text" in row) == ("tokens" in row):
        raise UserError(f'{where} must be {{"text": ...}} or {{"tokens": [...]}}')
    if "text" in row:
        if not isinstance(row["text"], str):
            raise UserError(f"{where}: text is {type(row['text']).__name__}, not a string")
        prompt = from_text(row["text"], where, tokenizer)
    else:
        prompt = _from_tokens(row["tokens"], where, vocab_size)
    settings = {name: value for name, value in row.items() if name not in ("text", "tokens")}
    return dataclasses.replace(prompt, settings=settings)


def _from_tokens(tokens: Any, where: str, vocab_size: int) -> Prompt:
    no_id = (
        [token for token in tokens if type(token) is not int] if isinstance(tokens, list) else []
    )
    if not isinstance(tokens, list) or no_id:
        such = f", and {repr(no_id[0])[:40]} is {type(no_id[0]).__name__}" if no_id else ""
        raise UserError(f"{where}: tokens must be a list of integers{such}")
    if not tokens:
        raise UserError(f"{where}: tokens is empty; give at least one")
    wrong = [token for token in tokens if not 0 <= token < vocab_size]
    if wrong:
        raise UserError(f"{where}: token {wrong[0]} is not in the vocabulary of {vocab_size}")
    return Prompt(None, np.array(tokens, np.int32), where)


class Detokenizer:
    """The text of one row. No part of a stop string that ends it is ever given out.

    A text that may be the start of a stop string is held back until that is known.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], after: Sequence[int] = ()):
        """`after`: the tokens that the row continues.

        A space may depend on them, and they may end within a character.
        """
        self._stream, self._stop = tokenizer.stream(after), stop
        self._held, self._shown = "", []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """Returns the text to show after this token; `stopped` tells of a complete stop string."""
        return self._show(self._stream.push(token))

    def flush(self) -> str:
        """Returns the text held back; the row has ended without a stop string."""
        shown = self._show(self._stream.flush())
        rest, self._held = ("" if self.stopped else self._held), ""
        self._shown.append(rest)
        return shown + rest

    def _show(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        # The first stop string to be complete counts, however the text was cut into tokens.
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, shown, self._held = True, text[: min(found)[1]], ""
        else:
            hold = max((overlap(text, stop) for stop in self._stop), default=0)
            shown, self._held = text[: len(text) - hold], text[len(text) - hold :]
        self._shown.append(shown)
        return shown
