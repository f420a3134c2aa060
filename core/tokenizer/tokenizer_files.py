"""The files of a tokenizer: what kind it is, which ids its marks have, and copies of it.

    marks = import_tokenizer("Llama-3.1-8B", "runs/llama/tokenizer")  # None: there is none
    export_tokenizer("runs/llama/tokenizer", "exported")

A bundle keeps the files as they are, and beside them `marks.json`: the ids of its marks, which
partly stand in the config.json of the model. Reading text with them is up to data/tokenizer/.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from core.checkpoint import read_json
from core.config import UserError
from core.tokenizer import tokenizer_model as sentencepiece_model
from core.tokenizer import tokenizer_special
from core.tokenizer.tokenizer_special import (
    ADDED,
    CONFIG,
    JSON,
    MODEL,
    SPECIAL,
    Marks,
    added_tokens,
    content_of,
    optional,
)

MARKS, GENERATION = "marks.json", "generation_config.json"
COPIED = (
    JSON, MODEL, CONFIG, SPECIAL, GENERATION, ADDED, "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Files that hold a tokenizer in a form that we do not read.
OTHER = ("vocab.json", "vocab.txt", "spiece.model", "tekken.json", "tiktoken.model")

Kind = Literal["trained", "huggingface", "sentencepiece"]


def kind(directory: str | Path) -> Kind | None:
    """Returns the kind of tokenizer in the directory; None if it holds none.

    UserError when the file is damaged, or there is only one that we cannot read.
    """
    directory = Path(directory)
    has_json, has_model = ((directory / name).is_file() for name in (JSON, MODEL))
    if has_model and _is_ours(directory, has_json):
        return "trained"
    if has_json:
        return "huggingface"
    if has_model:
        return "sentencepiece"
    for name in OTHER:
        if (directory / name).is_file():
            raise UserError(
                f"{directory} has {name}, but no {JSON}: write one, for instance with "
                "transformers.AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
            )
    return None


def _is_ours(directory: Path, has_json: bool) -> bool:
    """Returns whether we trained the model, and nobody changed its exported tokenizer.json."""
    try:
        model = sentencepiece_model.read(directory / MODEL)
    except UserError:
        if has_json:  # which is all that is needed
            return False
        raise
    if not sentencepiece_model.is_ours(model):
        return False
    return not has_json or read_json(directory / JSON) == sentencepiece_model.to_json(model)


def import_tokenizer(source: str | Path, target: str | Path) -> Marks | None:
    """Copies the tokenizer of a Hugging Face directory, or of a bundle, to `target`.

    None, and nothing is written, if `source` holds none.
    """
    source, target = Path(source), Path(target)
    if kind(source) is None:
        return None
    found = marks(source)
    check(source, found)
    _copy(source, target)
    if kind(source) != "trained":  # whose marks are always the same
        (target / MARKS).write_text(json.dumps(found._asdict()) + "\n")
    return found


def export_tokenizer(source: str | Path, target: str | Path) -> None:
    """Gives the files of a bundle's tokenizer/ back as they came.

    Our own SentencePiece gets a tokenizer.json with the same ids, for transformers.
    """
    source, target = Path(source), Path(target)
    found = kind(source)
    if found is None:
        raise UserError(f"there is no tokenizer in {source}")
    _copy(source, target)
    if found == "trained" and not (source / JSON).is_file():
        model = sentencepiece_model.read(source / MODEL)
        names = ("unk_token", "bos_token", "eos_token", "pad_token")
        config = {name: model.pieces[i].piece for i, name in enumerate(names)}
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
        }
        _write_json(target / JSON, sentencepiece_model.to_json(model))
        _write_json(target / CONFIG, config)


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def marks(directory: str | Path) -> Marks:
    """The ids of the marks of the tokenizer in `directory`, which must hold one.

    bos: what the tokenizer itself puts before a text. eos: generation_config.json, else the
    model's config.json, else the tokenizer's own; pad alike.
    """
    directory = Path(directory)
    if (directory / MARKS).is_file():
        told = read_json(directory / MARKS)
        try:
            found = Marks(told["bos"], tuple(told["eos"]), told["pad"])
            ids = [*found.eos, *(i for i in (found.bos, found.pad) if i is not None)]
            if any(type(i) is not int or i < 0 for i in ids):
                raise TypeError(ids)
            return found
        except (KeyError, TypeError):
            path = directory / MARKS
            raise UserError(f"{path} is damaged: import the tokenizer again") from None
    found = kind(directory)
    if found == "trained":
        return Marks(sentencepiece_model.BOS, (sentencepiece_model.EOS,), sentencepiece_model.PAD)
    with shaped(directory):
        source = _Json(directory) if found == "huggingface" else _SentencePiece(directory)
        eos, pad = (_model_ids(directory, name) or source.named(name) for name in ("eos", "pad"))
        return Marks(source.bos(), eos, pad[0] if pad else None)


def check(directory: Path, found: Marks) -> None:
    """UserError where one of the marks is an ordinary word, which any text may hold."""
    holds = kind(directory)
    with shaped(directory):
        if holds == "huggingface":
            tokenizer_special.in_rules(read_json(directory / JSON), directory, found)
        elif holds == "sentencepiece":
            model = sentencepiece_model.read(directory / MODEL)
            tokenizer_special.in_model(model, directory, found)


@contextlib.contextmanager
def shaped(directory: Path) -> Iterator[None]:
    """Makes a UserError of what goes wrong where files lack what a tokenizer's have."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the files of {directory} are not those of a tokenizer: {error!r}; copy them again"
        ) from None


class _Json:
    """Marks of a tokenizer.json."""

    def __init__(self, directory: Path):
        self._path = directory / JSON
        self._content = read_json(self._path)
        self._config = optional(directory / SPECIAL) | optional(directory / CONFIG)

    def named(self, name: str) -> tuple[int, ...]:
        """() or the id of the token that is called `name` beside it."""
        token = content_of(self._config.get(f"{name}_token"))
        return () if token is None else (self._id(token),)

    def bos(self) -> int | None:
        """Returns the tokens before a text; tokenizer_config.json may say otherwise."""
        asked = self._config.get("add_bos_token")
        if asked is not None:
            return next(iter(self.named("bos")), None) if asked else None
        before = _before(self._content.get("post_processor"))
        if len(before) > 1:
            raise UserError(
                f"{self._path} puts {len(before)} tokens before a text, {before}: "
                "only one is supported"
            )
        return before[0] if before else None

    def _id(self, token: str) -> int:
        for entry in self._content.get("added_tokens", ()):
            if entry["content"] == token:
                return entry["id"]
        vocab = self._content["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: pairs of a piece and its score
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        if token not in vocab:
            raise UserError(f"{self._path.with_name(CONFIG)} names {token!r}, not in {JSON}")
        return vocab[token]


class _SentencePiece:
    """Marks of a tokenizer.model that is not our own."""

    def __init__(self, directory: Path):
        self._path = directory / MODEL
        model = sentencepiece_model.read(self._path)
        self._spec = model.trainer_spec
        self._ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        self._ids |= {content: added.id for content, added in added_tokens(directory).items()}
        self._config = optional(directory / SPECIAL) | optional(directory / CONFIG)

    def named(self, name: str) -> tuple[int, ...]:
        """() or the id of the mark, of the files beside the model or of itself."""
        token = content_of(self._config.get(f"{name}_token"))
        if token is None:
            spec = self._spec
            i = {"bos": spec.bos_id, "eos": spec.eos_id, "pad": spec.pad_id}[name]
            return (i,) if i >= 0 else ()
        if token not in self._ids:
            raise UserError(f"{self._path.with_name(CONFIG)} names {token!r}, not in {MODEL}")
        return (self._ids[token],)

    def bos(self) -> int | None:
        """These models put one before a text unless told otherwise."""
        if not self._config.get("add_bos_token", True):
            return None
        return next(iter(self.named("bos")), None)


def _model_ids(directory: Path, name: str) -> tuple[int, ...]:
    """Ids that the files of the model give to a mark; () when they do not tell."""
    config = optional(directory / "config.json")
    for told in (optional(directory / GENERATION), config, config.get("text_config", {})):
        value = told.get(f"{name}_token_id")
        ids = tuple(value) if isinstance(value, list) else (value,)
        if all(type(i) is int and i >= 0 for i in ids) and ids:  # -1 stands for none
            return ids
    return ()


def _before(processor: dict[str, Any] | None) -> list[int]:
    """The ids that a post-processor of tokenizer.json puts before a text."""
    if processor is None:
        return []
    if processor["type"] == "Sequence":
        return [i for each in reversed(processor["processors"]) for i in _before(each)]
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]]
    ids = []
    if processor["type"] == "TemplateProcessing":
        for part in processor["single"]:
            if "Sequence" in part:
                break
            ids += processor["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return ids


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
