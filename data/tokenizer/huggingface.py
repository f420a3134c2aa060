"""A `tokenizer.json`, read by the `tokenizers` library: Llama 3, GPT-2, Falcon, Qwen, Gemma.

Special are the tokens that it or a file beside it calls so; their spelling in a text stays text.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from core.checkpoint import read_json
from core.config import UserError
from core.tokenizer import tokenizer_files, tokenizer_special
from core.tokenizer.tokenizer_model import SPACE
from core.tokenizer.tokenizer_special import Marks
from data.tokenizer.base import Stream, Tokenizer
from data.tokenizer.decoder import Decoder, byte_alphabet


class HuggingFace(Tokenizer):
    """The rules and the vocabulary of a tokenizer.json, in which special tokens are told."""

    def __init__(self, rules: dict[str, Any], marks: Marks):
        self._rules = rules
        self.bos, self.eos, self.pad = marks
        self._plain = self._build(spelled=True)
        vocabulary = self._plain.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = _fingerprint(rules, marks)
        special = {
            t["content"]: vocabulary[t["content"]] for t in rules["added_tokens"] if t["special"]
        }
        self._special = frozenset(special.values())
        # Unknown characters may make the token for them. Nothing else in text makes a special one.
        unknown = tokenizer_special.unknown_token(rules["model"])
        self._forged = {i: content for content, i in special.items() if content != unknown}
        self._unknown = special.get(unknown, -1), unknown or ""
        self._decoder = Decoder(rules.get("decoder"))
        self._spellings: list[str | None] = [None] * self.vocab_size  # None: it says nothing
        for content, i in vocabulary.items():
            self._spellings[i] = None if i in self._special else content

    def _build(self, spelled: bool) -> tokenizers.Tokenizer:
        model = tokenizers.Tokenizer.from_str(json.dumps(self._rules))
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = spelled
        return model

    @functools.cached_property
    def _marking(self) -> tokenizers.Tokenizer:
        """The same with special tokens read from text; few ask for it."""
        return self._build(spelled=False)

    def stream(self, after: Iterable[int] = ()) -> Stream:
        return self._decoder.stream(self._spellings).skip(after)

    def _encode(self, texts: Sequence[str], special: bool) -> list[Sequence[int]]:
        model = self._marking if special else self._plain
        found = model.encode_batch_fast(list(texts), add_special_tokens=False)
        if special:
            return [each.ids for each in found]
        return [self._spelled(text, each.ids) for text, each in zip(texts, found, strict=True)]

    def _decode(self, ids: list[int]) -> str:
        stream = self._decoder.stream(self._spellings)
        return stream.take(ids) + stream.flush()

    def _spelled(self, text: str, ids: list[int]) -> list[int]:
        """`ids` with special tokens taken apart: a model may have made one of its characters.

        UserError where the characters have no tokens of their own.
        """
        unknown, content = self._unknown
        spells_unknown = unknown in ids and content in self._normal(text)
        if not spells_unknown and self._forged.keys().isdisjoint(ids):
            return ids
        parts = [(i,) if i not in self._forged else self._letters(self._forged[i]) for i in ids]
        if None in parts:
            content = self._forged[ids[parts.index(None)]]
            raise UserError(
                f"the tokenizer has no way to write {content!r}, which stands in a text, but as "
                "the special token: take it out of the text"
            )
        if spells_unknown:  # not every token for unknown characters stands for some
            offsets = self._plain.encode(text, add_special_tokens=False).offsets
            for n, (start, end) in enumerate(offsets):
                spelled = self._normal(text[start:end]).strip(f" {SPACE}")
                if ids[n] == unknown and spelled == content:
                    parts[n] = self._letters(content) or (unknown,)
        return [i for part in parts for i in part]

    def _normal(self, text: str) -> str:
        rules = self._plain.normalizer
        return text if rules is None else rules.normalize_str(text)

    def _letters(self, content: str) -> list[int] | None:
        """The ids of the characters of a special token; None if they have none."""
        letters = content
        if self._decoder.is_byte_level:  # a vocabulary of bytes
            char_of = {byte: char for char, byte in byte_alphabet().items()}
            letters = [char_of[byte] for byte in content.encode()]
        ids = [token.id for char in letters for token in self._plain.model.tokenize(char)]
        whole = self._special.isdisjoint(ids) and content in self._decode(ids)
        return ids if whole else None


def load(directory: Path) -> HuggingFace:
    """The tokenizer.json in `directory`; UserError when it is damaged."""
    path = directory / tokenizer_files.JSON
    marks = tokenizer_files.marks(directory)
    with tokenizer_files.shaped(directory):
        tokenizer_special.named(directory)
    try:
        return HuggingFace(tokenizer_special.in_rules(read_json(path), directory, marks), marks)
    except UserError:
        raise
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path} cannot be read as a tokenizer: {error}; copy it again") from None


def _fingerprint(rules: dict, marks: Marks) -> str:
    """Returns a digest of the file as data, without what has no effect here, and of the marks."""
    rules = {k: v for k, v in rules.items() if k not in ("version", "truncation", "padding")}
    content = json.dumps([rules, marks], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
