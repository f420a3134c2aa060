"""Texts of data.source=recall: what can be known of them, how long they are, who gets which."""

import itertools
import re

import pytest

from core.config import Experiment, UserError
from data import prepare
from data.config import DataConfig
from data.texts import recall, sources
from data.tokenizer import load as tokenizers

RECORD, QUESTION = re.compile(r" ([A-Z]{2}) ([a-z]{2})"), re.compile(r" ([a-z]{2}) ([A-Z]{2})")


def records(text):
    """(key, value) of all lines that are no filler, and whether the key comes again there."""
    found = []
    for line in text.splitlines():
        if match := RECORD.fullmatch(line):
            found.append((match[2], match[1], False))
        elif match := QUESTION.fullmatch(line):
            found.append((match[1], match[2], True))
        else:
            assert line in recall.FILLER
    return found


def tokens(text):
    """Words and line ends."""
    return len(re.findall(r"\S+|\n", text))


def test_a_key_that_comes_again_has_the_value_it_had():
    again = 0
    for index in range(50):
        text = recall.document(0, index, 500)
        values = {}
        for key, value, is_again in records(text):
            assert is_again == (key in values)
            assert values.setdefault(key, value) == value
            again += is_again
        assert tokens(text) <= 500 and tokens(text) + 5 >= 500
    assert again > 50 * 10


def test_what_was_written_long_ago_comes_again_more_often():
    """Of the keys known, by when they were written last: a third of the way on average, not half.

    The mean of u^2 is 1/3, and a place is rounded down.
    """
    places = []
    for index in range(100):
        known = []
        for key, _, is_again in records(recall.document(0, index, 1000)):
            if is_again:
                if len(known) >= 10:
                    places.append(known.index(key) / len(known))
                known.remove(key)
            known.append(key)
    assert 0.25 < sum(places) / len(places) < 0.35


def test_documents_depend_on_the_seed_alone_and_differ():
    def some(seed, count=60):
        config = DataConfig(
            source="recall", recall_seed=seed, recall_tokens=300, limit_documents=count
        )
        return [(d.id, d.raw) for d in sources.documents(config)]

    first = some(0)
    assert first == some(0) and len({raw for _, raw in first}) == 60
    assert first[:20] == some(0, 20)
    assert not {raw for _, raw in first} & {raw for _, raw in some(1)}


def test_each_doubling_of_the_length_has_as_many_tokens():
    shares = dict.fromkeys(range(6, 10), 0)
    for document in itertools.islice(recall.documents(0, 64, 1024), 8000):
        size = tokens(document.raw.decode()) + 2  # a line less is missing at the end
        shares[max(6, min(size.bit_length() - 1, 9))] += size
    total = sum(shares.values())
    assert all(0.19 < share / total < 0.31 for share in shares.values()), shares


def test_texts_are_not_shorter_than_asked():
    sizes = [tokens(d.raw.decode()) for d in itertools.islice(recall.documents(0, 200, 300), 200)]
    assert min(sizes) > 200 - 10 and max(sizes) <= 300  # a line that does not fit is left out


@pytest.mark.parametrize("size", [141, 142, 143, 500, 1021])
def test_a_quiz_has_exactly_its_tokens_and_each_key_once(size):
    for index in range(20):
        quiz = recall.question(0, index, size, records=32, asked=8)
        found = records(quiz.text)
        assert tokens(quiz.text) == size and quiz.text.endswith("\n")
        assert len(found) == 32 == len({key for key, _, _ in found})
        assert len(quiz.asked) == 8 and {(*pair, False) for pair in quiz.asked} <= set(found)


def test_asked_records_stand_at_their_depths_and_are_the_same_at_every_length():
    short, long = (recall.question(0, 3, size, records=32, asked=8) for size in (1000, 9000))
    assert short.asked == long.asked and short.depths == long.depths
    for i, ((key, value), depth) in enumerate(zip(long.asked, long.depths, strict=True)):
        place = long.text.index(f" {value} {key}\n") / len(long.text)
        assert place == pytest.approx(depth, abs=0.02)
        assert i / 8 <= depth <= (i + 1) / 8
    assert recall.question(0, 4, 1000, 32, 8).asked != short.asked
    assert recall.question(1, 3, 1000, 32, 8).asked != short.asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tokens=100), "a quiz of 100 tokens.*121 tokens"),
        (dict(records=200), "records=200.*128 keys"),
        (dict(asked=40), "asked=40"),
    ],
)
def test_a_quiz_that_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        recall.question(**dict(seed=0, index=0, tokens=500, records=32, asked=8) | change)


def test_the_shortest_is_no_longer_than_the_longest():
    with pytest.raises(UserError, match="recall_shortest=600 with recall_tokens=500"):
        DataConfig(source="recall", recall_tokens=500, recall_shortest=600, limit_documents=5)


def test_never_ending_documents_need_a_number():
    with pytest.raises(UserError, match="limit_documents=0"):
        DataConfig(source="recall")


def test_prepared_texts_have_a_token_a_word(tmp_path):
    """With the vocabulary of configs/long_context_lab.py, which is no larger than it must be."""
    data = DataConfig(source="recall", recall_tokens=400, limit_documents=1500, vocab_size=576)
    prepare.main(Experiment(name="test", workdir=str(tmp_path), data=data))
    model = tokenizers.load(tmp_path / "data/tokenizer")
    quiz = recall.question(0, 0, 1000, recall.KEYS, 8)
    assert len(model.encode(quiz.text)) == 1000
    text = "".join(f" {key} {value}\n" for key in recall.KEY[:4] for value in recall.VALUE)
    assert len(model.encode(text)) == tokens(text)
