"""Data prepared with a tokenizer that is there already, and decoding with one like it."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizer_cases as cases

from core.config import Experiment, UserError
from data import prepare, store
from data.config import DataConfig
from data.tokenizer import load, trained

LLAMA3 = dict(generation_config={"eos_token_id": [301, 302]})
GPT2 = dict(before=None, generation_config={"eos_token_id": 301})


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"{n} <|end|> the quick brown fox {n * n}\n")
    return folder


def run(tmp_path, folder, **fields):
    fields = dict(source="files", files=(f"{folder}/*.txt",), validation_fraction=0.3) | fields
    prepare.main(Experiment("test", str(tmp_path / "run"), data=DataConfig(**fields)))
    return store.TokenStore(tmp_path / "run/data", "train")


@pytest.mark.parametrize(("made", "first"), [(LLAMA3, 300), (GPT2, 301)])
def test_documents_begin_and_end_as_the_tokenizer_says(tmp_path, folder, made, first):
    """Without bos the end token comes first: so the first token of the text is predicted too."""
    source = cases.byte_level(tmp_path / "hf", **made)
    tokens = run(tmp_path, folder, tokenizer=str(source))
    model = load.load(tmp_path / "run/data/tokenizer")
    given = load.load(source)
    assert tokens.manifest["tokenizer"] == model.fingerprint == given.fingerprint
    assert tokens.vocab_size == 304 and model.eos == given.eos
    assert tokens.manifest["first_token"] == first
    for name, start, stop in zip(tokens.names(), tokens.starts, tokens.starts[1:], strict=False):
        text = Path(name).read_text()
        assert tokens[start:stop].tolist() == [first, *given.encode(text), 301]


def test_a_bundles_own_is_used_again(tmp_path, folder):
    first = trained.train(cases.TEXTS, 340, tmp_path / "old")
    again = run(tmp_path, folder, tokenizer=str(tmp_path / "old"), vocab_size=340)
    assert again.manifest["tokenizer"] == first.fingerprint


def test_large_vocabularies_are_stored_whole(tmp_path, folder):
    """As that of Gemma: ids beyond 16 bits survive."""
    source = cases.byte_level(tmp_path / "hf", **GPT2)
    rules = json.loads((source / "tokenizer.json").read_text())
    rules["added_tokens"][1]["id"] = 69_999
    vocab = rules["model"]["vocab"] | {f"filler {n}": n for n in range(301, 69_999)}
    rules["model"]["vocab"] = vocab | {"<|end|>": 69_999}
    rules["added_tokens"] = rules["added_tokens"][1:2]
    (source / "tokenizer.json").write_text(json.dumps(rules))
    cases.write(source / "generation_config.json", {"eos_token_id": 69_999})
    tokens = run(tmp_path, folder, tokenizer=str(source))
    assert tokens.vocab_size == 70_000 and tokens[0:1].dtype == np.uint32
    assert {tokens[stop - 1 : stop].item() for stop in tokens.starts[1:]} == {69_999}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(tokenizer="nowhere"), "data.tokenizer=nowhere: there is no tokenizer in nowhere"),
        (
            dict(tokenizer="{hf}", vocab_size=8192),
            r"data.vocab_size=8192 is for a tokenizer to train, but data.tokenizer=.* with 304 "
            "tokens: set data.vocab_size to that",
        ),
        (dict(tokenizer="{endless}"), "data.tokenizer=.* names no token that ends a text"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_before_reading(
    tmp_path, folder, fields, message, monkeypatch
):
    monkeypatch.setattr(prepare, "survey", None)
    hf = cases.byte_level(tmp_path / "hf", **LLAMA3)
    endless = cases.byte_level(tmp_path / "endless", generation_config={})
    fields["tokenizer"] = fields["tokenizer"].format(hf=hf, endless=endless)
    with pytest.raises(UserError, match=message):
        run(tmp_path, folder, **fields)
