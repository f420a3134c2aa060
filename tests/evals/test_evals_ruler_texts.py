"""Texts and questions of the user for RULER's tasks, and what is said when they are wrong."""

import json
import re

import pytest
import tokenizer_cases

from core.config import UserError
from data.tokenizer import load as tokenizers
from evals.ruler import haystack, tasks, words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.load(tokenizer_cases.byte_level(tmp_path_factory.mktemp("tokenizer")))


def write(path, text):
    path.write_text(text)
    return str(path)


def test_text_of_the_user_is_the_haystack(tokenizer, tmp_path):
    write(tmp_path / "b.txt", "Second file. Is it? Yes!")
    write(tmp_path / "a.txt", "First  file,\nwith <s> a {brace}.")
    text = tasks.read_haystack((f"{tmp_path}/*.txt",), "bench.haystack")
    whole = "First file, with <s> a {brace}. Second file. Is it? Yes!"
    assert text.text == whole and text.name == f"{tmp_path}/*.txt"
    assert text.sentences(11) == [whole[:31], "Second file.", "Is it?", "Yes!"]
    made = tasks.generate("niah_single_2", 3000, tokenizer, 0, 0, text)
    assert made.haystack == text.name and made.text.count("Second file.") > 20
    without = re.sub(r"One of the special magic .*?\. ", "", made.text)
    assert f"Yes! {whole} {whole} First file" in without
    assert tasks.generate("niah_single_2", 3000, tokenizer, 0, 0).haystack == "built-in filler"
    assert tasks.generate("niah_single_1", 3000, tokenizer, 0, 0, text).haystack == "noise"


def test_text_without_stops_or_spaces_is_cut(tokenizer, tmp_path):
    path = write(tmp_path / "a.txt", "word " * 120 + "x" * 100)
    text = tasks.read_haystack((path,), "bench.haystack")
    assert [len(part.split()) for part in text.sentences(123)] == [50, 50, 23]
    assert max(map(len, text.words)) == 40
    made = tasks.needle(4096, 0.5, tokenizer, 0, text=text)
    assert made.depths[0] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", ["niah_single_2", "niah_single_3", "niah_multiquery"])
def test_a_value_or_a_key_that_the_text_has_is_not_drawn(kind, tokenizer, tmp_path):
    before = tasks.generate(kind, 3000, tokenizer, 0, 0)
    keys = re.findall(r" for ([\w-]+) is: ", before.text)
    taken = " ".join([*before.references, *keys])
    path = write(tmp_path / "a.txt", f"Nobody knows why {taken} is here. " * 3)
    text = tasks.read_haystack((path,), "bench.haystack")
    after = tasks.generate(kind, 3000, tokenizer, 0, 0, text)
    assert not {*before.references} & {*after.references}
    assert not {*keys} & {*re.findall(r" for ([\w-]+) is: ", after.text)}
    assert all(after.text.count(value) == 1 for value in after.references)


def test_a_needle_is_not_among_the_needles_nobody_asks_for(tokenizer, monkeypatch):
    """With three keys in all, each line but the needle has one of the other two."""
    monkeypatch.setattr(words, "ADJECTIVES", ["red"])
    monkeypatch.setattr(words, "NOUNS", ["sea", "sun", "sky"])
    made = tasks.generate("niah_multikey_2", 3000, tokenizer, 0, 0)
    key = re.findall(r"for (\S+) mentioned", made.text)[0]
    found = re.findall(r" for (\S+) is: ", made.text)
    assert found.count(key) == 1 and len(found) > 20


def test_the_filler_goes_on_as_it_began():
    short, long = words.filler(100), words.filler(5000)
    assert long[: len(short)] == short and len(long) >= 5000
    text = " ".join(long)
    assert not re.search(r"[\d-]", text) and len(set(re.split(r"(?<=\.) ", text))) > 300
    assert haystack.builtin(5000).words[:5000] == long[:5000]


def test_what_haystack_is_wrong(tmp_path):
    write(tmp_path / "empty.txt", " \n")
    write(tmp_path / "a.md", "text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, message in {
        "none*.txt": r"bench.haystack: .*none\*.txt matches no file; check",
        "empty.txt": r"bench.haystack=.*empty.txt.* has no words",
        "a.md": r"bench.haystack: .*a.md is not a .txt",
        "latin.txt": r"bench.haystack: .*latin.txt is not UTF-8",
    }.items():
        with pytest.raises(UserError, match=message):
            tasks.read_haystack((f"{tmp_path}/{name}",), "bench.haystack")


def rows(count):
    return [
        {"question": f"Q{i}?", "answers": [f"A{i}"], "context": f"Text {i} says A{i}. " * 5}
        for i in range(count)
    ]


def test_documents_of_the_same_article_come_first(tokenizer, tmp_path):
    data = rows(60)
    data[0]["more"] = [data[0]["context"], data[3]["context"], "Only here. " * 5]
    path = write(tmp_path / "q.json", json.dumps(data))
    source = tasks.read_questions(path, "bench.questions")
    assert len(source.documents) == 61
    short = tasks.generate("qa_1", 900, tokenizer, 0, 0, source=source)
    assert "Only here." in short.text and "Text 3 says" in short.text
    assert short.text.count("Document ") < 10 and short.text.count(data[0]["context"]) == 1
    # A file that is smaller than the context is there as a whole, once.
    whole = tasks.generate("qa_1", 50_000, tokenizer, 0, 1, source=source)
    assert whole.text.count("\n\nDocument ") == 61 and whole.tokens < 10_000
    assert "Text 1 says A1" in whole.text and whole.references == ("A1",)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "bench.questions=.* is not JSON"),
        ("{}", "is not a list of questions; it must be .*question"),
        ("[]", "is not a list of questions"),
        ("[3]", "question 1 is int"),
        ('[{"answers": ["a"], "context": "c"}]', "question 1: question must be a string"),
        ('[{"question": "q", "answers": "a", "context": "c"}]', "answers must be a list of texts"),
        ('[{"question": "q", "answers": [], "context": "c"}]', "answers must be a list of texts"),
        ('[{"question": "q", "answers": ["a"]}]', "context must be a list of texts"),
        ('[{"question": "q", "answers": [""], "context": "c"}]', "answers must be a list of texts"),
    ],
)
def test_what_question_file_is_wrong(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        tasks.read_questions(write(tmp_path / "q.json", content), "bench.questions")


def test_what_is_asked_for_is_wrong(tokenizer, tmp_path):
    with pytest.raises(UserError, match="bench.questions=no.json: there is no such file; .*JSON"):
        tasks.read_questions("no.json", "bench.questions")
    with pytest.raises(UserError, match="kind='niah' is not one of niah_single_1, "):
        tasks.generate("niah", 4096, tokenizer, 0, 0)
    with pytest.raises(UserError, match="qa_2 needs questions, .*JSON file of the form"):
        tasks.generate("qa_2", 4096, tokenizer, 0, 0)
    source = tasks.read_questions(write(tmp_path / "q.json", json.dumps(rows(2))), "x")
    with pytest.raises(UserError, match="has 2 questions, so there is no sample 2 of qa_1"):
        tasks.generate("qa_1", 4096, tokenizer, 0, 2, source=source)
    for call in (tasks.needle, tasks.passkey):
        with pytest.raises(UserError, match="depth=1.5 is out of range"):
            call(4096, 1.5, tokenizer, 0)
