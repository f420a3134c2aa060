"""Text to hide needles in: files of the user, or the built-in filler.

haystack = read(("essays/*.txt",), "bench.haystack")
haystack.sentences(5000)  # of its first 5000 words
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from core.config import UserError
from data.texts import files
from evals.ruler import words

WORD = re.compile(r"\S{1,40}")  # what has no spaces is cut
SENTENCE_WORDS = 50  # what has no full stops is cut too


@dataclasses.dataclass(frozen=True)
class Haystack:
    """A text as words. `name` is what a report calls it."""

    name: str
    words: Sequence[str]

    def sentences(self, count: int) -> list[str]:
        """The first `count` words; a text that is too short starts anew, as RULER's essays."""
        times = -(-count // len(self.words))
        some = list(self.words[:count]) if times == 1 else (list(self.words) * times)[:count]
        found, begin = [], 0
        for end, word in enumerate(some, 1):
            ends = word.rstrip("\"')]").endswith((".", "!", "?"))
            if ends or end - begin == SENTENCE_WORDS or end == count:
                found.append(" ".join(some[begin:end]))
                begin = end
        return found

    @functools.cached_property
    def text(self) -> str:
        """All words, once."""
        return " ".join(self.words)


@functools.lru_cache(maxsize=8)
def _filler(count: int) -> Haystack:
    return Haystack("built-in filler", words.filler(count))


def builtin(length: int) -> Haystack:
    """Our own filler, of at least `length` words."""
    return _filler(max(1 << 12, 1 << (length - 1).bit_length()))


def read(globs: Iterable[str], field: str) -> Haystack:
    """The .txt files that the globs match, in order; `field` is what errors name."""
    globs = tuple(globs)
    paths = dict.fromkeys(path for pattern in globs for path in matches(pattern, field))
    found = [word for path in paths for word in WORD.findall(content(path, field))]
    if not found:
        raise UserError(f"{field}={globs} has no words: name .txt files with text in them")
    return Haystack(", ".join(globs), found)


def matches(pattern: str, field: str) -> list[Path]:
    """The .txt files that a glob matches, in order; UserError if there are none, or others."""
    found = files.matches((pattern,), field)
    wrong = [path for path in found if path.suffix.lower() != ".txt"]
    if wrong:
        raise UserError(f"{field}: {wrong[0]} is not a .txt; only those are understood")
    return found


def content(path: str | Path, field: str) -> str:
    """All of a file; UserError unless it is UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {path} is not UTF-8: {error}") from None
