"""What holds for every kind of tokenizer, and which kind is opened."""

import numpy as np
import pytest
import tokenizer_cases as cases
from tokenizer_cases import HARD, MARKED, TEXTS, random_texts

from core.config import UserError
from data.tokenizer import load, trained
from data.tokenizer.huggingface import HuggingFace
from data.tokenizer.sentencepiece_model import SentencePiece
from data.tokenizer.trained import Trained

KINDS = dict(
    llama3=HuggingFace, llama2_json=HuggingFace, llama2=SentencePiece, gemma=SentencePiece,
    trained=Trained,
)  # fmt: skip


def train(folder):
    trained.train(TEXTS, 340, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    makers = {**cases.MAKERS, "trained": train}
    return {name: make(tmp_path_factory.mktemp(name) / "t") for name, make in makers.items()}


@pytest.fixture(scope="module", params=KINDS)
def model(request, folders):
    found = load.load(folders[request.param])
    assert type(found) is KINDS[request.param]
    return found


def marks(model):
    return {model.bos, model.pad, *model.eos} - {None}


@pytest.mark.parametrize("text", HARD + TEXTS)
def test_round_trip(model, text):
    ids = model.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert model.decode(ids) == text


def test_round_trip_of_random_text_in_batches(model):
    texts = TEXTS + list(random_texts(300))
    batch = model.encode_batch(texts)
    assert [model.decode(ids) for ids in batch] == texts
    for text, ids in zip(texts[:20], batch, strict=False):
        np.testing.assert_array_equal(ids, model.encode(text))


def test_text_makes_no_mark_unless_asked(model):
    plain = set(model.encode(MARKED).tolist())
    assert not plain & marks(model)
    assert model.decode(model.encode(MARKED)) == MARKED
    assert set(model.encode(MARKED, special=True).tolist()) & marks(model)


def test_marks_say_nothing(model):
    ids = [*marks(model), *model.encode("a b"), *marks(model)]
    assert model.decode(ids) == "a b"


def streamed(model, ids, after=()):
    stream = model.stream(after)
    pieces = [stream.push(int(i)) for i in ids]
    return pieces, stream.flush()


def test_stream_of_a_text_shows_whole_characters(model):
    for text in [*HARD, *TEXTS, *random_texts(200)]:
        pieces, rest = streamed(model, [*marks(model), *model.encode(text)])
        assert "".join(pieces) + rest == text
        shown = ""
        for piece in pieces:
            shown += piece
            assert text.startswith(shown)


def test_stream_equals_decode_on_any_ids(model):
    draw = np.random.default_rng(0)
    high = model.vocab_size
    for n in range(600):  # in half of them bytes most of all, so most of it is not UTF-8
        ids = draw.integers(0, high if n % 2 else 262, size=draw.integers(0, 14))
        pieces, rest = streamed(model, ids)
        assert "".join(pieces) + rest == model.decode(ids)


def test_a_stream_goes_on_after_a_prompt(model):
    """The space before a word stays, though at the start of a text a model may hide it."""
    for prompt in ("The", "The quick", "\u4f60", "a\n", ""):
        for text in (" dog", "dog", "  dog over the", "\U0001f600 dog"):
            ids = model.encode(prompt + text).tolist()
            cut = next((n for n in range(len(ids)) if model.decode(ids[:n]) == prompt and n), None)
            if cut is None and prompt:
                continue  # a token crosses the end of the prompt
            pieces, rest = streamed(model, ids[cut or 0 :], [*marks(model), *ids[: cut or 0]])
            assert "".join(pieces) + rest == text


def test_a_character_comes_when_its_last_byte_does(model):
    ids = [*model.encode("a\U0001f680b")]
    pieces, rest = streamed(model, ids)
    assert "\ufffd" not in "".join(pieces) + rest
    half = ids[: len(ids) - 2]
    pieces, rest = streamed(model, half)
    assert "\ufffd" not in "".join(pieces) and "\ufffd" in rest
    assert "".join(pieces) + rest == model.decode(half)


def test_the_fingerprint_is_of_the_tokenizer_not_of_the_place(model, folders, tmp_path):
    fingerprints = {load.load(folder).fingerprint for folder in folders.values()}
    assert len(fingerprints) == len(folders) and model.fingerprint in fingerprints
    assert len(model.fingerprint) == 64


def test_ids_outside_the_vocabulary_and_half_a_surrogate(model):
    for wrong in (-1, model.vocab_size):
        message = f"token {wrong} is not in the vocabulary of {model.vocab_size}"
        with pytest.raises(UserError, match=message):
            model.decode([5, wrong])
        with pytest.raises(UserError, match=message):
            model.stream().push(wrong)
    with pytest.raises(UserError, match="not Unicode"):
        model.encode("half \ud83d")


def test_nothing_to_open_says_what_to_do(tmp_path, folders):
    with pytest.raises(UserError, match=r"no tokenizer in .*; run python -m data.prepare first"):
        load.load(tmp_path)
    cases.byte_level(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=rf"no tokenizer in .*; name {tmp_path}/tokenizer"):
        load.load(tmp_path)


def test_ids_of_marks_must_be_tokens(tmp_path):
    folder = cases.byte_level(tmp_path, generation_config={"eos_token_id": [301, 304]})
    with pytest.raises(UserError, match="eos is 304, but it has only 304 tokens"):
        load.load(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is damaged"),
        ("tokenizer.json", b"[]", "tokenizer.json is damaged: it holds no object"),
        ("tokenizer.json", b"{}", "tokenizer.json cannot be read as a tokenizer"),
        ("generation_config.json", b"\xff", "generation_config.json is damaged"),
    ],
)
def test_damaged_json_is_named(tmp_path, name, content, message):
    folder = cases.byte_level(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load.load(folder)


def test_a_damaged_model_is_named(tmp_path, folders):
    whole = (folders["llama2"] / "tokenizer.model").read_bytes()
    for content in (b"", b"not a model", whole[: len(whole) // 2]):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model is not a SentencePiece model"):
            load.load(tmp_path)
