"""Special tokens of a tokenizer: no text makes them, and no output shows them.

    rules = in_rules(rules, directory, marks)  # a tokenizer.json whose flags say all of it
    model = in_model(model, directory, marks)  # a tokenizer.model with control symbols in place

A token is special if any file of the tokenizer says so: tokenizer.json, tokenizer_config.json,
special_tokens_map.json, or the ids of the marks, which generation_config.json and config.json
give. A mark that is an ordinary word would end a text wherever the word stands: it is refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from core.checkpoint import read_json
from core.config import UserError
from core.tokenizer import tokenizer_model
from core.tokenizer.tokenizer_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    ModelProto,
)

JSON, MODEL, ADDED = "tokenizer.json", "tokenizer.model", "added_tokens.json"
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
# What looks like a mark is one, <unused0> and [INST] alike, but for the tags of HTML that models
# of web pages have among their symbols. <s> is not in the list: it is a mark in most models.
_MARK = re.compile(rf"{SPACE}?(<[^<>\s]+>|\[[^\[\]\s]+\])")
_HTML = re.compile(
    r"</?(a|b|big|blockquote|body|br|caption|code|dd|del|div|dl|dt|em|h[1-6]|head|hr|html|i|img|"
    r"ins|kbd|li|ol|p|pre|small|span|strong|sub|sup|table|tbody|td|tfoot|th|thead|tr|tt|u|ul)>"
)
# The fields whose tokens transformers skips in output.
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
_DECODER = "added_tokens_decoder"
_MOST = 1 << 24  # tokens that a vocabulary may have; no model comes near it


class Marks(NamedTuple):
    """The ids of the marks."""

    bos: int | None  # None: prompts do not start with one
    eos: tuple[int, ...]  # any of them ends a text; the first stands between documents
    pad: int | None


class Added(NamedTuple):
    """A token that was added to a vocabulary."""

    id: int
    special: bool | None  # None: nothing says so


class Named(NamedTuple):
    """A place in a file that calls a token special."""

    place: str  # "tokenizer_config.json (eos_token)"
    counts: bool  # whether transformers reads this field; other fields only confirm added tokens


_NOWHERE = Named("", False)


def added_tokens(directory: Path, marks: Marks | None = None) -> dict[str, Added]:
    """Tokens that the files beside a tokenizer.model add to it, and which of them are special."""
    tokens = {content: Added(i, None) for content, i in optional(directory / ADDED).items()}
    for i, entry in _decoder(directory).items():
        tokens[entry["content"]] = Added(int(i), entry.get("special"))
    for content, entry in tokens.items():
        if type(entry.id) is not int or not 0 <= entry.id < _MOST:
            raise ValueError(f"{content!r} has the id {entry.id!r}")
    special, ids = named(directory), _by_id(marks) if marks else ()
    for content, entry in tokens.items():
        if content in special or (entry.id in ids and not is_mark(content, tokens)):
            tokens[content] = Added(entry.id, True)
    return tokens


def named(directory: Path) -> dict[str, Named]:
    """Tokens that the files beside a tokenizer call special, and where they do first."""
    found = {}
    for name in (CONFIG, SPECIAL):
        for field, value in optional(directory / name).items():
            counts = field in (*_ROLES, *_LISTS, _DECODER)
            for content in _contents(field, value):
                if content not in found or not found[content].counts:
                    found[content] = Named(f"{name} ({field})", counts)
    return found


def _decoder(directory: Path) -> dict[str, Any]:
    """The added tokens of tokenizer_config.json by their ids."""
    return optional(directory / CONFIG).get(_DECODER) or {}


def _contents(field: str, value: Any) -> Iterator[str]:
    """The tokens that a field of a file calls special."""
    if field == _DECODER:
        entries = (value or {}).values()
        yield from (entry["content"] for entry in entries if entry.get("special"))
    elif field in _LISTS or field.endswith("_token"):
        if field in _LISTS and isinstance(value, dict):  # {"image_token": "<image>"}
            value = list(value.values())
        values = value if isinstance(value, list) else [value]
        yield from (content for content in map(content_of, values) if content)


def in_rules(rules: dict[str, Any], directory: Path, marks: Marks) -> dict[str, Any]:
    """Returns the rules of a tokenizer.json in which all special tokens are called special.

    UserError for a mark that is an ordinary word.
    """
    words, added = _words(rules["model"]), {t["content"]: t["id"] for t in rules["added_tokens"]}
    contents = {i: content for content, i in (words | added).items()}
    for i, entry in _decoder(directory).items():
        here = contents.get(int(i), entry["content"])
        if entry.get("special") and here != entry["content"]:
            raise UserError(
                f"{directory}: token {i} is {entry['content']!r} in {CONFIG} and {here!r} in "
                f"{JSON}: take both files from one place"
            )
    asked = named(directory)
    for i, where in _by_id(marks).items():
        if i in contents and not asked.get(contents[i], _NOWHERE).counts:
            asked[contents[i]] = where
    reserved = {*_controls(directory), unknown_token(rules["model"])} & {*words}
    for content, where in asked.items():
        if where.counts and content in words and content not in {*added, *reserved}:
            raise UserError(
                f"{directory / JSON}: {where.place} makes {content!r} a special token, but here it "
                "is an ordinary word of the vocabulary, which any text may hold: add it to "
                f"added_tokens of {JSON} with special=true, or name another token there"
            )
    special = {*asked, *_controls(directory)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = [
        {"id": words[content], "content": content, **flags, "special": True}
        for content in sorted((reserved & special) - {*added})
    ]
    old = [t | {"special": t["special"] or t["content"] in special} for t in rules["added_tokens"]]
    return rules | {"added_tokens": old + new}


def unknown_token(model: dict[str, Any]) -> str | None:
    """The token that the model of a tokenizer.json makes of unknown characters."""
    if model.get("unk_id") is not None:  # Unigram
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _words(model: dict[str, Any]) -> dict[str, int]:
    """The vocabulary of the model of a tokenizer.json."""
    if isinstance(model["vocab"], list):  # Unigram: pairs of a piece and its score
        return {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _controls(directory: Path) -> list[str]:
    """Control symbols of a tokenizer.model beside a tokenizer.json."""
    try:
        model = tokenizer_model.read(directory / MODEL)
    except (UserError, FileNotFoundError):  # a list of ranks, or none: the tokenizer.json is enough
        return []
    return [piece.piece for piece in model.pieces if piece.type == CONTROL]


def in_model(model: ModelProto, directory: Path, marks: Marks) -> ModelProto:
    """Returns a copy of the model whose special pieces are control symbols: no text makes those.

    UserError for a mark that is an ordinary word.
    """
    added, asked = added_tokens(directory, marks), named(directory)
    by_id, changed = _by_id(marks), _renamed(model, added, directory / MODEL)
    for i, piece in enumerate(changed.pieces):
        told = [each for each in (asked.get(piece.piece), by_id.get(i)) if each]
        counting = [each.place for each in told if each.counts]
        special = bool(told)
        if piece.type in (NORMAL, BYTE):
            special = bool(counting)
            if special and (piece.type == BYTE or not _MARK.fullmatch(piece.piece)):
                raise UserError(
                    f"{directory / MODEL}: {counting[0]} makes {piece.piece!r} a special token, "
                    "but here it is an ordinary word of the vocabulary, which any text may hold: "
                    "name another token there"
                )
        elif piece.type == USER_DEFINED:
            special = special or is_mark(piece.piece, added)
        if special and piece.type != UNKNOWN:
            piece.type = CONTROL
    return changed


def _renamed(model: ModelProto, added: dict[str, Added], path: Path) -> ModelProto:
    """A copy whose pieces are called as the files beside it call them.

    Those of InternLM2 give names to reserved pieces such as [UNUSED_TOKEN_146].
    """
    changed = ModelProto()
    changed.CopyFrom(model)
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    for content, entry in added.items():
        if entry.id >= len(model.pieces) or ids.get(content) == entry.id:
            continue
        if content in ids:
            raise UserError(
                f"{path}: the files beside it give {content!r} the id {entry.id}, but here it has "
                f"{ids[content]}: take the {JSON} of the same model and put it beside this file"
            )
        piece = changed.pieces[entry.id]
        piece.piece = content
        if piece.type not in (CONTROL, UNKNOWN):
            piece.type = USER_DEFINED
    return changed


def is_mark(content: str, added: dict[str, Added]) -> bool:
    """Returns a token's type by the files beside a tokenizer.model, else by its spelling."""
    told = added.get(content)
    if told is not None and told.special is not None:
        return told.special
    return bool(_MARK.fullmatch(content)) and not _HTML.fullmatch(content)


def _by_id(marks: Marks) -> dict[int, Named]:
    """Returns the places where files beside a tokenizer give the ids of its marks.

    No text needs a pad, so an ordinary word may have its id.
    """
    found = {} if marks.pad is None else {marks.pad: Named("pad_token_id", False)}
    ends = [("bos", marks.bos)] + [("eos", i) for i in marks.eos]
    for role, i in ends:
        found[i] = Named(f"{role}_token_id={i} (generation_config.json or config.json)", True)
    return found


def content_of(value: Any) -> str | None:
    """A token as these files write it: text, or an object with its content."""
    value = value["content"] if isinstance(value, dict) else value
    return value if isinstance(value, str) and value else None


def optional(path: Path) -> dict[str, Any]:
    """The content of a JSON file; nothing if there is none."""
    return read_json(path) if path.is_file() else {}
