"""A SentencePiece `tokenizer.model` as data: read, recognised, and written as `tokenizer.json`.

    model = read("runs/x/tokenizer/tokenizer.model")
    is_ours(model)  # whether data/tokenizer/trained.py trained it

Our own keeps U+2581 and spaces apart by an escape, so it must be told from all others.
"""

import base64
import binascii
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from core.config import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
UNK, BOS, EOS, PAD = range(4)  # ids of our own
# SentencePiece writes a space as U+2581 and so reads U+2581 back as a space. We keep the two
# apart: U+2581 is written DLE 1, and DLE itself DLE 0. Both ways are exact for every string.
SPACE, ESCAPE = "\u2581", "\x10"
# Of a text that is longer SentencePiece would learn nothing. No one else sets this number, and
# with the rest of `is_ours` it is the signature of our own models.
MAX_SENTENCE = 2**30


def read(path: Path) -> ModelProto:
    """The model; UserError when the file is damaged, of another kind, or not supported."""
    content = path.read_bytes()
    if _is_tiktoken(content):
        raise UserError(
            f"{path} is a list of ranks for tiktoken, without the rules that split text: take the "
            "tokenizer.json of the same model and put it beside this file"
        )
    model = ModelProto()
    try:
        model.ParseFromString(content)
        damaged = not model.pieces
    except DecodeError:
        damaged = True
    if damaged:
        raise UserError(f"{path} is not a SentencePiece model, or it is damaged: copy it again")
    if model.denormalizer_spec.precompiled_charsmap:
        raise UserError(f"{path}: it has a denormaliser, which is not supported")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(f"{path}: it writes spaces after words, which is not supported")
    return model


def is_ours(model: ModelProto) -> bool:
    """Returns whether we trained it, so that its texts are escaped."""
    trained, normal = model.trainer_spec, model.normalizer_spec
    return (
        trained.max_sentence_length == MAX_SENTENCE
        and list(trained.user_defined_symbols) == ["\n"]
        and (trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id) == (UNK, BOS, EOS, PAD)
        and normal.name == "identity"
        and not (normal.add_dummy_prefix or normal.remove_extra_whitespaces)
    )


def _is_tiktoken(content: bytes) -> bool:
    """Lines of a token in base64 and its rank, as in the original files of Llama 3."""
    token, _, rank = content.split(b"\n", 1)[0].strip().partition(b" ")
    try:
        return bool(base64.b64decode(token, validate=True)) and rank.isdigit()
    except binascii.Error:
        return False


def to_json(model: ModelProto) -> dict[str, Any]:
    """One of our own as the `tokenizer.json` that Hugging Face libraries read, escape included."""
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    marks = [model.pieces[i].piece for i in (UNK, BOS, EOS, PAD)]
    bos = marks[BOS]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": mark, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for i, mark in enumerate(marks)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                _replace(ESCAPE, ESCAPE + "0"),
                _replace(SPACE, ESCAPE + "1"),
                _replace(" ", SPACE),
            ],
        },
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": "\n"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos, 0), _sequence("A", 0)],
            "pair": [_special(bos, 0), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [BOS], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace(SPACE, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                _replace(ESCAPE + "1", SPACE),
                _replace(ESCAPE + "0", ESCAPE),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": marks[UNK],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges(model),
        },
    }


def merges(model: ModelProto) -> list[list[str]]:
    """The pairs that make each piece, best first: SentencePiece keeps only the results."""
    score = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    made = sorted((p for p in score if len(p) > 1), key=lambda piece: -score[piece])
    return [
        [piece[:cut], piece[cut:]]
        for piece in made
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _special(token: str, segment: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": segment}}


def _sequence(name: str, segment: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": segment}}
