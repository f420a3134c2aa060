"""A foreign tokenizer.model: its library's ids, and no mark from text."""

import numpy as np
import pytest
import tokenizer_cases as cases
from tokenizer_cases import HARD, TEXTS, random_texts

from core.config import UserError
from data.tokenizer import load as tokenizers

SPACES = ["\u2581", " \u2581 \u2581\u2581a", "a\u2581b", *HARD, *TEXTS, *random_texts(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.sentencepiece_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return cases.gemma_model(tmp_path_factory.mktemp("gemma"))


OPTIONS = {
    "llama": {},
    "no leading space": dict(add_dummy_prefix=False),
    "nmt_nfkc": dict(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
    "no bytes": dict(byte_fallback=False, vocab_size=110),
    "unigram": dict(model_type="unigram", vocab_size=320),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_ids_and_text_are_those_of_the_library(tmp_path, name):
    folder = cases.sentencepiece_model(tmp_path, **OPTIONS[name])
    model, other = tokenizers.load(folder), cases.library(folder)
    assert model.vocab_size == other.vocab_size()
    for text, ids in zip(SPACES, model.encode_batch(SPACES), strict=True):
        assert ids.tolist() == other.encode(text)
        assert model.decode(ids) == other.decode(ids.tolist())
        assert model.decode([1, *ids, 2]) == other.decode(ids.tolist())
    draw = np.random.default_rng(0)
    pieces = [i for i in range(3, model.vocab_size) if not other.is_byte(i)]
    space = other.piece_to_id("\u2581")
    for _ in range(300):  # spaces and unknown characters anywhere
        ids = draw.choice([0, *pieces, *[space] * 40], size=draw.integers(0, 8)).tolist()
        assert model.decode(ids) == other.decode(ids)


def test_marks_are_the_models_own_unless_files_tell(folder, gemma, tmp_path):
    llama = tokenizers.load(folder)
    assert (llama.bos, llama.eos, llama.pad) == (1, (2,), None)
    model = tokenizers.load(gemma)
    assert (model.bos, model.eos, model.pad) == (2, (1,), 0)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    told = {"eos_token": {"content": "<s>"}, "pad_token": "<unk>", "add_bos_token": False}
    cases.write(tmp_path / "tokenizer_config.json", told)
    model = tokenizers.load(tmp_path)
    assert (model.bos, model.eos, model.pad) == (None, (1,), 0)
    assert model.fingerprint != llama.fingerprint
    cases.write(tmp_path / "tokenizer_config.json", {"eos_token": "<nowhere>"})
    with pytest.raises(UserError, match="names '<nowhere>', not in tokenizer.model"):
        tokenizers.load(tmp_path)


def test_symbols_that_are_marks_do_not_come_from_text(gemma):
    model, other = tokenizers.load(gemma), cases.library(gemma)
    marks = ["<start_of_turn>", "<end_of_turn>", "<unused0>", "[INST]"]
    ids = {mark: other.piece_to_id(mark) for mark in marks}
    for mark, i in ids.items():
        text = f"a{mark}b {mark}"
        assert i in other.encode(text)  # the library lets text make it
        assert i not in model.encode(text) and model.decode(model.encode(text)) == text
        asked = model.encode(text, special=True).tolist()
        assert asked == other.encode(text) and asked.count(i) == 2
        assert model.decode(asked) == "ab "
    for symbol in ("\n\n", "<table>", "</h1>"):  # are text, and Gemma learned them as such
        text = f"a{symbol}b"
        assert other.piece_to_id(symbol) in model.encode(text)
        assert model.encode(text).tolist() == other.encode(text)


def test_files_beside_the_model_say_which_symbols_are_marks(gemma, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((gemma / "tokenizer.model").read_bytes())
    other = cases.library(gemma)
    entries = {"<table>": True, "[INST]": False}
    text = "<table>[INST]"
    assert [other.piece_to_id(t) in other.encode(text) for t in entries] == [True] * 2
    decoder = {other.piece_to_id(t): {"content": t, "special": s} for t, s in entries.items()}
    cases.write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    model = tokenizers.load(tmp_path)
    ids = model.encode(text).tolist()
    assert [other.piece_to_id(t) in ids for t in entries] == [False, True]
    assert model.decode(ids) == text


def test_added_tokens_follow_the_pieces(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    before = tokenizers.load(tmp_path)
    added = {"<|turn|>": 360, "zyzzyva": 361, "<extra>": 365, "<end>": 366}
    cases.write(tmp_path / "added_tokens.json", added)
    named = {"additional_special_tokens": ["<extra>"], "eos_token": "<end>"}
    cases.write(tmp_path / "special_tokens_map.json", named)
    model = tokenizers.load(tmp_path)
    assert (model.vocab_size, model.eos) == (367, (366,))
    assert model.fingerprint != before.fingerprint
    text = "a zyzzyva<|turn|>b<extra><end>"
    ids = model.encode(text).tolist()
    assert 361 in ids and not {360, 365, 366} & set(ids)
    assert model.decode(ids) == text
    ids = model.encode(text, special=True).tolist()
    assert {360, 361, 365, 366} <= set(ids)
    assert model.decode(ids) == "a zyzzyvab"
    assert model.decode([362]) == ""  # an id that nothing uses


def test_a_text_goes_on_after_a_mark_without_another_space(folder):
    model = tokenizers.load(folder)
    ids = model.encode("<s>the fox</s>the", special=True).tolist()
    assert ids[: ids.index(2)] == [1, *model.encode("the fox")]
    assert model.decode(ids) == "the foxthe"


def test_the_fingerprint_is_of_what_texts_become(folder, tmp_path):
    def changed(change):
        (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
        cases.edit_model(tmp_path, change)
        return tokenizers.load(tmp_path).fingerprint

    def rename(model):
        model.pieces[300].piece = "other"

    def set_score(model):
        model.pieces[300].score = -1e4

    def turn_off(model):
        model.normalizer_spec.add_dummy_prefix = False

    def note(model):
        model.trainer_spec.num_threads = 7  # of how it was trained

    same = tokenizers.load(folder).fingerprint
    assert changed(note) == same
    assert len({same, *map(changed, (rename, set_score, turn_off))}) == 4


def test_what_is_not_supported_is_said(folder, tmp_path):
    def suffix(model):
        model.trainer_spec.treat_whitespace_as_suffix = True

    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    cases.edit_model(tmp_path, suffix)
    with pytest.raises(UserError, match="tokenizer.model: it writes spaces after words"):
        tokenizers.load(tmp_path)


def test_a_foreign_model_is_not_taken_for_ours(tmp_path):
    """The nearest to ours: all options alike but for the sentence length."""
    folder = cases.sentencepiece_model(
        tmp_path,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["\n"],
        pad_id=3,
    )
    model = tokenizers.load(folder)
    assert model.decode(model.encode("a\u2581b")) == "a b"  # no escape
