"""Files of tokenizers: which kind, the ids of marks, import and export."""

import json
from base64 import b64encode

import pytest
import tokenizer_cases as cases
import tokenizers
from tokenizer_cases import HARD, TEXTS, random_texts

from core.config import UserError
from core.tokenizer import tokenizer_files as files
from core.tokenizer.tokenizer_files import Marks
from data.tokenizer import load, trained


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("make", cases.MAKERS.values())
def test_what_is_imported_is_exported_unchanged(tmp_path, make):
    source = make(tmp_path / "hf")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    before = contents(source)
    cases.write(source / "config.json", {"eos_token_id": 2, "pad_token_id": 6})
    (source / "model.safetensors").write_bytes(b"weights")
    marks = files.import_tokenizer(source, tmp_path / "bundle/tokenizer")
    inside = contents(tmp_path / "bundle/tokenizer")
    assert json.loads(inside.pop("marks.json")) == marks._asdict() | {"eos": list(marks.eos)}
    assert inside == before
    assert files.marks(tmp_path / "bundle/tokenizer") == marks  # without the config.json
    found = load.load(tmp_path / "bundle/tokenizer")
    assert (found.bos, found.eos, found.pad) == marks and marks.pad == 6
    assert found.fingerprint == load.load(source).fingerprint
    again = files.import_tokenizer(tmp_path / "bundle/tokenizer", tmp_path / "again")
    assert again == marks and contents(tmp_path / "again") == contents(
        tmp_path / "bundle/tokenizer"
    )
    files.export_tokenizer(tmp_path / "again", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_directory_without_one(tmp_path):
    assert files.import_tokenizer(tmp_path, tmp_path / "out") is None
    assert files.import_tokenizer(tmp_path / "nowhere", tmp_path / "out") is None
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no tokenizer in"):
        files.export_tokenizer(tmp_path, tmp_path / "out")


def test_our_own_opens_elsewhere_with_the_same_ids(tmp_path):
    ours = trained.train(TEXTS * 3, 340, tmp_path / "ours")
    assert files.import_tokenizer(tmp_path / "ours", tmp_path / "b") == Marks(1, (2,), 3)
    assert contents(tmp_path / "b") == contents(tmp_path / "ours")
    files.export_tokenizer(tmp_path / "b", tmp_path / "out")
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    other.encode_special_tokens = True
    texts = [*HARD, *TEXTS, "\u2581 a\u2581", "\x10\x100\x101", " " * 99, *random_texts(2000)]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert other.encode(text).ids == [1, *ids]
        assert other.decode(ids.tolist()) == text
    assert files.import_tokenizer(tmp_path / "out", tmp_path / "back") == Marks(1, (2,), 3)
    assert load.load(tmp_path / "back").fingerprint == ours.fingerprint
    other.add_special_tokens(["<|turn|>"])  # what others add to it there counts
    other.save(str(tmp_path / "out/tokenizer.json"))
    more = load.load(tmp_path / "out")
    assert (more.vocab_size, more.bos, more.eos) == (341, 1, (2,))
    assert more.encode("a<|turn|>", special=True)[-1] == 340


EOS = {
    "list": (dict(generation_config={"eos_token_id": [302, 301]}), (302, 301)),
    "number": (dict(generation_config={"eos_token_id": 302}, config={"eos_token_id": 1}), (302,)),
    "config": (dict(generation_config={}, config={"eos_token_id": [301]}), (301,)),
    "text_config": (
        dict(generation_config={}, config={"text_config": {"eos_token_id": 302}}),
        (302,),
    ),
    "none": (dict(generation_config={"eos_token_id": None}), ()),
    "minus": (dict(generation_config={"eos_token_id": -1}), ()),
    "token": (dict(generation_config={}, tokenizer_config={"eos_token": "<|end|>"}), (301,)),
    "object": (
        dict(generation_config={}, special_tokens_map={"eos_token": {"content": "<|turn|>"}}),
        (302,),
    ),
}


@pytest.mark.parametrize("name", EOS)
def test_where_eos_is_told(tmp_path, name):
    told, expected = EOS[name]
    folder = cases.byte_level(tmp_path, **told)
    assert files.marks(folder).eos == expected
    assert load.load(folder).eos == expected


BOS = {
    "llama3": (dict(), 300),
    "gpt2": (dict(before=None), None),
    "told to": (
        dict(before=None, tokenizer_config={"add_bos_token": True, "bos_token": "<|end|>"}),
        301,
    ),
    "told not to": (dict(tokenizer_config={"add_bos_token": False}), None),
    "has a bos but adds none": (dict(before=None, tokenizer_config={"bos_token": "!"}), None),
}


@pytest.mark.parametrize("name", BOS)
def test_where_bos_is_told(tmp_path, name):
    told, expected = BOS[name]
    folder = cases.byte_level(tmp_path, **told)
    assert files.marks(folder).bos == expected
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if "tokenizer_config" not in told:
        assert other.encode("").ids == ([] if expected is None else [expected])


def test_bos_of_other_post_processors(tmp_path):
    folder = cases.byte_level(tmp_path)
    rules = json.loads((folder / "tokenizer.json").read_text())

    def marks(processor):
        (folder / "tokenizer.json").write_text(json.dumps(rules | {"post_processor": processor}))
        return files.marks(folder)

    roberta = {"type": "RobertaProcessing", "sep": ["<|end|>", 301], "cls": ["<|turn|>", 302]}
    assert marks(roberta | {"trim_offsets": True, "add_prefix_space": False}).bos == 302
    assert marks(None).bos is None
    two = rules["post_processor"]["processors"][1]
    two["special_tokens"]["<|begin|>"]["ids"] = [300, 301]
    with pytest.raises(UserError, match=r"puts 2 tokens before a text, \[300, 301\]"):
        marks(two)


def test_pad(tmp_path):
    assert files.marks(cases.byte_level(tmp_path / "a")).pad is None
    told = {"tokenizer_config": {"pad_token": "<|turn|>"}}
    assert files.marks(cases.byte_level(tmp_path / "b", **told)).pad == 302
    told["config"] = {"pad_token_id": 301}
    assert files.marks(cases.byte_level(tmp_path / "c", **told)).pad == 301


def test_ranks_of_tiktoken_are_refused_unless_there_is_more(tmp_path):
    ranks = b"".join(b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "tokenizer.model").write_bytes(ranks)
    with pytest.raises(UserError, match="ranks for tiktoken.*take the tokenizer.json"):
        files.import_tokenizer(tmp_path, tmp_path / "out")
    cases.byte_level(tmp_path)
    assert files.import_tokenizer(tmp_path, tmp_path / "out") == Marks(300, (301, 302), None)


@pytest.mark.parametrize("name", files.OTHER)
def test_other_forms_say_how_to_get_one_that_opens(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"has {name}, but no tokenizer.json: write one"):
        files.kind(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json is damaged"),
        ("tokenizer.json", '{"added_tokens": [{}]}', "are not those of a tokenizer"),
        ("tokenizer_config.json", '{"eos_token": "?!"}', r"names '\?!', not in tokenizer.json"),
        ("marks.json", "{}", "marks.json is damaged: import the tokenizer again"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    folder = cases.byte_level(tmp_path / "hf", generation_config={})
    cases.write(folder / "tokenizer_config.json", {"eos_token": "<|end|>"})
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        files.import_tokenizer(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
