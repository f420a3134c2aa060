"""Whether the tokenizer beside a checkpoint can be used with its model: asked before an import.

    check("Llama-3.1-8B", vocab_size=128_256)

Opening a bundle asks the same (data/tokenizer/, infer/load.py). Here it is asked of the files, so
that no bundle is written which no command opens.
"""

from pathlib import Path
from typing import Any

import tokenizers

from core.checkpoint import read_json
from core.config import UserError
from core.tokenizer import tokenizer_files, tokenizer_model
from core.tokenizer.tokenizer_files import Marks

MODEL_FILES = (tokenizer_files.GENERATION, "config.json")  # the first that tells a mark counts
ROLES = ("bos", "eos", "pad")


def check(directory: str | Path, vocab_size: int) -> None:
    """UserError unless every token and mark of the tokenizer, if there is one, is of the model."""
    directory = Path(directory)
    kind = tokenizer_files.kind(directory)
    if kind is None:
        return
    for path, name, value in _told(directory):
        if not _is_mark(value):
            raise UserError(f"{path}: {name}={value!r} must be a token id, or a list of them")
    size, marks = _size(kind, directory), tokenizer_files.marks(directory)
    if size > vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {size} tokens, but config.json says "
            f"vocab_size={vocab_size}: copy both from one place"
        )
    for role, ids in zip(ROLES, _ids(marks), strict=True):
        beyond = [i for i in ids if i >= size]
        if beyond:
            where = _where(directory, f"{role}_token_id", beyond[0])
            raise UserError(
                f"{where}={beyond[0]} is beyond the {size} tokens of the tokenizer: correct it"
            )
    tokenizer_files.check(directory, marks)


def _told(directory: Path) -> list[tuple[Path, str, Any]]:
    """(file, name, value) of each mark in the files of the model, text_config's too."""
    told = []
    for path in (directory / name for name in MODEL_FILES):
        content = read_json(path) if path.is_file() else {}
        inner = content.get("text_config")
        for part in (content, inner if isinstance(inner, dict) else {}):
            told += [(path, name, part.get(name)) for name in (f"{x}_token_id" for x in ROLES)]
    return told


def _is_mark(value: Any) -> bool:
    """Returns whether a value is an id, a list of ids, or null; ids below 0 stand for none."""
    values = value if isinstance(value, list) else [value]
    return value is None or all(type(i) is int for i in values)


def _ids(marks: Marks) -> list[list[int]]:
    """The ids of each role."""
    each = ([marks.bos], list(marks.eos), [marks.pad])
    return [[i for i in ids if i is not None] for ids in each]


def _where(directory: Path, name: str, i: int) -> str:
    """`file: name` of the file of the model that gives this id, or of the tokenizer."""
    for path, field, value in _told(directory):
        if field == name and i in (value if isinstance(value, list) else [value]):
            return f"{path}: {name}"
    return f"{directory / tokenizer_files.CONFIG}: {name}"


def _size(kind: tokenizer_files.Kind, directory: Path) -> int:
    """Ids of the tokenizer go below it. UserError when the file is damaged."""
    if kind != "huggingface":
        model = tokenizer_model.read(directory / tokenizer_files.MODEL)
        with tokenizer_files.shaped(directory):
            added = {} if kind == "trained" else tokenizer_files.added_tokens(directory)
        return max([len(model.pieces), *(token.id + 1 for token in added.values())])
    path = directory / tokenizer_files.JSON
    try:
        return max(tokenizers.Tokenizer.from_file(str(path)).get_vocab().values()) + 1
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{path} cannot be read as a tokenizer: {error}; copy it again") from None
