"""Special is what any file of a tokenizer calls so: no text makes it, no output shows it."""

import json
import shutil
import unicodedata

import pytest
import tokenizer_cases as cases
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from core.config import UserError
from core.tokenizer import tokenizer_files
from data.tokenizer import load
from infer.text import Detokenizer


def _beside(token, i):
    """Files that call a token special, each in its own way."""
    return {
        "role": {"tokenizer_config": {"eos_token": token}},
        "object": {"special_tokens_map": {"pad_token": {"content": token}}},
        "list": {
            "special_tokens_map": {"additional_special_tokens": [token]},
            "tokenizer_config": {"additional_special_tokens": None},
        },
        "by name": {"tokenizer_config": {"extra_special_tokens": {"turn_token": token}}},
        "decoder": {
            "tokenizer_config": {"added_tokens_decoder": {i: {"content": token, "special": True}}}
        },
        "generation": {"generation_config": {"eos_token_id": [i]}},
        "model": {"generation_config": {}, "config": {"text_config": {"eos_token_id": i}}},
    }


WAYS = [*_beside("", 0), "own field"]
KINDS = {  # what makes it, a token that nothing else calls special, and its id
    "byte level": (cases.byte_level, "<tool>", 303),
    "gemma": (cases.gemma_model, "</h1>", 10),
    "added to gemma": (cases.gemma_model, "OVER", 360),
}


def _write(folder, token, i, way):
    if way == "own field":  # which transformers does not read, but no one writes it for a word
        told = {"tokenizer_config": {"end_of_turn_token": token}}
    else:
        told = _beside(token, i)[way]
    for name, content in told.items():
        cases.write(folder / f"{name}.json", content)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_any_file_calls_special(tmp_path, made, kind, way):
    folder, (_, token, i) = shutil.copytree(made[kind], tmp_path / "hf"), KINDS[kind]
    plain = load.load(folder)
    assert plain.decode([i]) == token and i in plain.encode(f"a{token}b")
    _write(folder, token, i, way)
    tokenizer_files.import_tokenizer(folder, tmp_path / "bundle")
    tokenizer_files.export_tokenizer(tmp_path / "bundle", tmp_path / "out")
    (tmp_path / "out/config.json").write_text(
        json.dumps({"eos_token_id": load.load(folder).eos})  # as model.convert writes it
    )
    for path in (folder, tmp_path / "bundle", tmp_path / "out"):
        model = load.load(path)
        ids = model.encode(f"a{token}b").tolist()
        assert i not in ids and model.decode(ids) == f"a{token}b"
        assert i in model.encode(f"a{token}b", special=True)
        assert model.decode([*ids, i, *ids]) == f"a{token}b" * 2
        writer = Detokenizer(model, (token,), ids)
        assert writer.push(i) + "".join(map(writer.push, ids)) + writer.flush() == "a"
        assert model.fingerprint == load.load(folder).fingerprint != plain.fingerprint


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of KINDS."""
    folders = {kind: make(tmp_path_factory.mktemp("kind")) for kind, (make, *_) in KINDS.items()}
    cases.write(folders["added to gemma"] / "added_tokens.json", {"OVER": 360})
    library = cases.library(folders["gemma"])
    assert library.piece_to_id("</h1>") == KINDS["gemma"][2] and library.vocab_size() == 360
    return folders


@pytest.mark.parametrize("way", [way for way in WAYS if way != "own field"])
@pytest.mark.parametrize("kind", ["byte level", "gemma"])
def test_an_ordinary_word_is_refused(tmp_path, made, kind, way):
    folder, word, i = shutil.copytree(made[kind], tmp_path / "hf"), "!", 0
    if kind == "gemma":
        library = cases.library(folder)
        word = next(t for t in map(library.id_to_piece, range(270, 300)) if t.isalpha())
        i = library.piece_to_id(word)
    _write(folder, word, i, way)
    name = "model" if kind == "gemma" else "json"
    message = rf"tokenizer.{name}: .* makes {word!r} a special token, but here it is an ordinary"
    with pytest.raises(
        UserError, match=f"{message} word.* or name another|{message}.*name another"
    ):
        load.load(folder)
    with pytest.raises(UserError, match=message):
        tokenizer_files.import_tokenizer(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_reserved_word_is_spelled_otherwise(tmp_path):
    """What the refusal advises: the model makes the word whole, and text gets its letters."""
    folder = cases.byte_level(tmp_path)
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"] |= {"ignore_merges": True, "vocab": rules["model"]["vocab"] | {"endoftext": 304}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    rules["added_tokens"] += [{"id": 304, "content": "endoftext", "special": True, **flags}]
    cases.write(folder / "tokenizer.json", rules)
    cases.write(folder / "generation_config.json", {"eos_token_id": 304})
    model = load.load(folder)
    assert model.eos == (304,) and 304 not in model.encode("endoftext")
    assert model.decode(model.encode("endoftext")) == "endoftext"


def test_what_no_text_needs_may_be_an_ordinary_word(tmp_path):
    """A pad of config.json, and a field that gives no token a role."""
    told = {"config": {"pad_token_id": 0}, "tokenizer_config": {"word_delimiter_token": "!"}}
    model = load.load(cases.byte_level(tmp_path, **told))
    assert model.encode("!").tolist() == [0] and model.decode([0]) == "!"


def test_a_byte_is_an_ordinary_word(tmp_path):
    folder = cases.sentencepiece_model(tmp_path)
    cases.write(folder / "generation_config.json", {"eos_token_id": 5})
    with pytest.raises(UserError, match=r"eos_token_id=5 .* makes '<0x02>' a special token"):
        load.load(folder)


def test_files_of_two_tokenizers_are_refused(tmp_path):
    folder = cases.byte_level(tmp_path)
    told = {"added_tokens_decoder": {"5": {"content": "<|im_end|>", "special": True}}}
    cases.write(folder / "tokenizer_config.json", told)
    with pytest.raises(UserError, match="token 5 is '<|im_end|>' in tokenizer_config.json and '&'"):
        load.load(folder)
    folder = cases.sentencepiece_model(tmp_path / "llama")
    told["added_tokens_decoder"] = {"0": {"content": "<s>", "special": True}}
    cases.write(folder / "tokenizer_config.json", told)
    with pytest.raises(UserError, match="give '<s>' the id 0, but here it has 1: take the"):
        load.load(folder)


def test_files_beside_a_model_rename_its_reserved_pieces(tmp_path):
    """Those of InternLM2: [UNUSED_TOKEN_146] is <|im_start|>."""
    folder = cases.gemma_model(tmp_path)
    i = cases.library(folder).piece_to_id("<unused0>")
    told = {"added_tokens_decoder": {str(i): {"content": "<|im_start|>", "special": True}}}
    cases.write(folder / "tokenizer_config.json", told)
    model = load.load(folder)
    text = "<unused0><|im_start|>"
    assert i not in model.encode(text) and model.decode(model.encode(text)) == text
    assert model.encode("<|im_start|>", special=True).tolist() == [i] and model.decode([i]) == ""


def test_control_symbols_of_a_model_beside_the_json(tmp_path):
    folder = cases.byte_level(tmp_path / "t")
    cases.sentencepiece_model(tmp_path, control_symbols=["<tool>"])
    (folder / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    assert 303 not in load.load(folder).encode("<tool>")


def _unigram(folder):
    """Like XLM-R: the model has its marks among its pieces, and NFKC makes them of others."""
    letters = [(c, -4.0) for c in "abcdeknstu</>"]
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<end>", 0.0), ("\u2581", -2.0)]
    model = tokenizers.Tokenizer(models.Unigram([*pieces, *letters], unk_id=0))
    model.normalizer = normalizers.NFKC()
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    model.decoder = decoders.Metaspace(prepend_scheme="never")
    flags = dict(normalized=True, lstrip=True, rstrip=True)
    model.add_special_tokens([AddedToken(piece, **flags) for piece, _ in pieces[:3]])
    model.add_tokens([AddedToken("<end>", **flags)])
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    cases.write(folder / "tokenizer_config.json", {"eos_token": "<end>", "bos_token": "<s>"})
    return folder


def _flags(folder):
    """Like Llama 3, with marks that take spaces and are looked for in normalised text."""
    cases.byte_level(folder)
    rules = json.loads((folder / "tokenizer.json").read_text())
    for entry in rules["added_tokens"]:
        entry |= {"normalized": True, "lstrip": True, "rstrip": True, "special": False}
    rules["normalizer"] = {"type": "NFKC"}
    cases.write(folder / "tokenizer.json", rules)
    told = {"eos_token": "<|end|>", "bos_token": "<|begin|>", "pad_token": "<|turn|>"}
    cases.write(folder / "special_tokens_map.json", told | {"mask_token": "<tool>"})
    return folder


def _nfkc_model(folder):
    symbols = ["<start_of_turn>", "<end_of_turn>"]
    return cases.sentencepiece_model(
        folder,
        normalization_rule_name="nfkc",
        add_dummy_prefix=False,
        user_defined_symbols=symbols,
    )


FORGING = {
    "unigram": (_unigram, ["<s>", "</s>", "<end>", "<unk>"], range(4)),
    "flags": (_flags, ["<|end|>", "<|begin|>", "<|turn|>", "<tool>"], range(300, 304)),
    "nfkc": (_nfkc_model, ["<start_of_turn>", "<end_of_turn>", "<s>"], range(5)),
}


@pytest.fixture(scope="module")
def forging(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forging")
    return {name: load.load(make(folder / name)) for name, (make, *_) in FORGING.items()}


def _wide(text):
    """The full-width characters that NFKC turns into `text`."""
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


@pytest.mark.parametrize("name", FORGING)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(parts=st.lists(st.integers(0, 99), max_size=8))
def test_no_text_makes_a_special_token(forging, name, parts):
    model, (_, marks, special) = forging[name], FORGING[name]
    wholes = [*marks, *map(_wide, marks)]
    pieces = [*wholes, *(f" {mark}  " for mark in wholes), *(mark[:2] for mark in wholes)]
    pieces += [mark[2:] for mark in wholes] + [" ", "a", "\u2004"]
    text = "".join(pieces[part % len(pieces)] for part in parts)
    ids = model.encode(text)
    assert not {*special} & {*ids.tolist()}
    assert model.decode(ids) == unicodedata.normalize("NFKC", text)
