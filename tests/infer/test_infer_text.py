"""Prompts and texts with tokenizers of others: no bos, hidden spaces."""

import infer_cases as cases
import numpy as np
import pytest
import tokenizer_cases

from core.config import UserError
from data.tokenizer import load as tokenizers
from infer import load, rows, text
from infer.config import DecodeConfig
from infer.sampling.params import Sampling


def test_text_begins_with_bos_only_where_there_is_one(tmp_path):
    llama3 = tokenizers.load(tokenizer_cases.byte_level(tmp_path / "llama3"))
    gpt2 = tokenizers.load(tokenizer_cases.byte_level(tmp_path / "gpt2", before=None))
    ids = gpt2.encode("the <|end|>").tolist()
    assert text.from_text("the <|end|>", "", llama3).tokens.tolist() == [300, *ids]
    assert text.from_text("the <|end|>", "", gpt2).tokens.tolist() == ids
    assert text.from_text("", "", llama3).tokens.tolist() == [300]
    (tmp_path / "p.txt").write_text("one\n\n")
    with pytest.raises(UserError, match=r"decode.prompts=.*p.txt line 2 is an empty text"):
        text.read(str(tmp_path / "p.txt"), "decode.prompts", gpt2, 304)
    found = load.BundleInfo(tmp_path, 0, cases.model_config(), gpt2)
    with pytest.raises(UserError, match="decode.prompt='' is an empty text"):
        rows.read_rows(DecodeConfig(), found)


def test_the_space_after_a_prompt_is_shown(tmp_path):
    """A tokenizer that hides the space at the start of a text: Llama 2."""
    llama2 = tokenizers.load(tokenizer_cases.sentencepiece_model(tmp_path))
    prompt = text.from_text("The", "", llama2)
    row = rows.writer(prompt, Sampling(stop=("dog",)), llama2)
    new = llama2.encode("The fox dog")[len(prompt.tokens) - 1 :].tolist()
    assert "".join(map(row.push, new)) + row.flush() == " fox "


def test_a_stop_string_in_the_character_that_the_prompt_begins(tmp_path):
    llama = tokenizers.load(tokenizer_cases.llama_json(tmp_path))
    ids = llama.encode("a\u1b13\ufffd b").tolist()
    prompt = text.Prompt(None, np.array(ids[:3]))  # the space before the text, "a", a byte
    assert llama.decode(prompt.tokens) == "a\ufffd"
    for stop, shown in (((), "\u1b13\ufffd b"), (("\u1b13",), ""), (("\ufffd ",), "\u1b13")):
        row = rows.writer(prompt, Sampling(stop=stop), llama)
        assert "".join(map(row.push, ids[3:])) + row.flush() == row.text == shown
        assert row.stopped == bool(stop)
