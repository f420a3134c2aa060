"""Our own tokenizer gives back every string, lets no text make a mark, streams characters."""

import numpy as np
import pytest
import tokenizer_cases
from tokenizer_cases import TEXTS, random_texts

from core.config import UserError
from data.texts.sample import UNIT, TextSample
from data.tokenizer import load, trained

ALPHABET = "ab Th1 \t\n\r\0\x10\u258101\u00e9\u4f60\U0001f600\ufeff\ufffd<s>"
OWN = [  # what this kind escapes, or could take for its own marks
    "\u2581",
    " \u2581 \u2581\u2581",
    "\x10",
    "\x10\x10",
    "\x100\x101\x10\u2581",
    "<0x41><s></s><pad><unk>",
]
HARD = [*tokenizer_cases.HARD, *OWN]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained.train(TEXTS, 340, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", OWN)
def test_round_trip_of_what_is_escaped(model, text):
    assert model.decode(model.encode(text)) == text


def test_round_trip_of_random_text(model):
    texts = list(random_texts(2000, ALPHABET))
    assert [model.decode(ids) for ids in model.encode_batch(texts)] == texts


def test_a_batch_equals_one_by_one_and_whole_documents(model):
    texts = TEXTS + list(random_texts(200, ALPHABET))
    for text, ids in zip(texts, model.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, model.encode(text))
        whole = model._model.encode(trained.escape(text))  # not cut into lines
        assert ids.tolist() == whole


def test_text_cannot_make_a_mark(model):
    assert (model.bos, model.eos, model.pad) == (1, (2,), 3)
    marks = "<s> </s> <pad> <unk> <s>" + "</s>\n<pad>"
    assert not set(model.encode(marks).tolist()) & {0, 1, 2, 3}
    assert all(min(ids, default=9) > 3 for ids in map(model.encode, HARD))


def test_marks_decode_to_nothing(model):
    ids = [model.bos, *model.encode("a b"), *model.eos, model.pad, 0]
    assert model.decode(ids) == "a b"


def test_stream_adds_up_and_never_shows_half_a_character(model):
    for text in [*HARD, *TEXTS, *random_texts(500, ALPHABET)]:
        stream, shown = model.stream(), ""
        for token in [model.bos, *model.encode(text)]:
            shown += stream.push(token)
            assert text.startswith(shown)
        assert shown + stream.flush() == text


def test_stream_equals_decode_on_any_ids(model):
    draw = np.random.default_rng(0)
    for _ in range(500):  # bytes most of all, so most of it is not UTF-8
        ids = draw.integers(0, 300, size=draw.integers(0, 12))
        stream = model.stream()
        pieces = [stream.push(int(i)) for i in ids]
        assert "".join(pieces) + stream.flush() == model.decode(ids)


def test_an_unfinished_character_comes_out_at_the_end(model):
    ids = model.encode("\U0001f680")  # not among the pieces: four bytes
    assert len(ids) >= 4
    stream = model.stream()
    assert [stream.push(int(i)) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\ufffd"


def test_training_is_repeatable_and_the_fingerprint_is_of_the_pieces(model, tmp_path):
    again = trained.train(TEXTS, 340, tmp_path / "a")
    assert again.fingerprint == model.fingerprint
    assert load.load(tmp_path / "a").fingerprint == model.fingerprint
    other = trained.train(TEXTS, 341, tmp_path / "b")
    assert other.fingerprint != model.fingerprint
    assert (model.vocab_size, other.vocab_size) == (340, 341)


def test_vocabulary_too_large_or_too_small_names_what_fits(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size=4096 is more.*set it to (\d+) or less") as e:
        trained.train(["hello hello world\n"], 4096, tmp_path)
    fits = int(str(e.value).split("set it to ")[1].split()[0])
    assert trained.train(["hello hello world\n"], fits, tmp_path).vocab_size == fits
    with pytest.raises(UserError, match=r"vocab_size=262 is less.*set it to \d+ or more"):
        trained.train(TEXTS, 262, tmp_path / "small")


def test_errors_of_the_user(model, tmp_path):
    with pytest.raises(UserError, match="no tokenizer in"):
        load.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load.load(tmp_path)
    for wrong in (-1, 340):
        with pytest.raises(UserError, match=f"token {wrong} is not in the vocabulary of 340"):
            model.decode([5, wrong])
    with pytest.raises(UserError, match="not Unicode"):
        model.encode("half \ud83d")


def test_sample_is_even_bounded_and_blind_to_the_order():
    texts = [f"{i}:".ljust(UNIT // 4, "x") for i in range(100)]
    forward, backward = TextSample(20 * UNIT // 4), TextSample(20 * UNIT // 4)
    for text in texts:
        forward.add(text)
    for text in reversed(texts):
        backward.add(text)
    kept = list(forward.texts())
    assert kept == list(backward.texts()) and len(kept) == 20
    places = sorted(int(text.split(":")[0]) for text in kept)
    assert places[0] < 25 and places[-1] > 75
    everything = TextSample(10**9)
    everything.add("ab" * UNIT)
    assert sorted(map(len, everything.texts())) == [UNIT, UNIT]
