"""RULER's tasks: a reader of the prompt alone can solve them, and they fill the length."""

import collections
import json
import re

import pytest
import tokenizer_cases

from core.config import UserError
from data.tokenizer import load as tokenizers
from data.tokenizer.base import Tokenizer
from evals.ruler import counting, sample, tasks

MADE = [kind for kind in tasks.KINDS if kind not in tasks.QUESTIONS]
RETRIEVAL = [kind for kind in MADE if kind.startswith("niah")]
TEXT_KINDS = ["niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue"]
TEXT_KINDS += ["niah_multiquery"]
WORDS, NUMBER = r"[a-z]+-[a-z]+", r"\d{7}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.fixture(scope="module", params=["llama3", "llama2"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return tokenizers.load(tokenizer_cases.MAKERS[request.param](folder / "tokenizer"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Questions about 400 people, of which every second has two documents."""
    rows = []
    for i in range(400):
        context = [f"Person {i}\nPerson {i} lives in town {i * 7}, as everybody knows."]
        context += [f"Town {i * 7}\nThe mayor of town {i * 7} is mayor {i}."] * (i % 2)
        rows.append({"question": f"Who is {i}?", "answers": [f"town {i * 7}"], "context": context})
    path = tmp_path_factory.mktemp("questions") / "questions.json"
    path.write_text(json.dumps(rows))
    return tasks.read_questions(str(path), "bench.questions")


def make(kind, length, tokenizer, source, index=0, seed=0, text=None):
    return tasks.generate(kind, length, tokenizer, seed, index, text, source)


def solve(kind, prompt):
    """What a perfect model says."""
    if kind.startswith("niah") or kind == "needle":
        query = re.findall(r"for ([^?\n]+) mentioned in the provided text\?", prompt)[-1]
        keys = re.split(r", and |, ", query)
        return [v for key in keys for v in re.findall(rf" for {key} is: ([\w-]+)\.", prompt)]
    if kind == "vt":
        found = set(re.findall(r"assigned the value (\d+) in", prompt)[-1:])
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", prompt) * 2:
            found |= {name} if source in found else set()
        return [name for name in found if name.isalpha()]
    if kind == "cwe":
        return [word for word, _ in counted(prompt)[-1].most_common(10)]
    words = prompt.split("coded words. ")[1].split("\nQuestion")[0].replace("...", "").split()
    return [word for word, _ in collections.Counter(words).most_common(3)]


def counted(prompt):
    """The words of each list of a cwe prompt, with how often they appear."""
    lists = re.findall(r"most often\.\n(.*)\nQuestion", prompt)
    return [collections.Counter(re.findall(r"\d+\. (\w+)", words)) for words in lists]


def context(prompt):
    return prompt.split("\n", 1)[1].rsplit("\nWhat ", 1)[0]


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_prompt_and_its_answer_fill_the_length(kind, tokenizer, source):
    for length in (4096, 12000):
        made = make(kind, length, tokenizer, source)
        assert made.tokens == len(tokenizer.encode(made.text)) + 1  # bos
        assert 0.95 * length <= made.tokens + made.max_tokens <= length
        assert made.text.endswith(made.prefix) and made.prefix == made.prefix.rstrip()
        assert made.kind == kind


@pytest.mark.parametrize("kind", MADE)
def test_a_reader_of_the_prompt_finds_the_references(kind, tokenizer):
    for index, length in enumerate((3000, 6000, 20000)):
        made = make(kind, length, tokenizer, None, index)
        answer = solve(kind, made.text.removesuffix(made.prefix))
        assert sorted(answer) == sorted(made.references)
        assert tasks.score(kind, [", ".join(answer)], [made.references]) == 100


@pytest.mark.parametrize("kind", tasks.QUESTIONS)
def test_a_question_stands_with_its_documents(kind, tokenizer, source):
    places = []
    for index in (0, 7, 8, 9):
        made = make(kind, 3000, tokenizer, source, index)
        assert made.references == (f"town {index * 7}",)
        assert made.text.endswith(f"\n\nQuestion: Who is {index}? Answer:")
        documents = re.findall(r"Document (\d+):\n(.+)\n", made.text)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        titles = [title for _, title in documents]
        places.append(titles.index(f"Person {index}"))
        assert len(set(titles)) == len(titles) > 10
        wanted = [f"Person {index}"] + [f"Town {index * 7}"] * (index % 2)
        for depth, title in zip(made.depths, wanted, strict=True):
            assert depth == pytest.approx(titles.index(title) / (len(titles) - 1), abs=0.05)
    assert len(set(places)) > 2


def test_kinds_are_those_of_ruler(tokenizer, source):
    """Needles, keys, values and the tokens to write, of scripts/synthetic.yaml and constants.py."""
    needles = {  # how many, of what key and value, how many are asked for
        "niah_single_1": (1, WORDS, NUMBER, 1),
        "niah_single_2": (1, WORDS, NUMBER, 1),
        "niah_single_3": (1, WORDS, UUID, 1),
        "niah_multikey_1": (4, WORDS, NUMBER, 1),
        "niah_multikey_2": (None, WORDS, NUMBER, 1),
        "niah_multikey_3": (None, UUID, UUID, 1),
        "niah_multivalue": (4, WORDS, NUMBER, 4),
        "niah_multiquery": (4, WORDS, NUMBER, 4),
    }
    assert list(needles) == RETRIEVAL and len(tasks.KINDS) == 13
    for kind, (count, key, value, asked) in needles.items():
        made = make(kind, 4096, tokenizer, None)
        lines = re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", made.text)
        assert len(lines) == count or (count is None and len(lines) > 20)
        assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for _, k, v in lines)
        assert {name for name, _, _ in lines} == {"numbers" if value == NUMBER else "uuids"}
        keys = {k for _, k, _ in lines}
        assert len(keys) == (1 if kind == "niah_multivalue" else len(lines))
        assert (len(made.references), made.max_tokens) == (asked, 128)
        assert made.prefix.endswith(" are" if asked > 1 else " is")
        assert made.text.startswith("Some special" if asked > 1 else "A special magic ")
    budgets = {kind: make(kind, 6000, tokenizer, source).max_tokens for kind in tasks.KINDS[8:]}
    assert budgets == {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


@pytest.mark.parametrize("kind", RETRIEVAL)
def test_depths_are_where_the_needles_are(kind, tokenizer):
    for index in range(3):
        made = make(kind, 4096, tokenizer, None, index)
        hay = context(made.text)
        for value, depth in zip(made.references, made.depths, strict=True):
            assert made.text.count(value) == 1
            assert hay.index(value) / len(hay) == pytest.approx(depth, abs=0.02)


def test_a_chain_is_in_order_and_its_depths_are_told(tokenizer):
    made = make("vt", 6000, tokenizer, None)
    example, hay = made.text.rsplit("Memorize and track", 1)
    hay = hay.split("\n\n", 1)[1].split("\nQuestion")[0]
    chain = re.findall(r"VAR (\w+) = ", hay)
    assert chain == list(made.references) and [len(name) for name in chain] == [5] * 5
    places = [hay.index(f"VAR {name} = ") / len(hay) for name in chain]
    assert places == pytest.approx(made.depths, abs=0.02)
    assert [len(name) for name in re.findall(r"VAR (\w+) = ", example)] == [3] * 5
    assert example.rstrip().endswith(" ".join(re.findall(r"VAR (\w+) = ", example)))


@pytest.mark.parametrize("what", ["needle", "passkey"])
@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_a_needle_is_as_deep_as_asked(what, depth, tokenizer):
    made = getattr(tasks, what)(4096, depth, tokenizer, seed=3)
    assert 0.95 * 4096 <= made.tokens + made.max_tokens <= 4096
    assert made.depths[0] == pytest.approx(depth, abs=0.0 if depth in (0, 1) else 0.03)
    hay, (value,) = context(made.text), made.references
    line = next(part for part in re.findall(r"One of [^.]+\.|The pass key is [^?]+ key\.", hay))
    assert value in line
    assert hay.index(line) / (len(hay) - len(line)) == pytest.approx(made.depths[0])
    assert made.text.count(value) == (1 if what == "needle" else 2)
    assert re.fullmatch(NUMBER if what == "needle" else r"\d{5}", value)
    others = [getattr(tasks, what)(4096, depth, tokenizer, seed=3, index=i) for i in range(3)]
    assert others[0] == made and len({other.references for other in others}) == 3


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_sample_depends_on_its_numbers_alone(kind, tokenizer, source):
    first = [make(kind, 3000, tokenizer, source, index) for index in range(3)]
    again = [make(kind, 3000, tokenizer, source, index) for index in (2, 1, 0)]
    assert again[::-1] == first
    assert len({made.text for made in first}) == 3
    assert make(kind, 3000, tokenizer, source, seed=1).text not in {made.text for made in first}
    longer = make(kind, 4000, tokenizer, source)
    assert longer.references == first[0].references and longer.text != first[0].text


def test_samples_are_the_same_everywhere(tokenizer):
    """On any machine and any Python: scores of two runs are of the same questions."""
    assert make("niah_single_1", 1000, tokenizer, None).references == ("4988659",)


@pytest.mark.parametrize(
    "length, example, times", [(4000, (3, 1), (6, 1)), (6000, (10, 3), (30, 3))]
)
def test_common_words_appear_as_often_as_in_ruler(length, example, times, tokenizer):
    made = make("cwe", length, tokenizer, None)
    for found, (often, seldom) in zip(counted(made.text), (example, times), strict=True):
        assert sorted(set(found.values())) == [seldom, often]
        assert sum(count == often for count in found.values()) == 10
    shown, asked = counted(made.text)
    assert len(shown) == (20 if length < 4096 else 40) and not set(shown) & set(asked)


class Words(Tokenizer):
    """A word or a mark is a token, and texts do not start with bos."""

    vocab_size, fingerprint, bos, eos, pad = 1 << 20, "", None, (), None

    def _encode(self, texts, special):
        return [[0] * len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]

    def _decode(self, ids):
        raise NotImplementedError

    def stream(self, after=()):
        raise NotImplementedError


def test_lists_are_long_from_4096_tokens_on():
    """Where words are tokens; and without bos the whole length is used."""
    for length, often in ((4095, 6), (4096, 30)):
        made = make("cwe", length, Words(), None)
        assert max(counted(made.text)[-1].values()) == often
        assert made.tokens == len(Words().encode(made.text)) > length - 120 - 10


def test_frequent_words_follow_zipf():
    """100 / zeta(2) = 60.79, over 1, 4, 9, 16, 25."""
    assert counting.frequencies(100, 5) == [60, 15, 6, 3, 2]
    assert counting.frequencies(27, 5) == [16, 4, 1, 1, 0]
    # 50 would give 30, 7, 3, 1, 1: no one third word.
    assert counting.frequencies(50, 5) == [24, 6, 2, 1, 0]


def test_frequent_words_of_a_prompt_are_not_tied(tokenizer):
    for length in range(500, 900, 50):
        made = make("fwe", length, tokenizer, None)
        words = made.text.split("coded words. ")[1].split("\nQuestion")[0].split()
        (top, _), *rest = collections.Counter(words).most_common()
        assert top == "..." and rest[2][1] > (rest[3][1] if len(rest) > 3 else 0)


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_the_least_length_is_told(kind, tokenizer, source):
    with pytest.raises(UserError, match=rf"{kind} does not fit in length=60: .* at least \d+") as e:
        make(kind, 60, tokenizer, source)
    least = int(re.search(r"at least (\d+) tokens", str(e.value))[1])
    made = make(kind, least, tokenizer, source)
    assert made.tokens + made.max_tokens <= least
    with pytest.raises(UserError, match=f"length={least - 1}: .* at least {least} tokens"):
        make(kind, least - 1, tokenizer, source)


def test_a_long_answer_gets_more_tokens_than_in_ruler(tokenizer, tmp_path):
    row = {"question": "What?", "answers": ["short", "a long answer " * 20], "context": "Text."}
    path = tmp_path / "q.json"
    path.write_text(json.dumps([row]))
    made = make("qa_1", 2000, tokenizer, tasks.read_questions(str(path), "x"))
    asked, answered = tokenizer.encode_batch(["Answer:", "Answer: " + "a long answer " * 20])
    assert made.max_tokens == len(answered) - len(asked) > 32


@pytest.mark.parametrize("slope, bump", [(1, 0), (25, 0), (0.3, 0), (7, 40)])
def test_the_largest_that_fits(slope, bump):
    """Even where the sizes do not grow evenly, in few measurements."""
    asked = []

    def tokens(n):
        asked.append(n)
        return int(100 + slope * n + bump * (n // 97))

    for limit in (101, 500, 4096, 100_000):
        asked.clear()
        found = sample.largest(tokens, limit, 1, 2 * limit)
        if tokens(1) > limit:
            assert found is None
            continue
        assert tokens(found) <= limit and (found == 2 * limit or tokens(found + 1) > limit)
        assert len(asked) < 25
