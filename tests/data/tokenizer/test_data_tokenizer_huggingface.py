"""A tokenizer.json: its library's ids, marks from the files beside it."""

import json

import pytest
import tokenizer_cases as cases
import tokenizers
from tokenizer_cases import HARD, MARKED, TEXTS, random_texts
from tokenizers import models, normalizers, pre_tokenizers

from core.config import UserError
from data.tokenizer import load

AWKWARD = ["\u2581", " \u2581 a", MARKED, *HARD, *TEXTS, *random_texts(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.byte_level(tmp_path_factory.mktemp("llama3"))


def library(folder, spelled):
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.encode_special_tokens = spelled
    return model


@pytest.mark.parametrize("make", [cases.byte_level, cases.llama_json])
def test_ids_and_text_are_those_of_the_library(tmp_path, make):
    folder = make(tmp_path)
    model, other = load.load(folder), library(folder, spelled=True)
    assert model.vocab_size == other.get_vocab_size()
    for text, ids in zip(AWKWARD, model.encode_batch(AWKWARD), strict=True):
        if not (make is cases.llama_json and "<s>" in text):  # which its merges make, see below
            assert ids.tolist() == other.encode(text, add_special_tokens=False).ids
        assert model.decode(ids) == other.decode(ids.tolist())
    asking = library(folder, spelled=False)
    for text, ids in zip(AWKWARD, model.encode_batch(AWKWARD, special=True), strict=True):
        assert ids.tolist() == asking.encode(text, add_special_tokens=False).ids


def test_special_is_what_the_file_calls_so(folder):
    model = load.load(folder)
    text = "a<|turn|><tool>"
    assert [i in model.encode(text) for i in (302, 303)] == [False, True]
    assert model.decode(model.encode(text)) == text
    assert model.encode(text, special=True).tolist()[-2:] == [302, 303]
    assert model.decode([302, 303]) == "<tool>"


def test_merges_cannot_make_a_mark(tmp_path):
    """The library alone lets them: its flag keeps added tokens apart, not what BPE finds."""
    folder = cases.llama_json(tmp_path)
    model, other = load.load(folder), library(folder, spelled=True)
    assert 1 in other.encode("a<s>b", add_special_tokens=False).ids
    ids = model.encode("a<s>b").tolist()
    assert 1 not in ids and model.decode(ids) == "a<s>b"
    streamed = model.stream()
    assert "".join(map(streamed.push, ids)) + streamed.flush() == "a<s>b"


def test_a_mark_that_has_no_other_spelling_is_refused(tmp_path):
    model = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    found = load.load(tmp_path)
    assert found.encode("a b").tolist() == [1, 2]
    with pytest.raises(UserError, match="no way to write '<s>', which stands in a text"):
        found.encode("a <s>")


def test_unknown_characters_may_be_special(tmp_path):
    model = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.normalizer = normalizers.Lowercase()
    model.add_special_tokens(["[UNK]"])
    model.save(str(tmp_path / "tokenizer.json"))
    assert load.load(tmp_path).encode("A b").tolist() == [1, 0]


def test_truncation_and_padding_of_the_file_do_nothing(folder, tmp_path):
    model = library(folder, spelled=True)
    model.enable_truncation(4)
    model.enable_padding(length=50)
    model.save(str(tmp_path / "tokenizer.json"))
    cases.write(tmp_path / "generation_config.json", {"eos_token_id": [301, 302]})
    found, whole = load.load(tmp_path), load.load(folder)
    assert found.encode(TEXTS[0]).tolist() == whole.encode(TEXTS[0]).tolist()
    assert found.fingerprint == whole.fingerprint


def test_the_fingerprint_is_of_rules_and_marks(folder, tmp_path):
    same = load.load(folder).fingerprint
    rules = json.loads((folder / "tokenizer.json").read_text())
    other = cases.byte_level(tmp_path / "eos", generation_config={"eos_token_id": 301})
    assert load.load(other).fingerprint != same
    other = cases.byte_level(tmp_path / "rules")
    assert load.load(other).fingerprint == same
    (other / "tokenizer.json").write_text(json.dumps(dict(reversed(rules.items()))))
    assert load.load(other).fingerprint == same  # the same data, written otherwise
    rules["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(rules))
    assert load.load(other).fingerprint != same


def test_ids_with_holes(folder, tmp_path):
    rules = json.loads((folder / "tokenizer.json").read_text())
    del rules["added_tokens"][2]  # <|turn|>, 302
    rules["model"]["vocab"]["<tool>"] = 303
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    model = load.load(tmp_path)
    assert model.vocab_size == 304 and model.encode("<tool>").tolist() == [303]
    assert model.decode([302]) == model.stream().push(302) == ""
