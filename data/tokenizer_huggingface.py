"""A `tokenizer.json`, read by the `tokenizers` library: Llama 3, GPT-2, Falcon, Qwen, Gemma.

Special are the added tokens that the file calls so; their spelling in a text stays text.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import tokenizers

from core import tokenizer_files
from core.config import UserError
from core.tokenizer_files import Marks
from data.tokenizer_base import Stream, Tokenizer, checked

CONTEXT = 16  # tokens before a stream that decide how it begins: one that is not a mark would do
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class HuggingFace(Tokenizer):
    """The rules and the vocabulary of a tokenizer.json."""

    def __init__(self, content: bytes, marks: Marks):
        self._content = content
        rules = json.loads(content)
        self.bos, self.eos, self.pad = marks
        self._plain = self._build(spelled=True)
        vocabulary = self._plain.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = _fingerprint(rules, marks)
        special = {t["content"]: t["id"] for t in rules["added_tokens"] if t["special"]}
        self._special = frozenset(special.values())
        # Unknown characters may make the token for them. Nothing else in text makes a special one.
        unknown = rules["model"].get("unk_token")
        self._forged = {i: content for content, i in special.items() if content != unknown}
        falls_back = '"ByteFallback"' in json.dumps(rules.get("decoder"))
        self._bytes = frozenset(
            i for token, i in vocabulary.items() if falls_back and _BYTE.fullmatch(token)
        )

    def _build(self, spelled: bool) -> tokenizers.Tokenizer:
        model = tokenizers.Tokenizer.from_str(self._content.decode())
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = spelled
        return model

    @functools.cached_property
    def _marking(self) -> tokenizers.Tokenizer:
        """The same with special tokens read from text; few ask for it."""
        return self._build(spelled=False)

    def stream(self, after: Iterable[int] = ()) -> Stream:
        before = [i for i in checked(after, self.vocab_size) if i not in self._special]
        return WindowStream(self, before[-CONTEXT:])

    def _encode(self, texts: Sequence[str], special: bool) -> list[Sequence[int]]:
        model = self._marking if special else self._plain
        found = model.encode_batch_fast(list(texts), add_special_tokens=False)
        if special:
            return [each.ids for each in found]
        return [self._spelled(each.ids) for each in found]

    def _decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids, skip_special_tokens=True)

    def _spelled(self, ids: list[int]) -> list[int]:
        """`ids` with special tokens taken apart: a model may have made one of its characters."""
        if self._forged.keys().isdisjoint(ids):
            return ids
        return [j for i in ids for j in (self._letters(i) if i in self._forged else (i,))]

    def _letters(self, i: int) -> list[int]:
        content = self._forged[i]
        ids = [token.id for char in content for token in self._plain.model.tokenize(char)]
        if not self._special.isdisjoint(ids) or content not in self._decode(ids):
            raise UserError(
                f"the tokenizer has no way to write {content!r}, which stands in a text, but as "
                "the special token: take it out of the text"
            )
        return ids


class WindowStream(Stream):
    """Shows what the tokens since the last text add to the text before, once it is whole.

    Decoding is not token by token: the space at the start of a text goes, and the bytes of a run
    of byte tokens stand or fall together. So a window begins one text earlier, and a run is held
    until it ends.
    """

    def __init__(self, tokenizer: HuggingFace, before: list[int]):
        self._tokenizer = tokenizer
        self._shown, self._new = before, []
        # Half a character before the first token is made whole by it.
        self._before = self._decode(before).rstrip("\ufffd")

    @property
    def _decode(self) -> Callable[[list[int]], str]:
        return self._tokenizer._decode

    def push(self, token: int) -> str:
        (token,) = checked([token], self._tokenizer.vocab_size)
        if token in self._tokenizer._special:
            return ""
        self._new.append(token)
        if token in self._tokenizer._bytes:
            return ""
        text = self._decode(self._shown + self._new)
        if text.endswith("\ufffd") or len(text) == len(self._before):
            return ""
        shown = text[len(self._before) :]
        self._shown, self._new = self._new, []
        self._before = self._decode(self._shown)
        return shown

    def flush(self) -> str:
        text = self._decode(self._shown + self._new)[len(self._before) :]
        self._new = []
        return text


def load(directory: Path) -> HuggingFace:
    """The tokenizer.json in `directory`; UserError when it is damaged."""
    path = directory / tokenizer_files.JSON
    marks = tokenizer_files.marks(directory)
    try:
        return HuggingFace(path.read_bytes(), marks)
    except UserError:
        raise
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path} cannot be read as a tokenizer: {error}; copy it again") from None


def _fingerprint(rules: dict, marks: Marks) -> str:
    """Of the file as data, less what has no effect here, and of the marks."""
    rules = {k: v for k, v in rules.items() if k not in ("version", "truncation", "padding")}
    content = json.dumps([rules, marks], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
