"""RULER's rules of scoring, against cases worked by hand and against its own table."""

import pytest

from evals.ruler import tasks


def test_every_reference_counts():
    """niah, vt, cwe, fwe: the part of the references that a text contains."""
    references = [("123", "456"), ("abc",), ("x", "y", "z")]
    texts = ["it is 1234", "ABC!", "only y and Z"]
    assert tasks.score("vt", texts, references) == pytest.approx(72.22)  # (1/2 + 1 + 2/3) / 3
    assert tasks.score("niah_multivalue", texts[:1], references[:1]) == 50
    assert tasks.score("fwe", ["nothing"], [("abc",)]) == 0


def test_of_the_answers_to_a_question_one_is_enough():
    references = [("Paris", "the city of Paris"), ("blue", "azure")]
    texts = ["It is PARIS.", "green"]
    assert tasks.score("qa_1", texts, references) == 50
    assert tasks.score("qa_2", texts[:1], references[:1]) == 100
    assert tasks.score("cwe", texts, references) == 25


def test_control_characters_are_lines_and_spaces_stay():
    assert tasks.score("needle", ["\x00 12\t34 \n"], [("12\n34",)]) == 100
    assert tasks.score("needle", ["12 34"], [("1234",)]) == 0


def test_each_text_has_its_references():
    with pytest.raises(ValueError, match="shorter"):
        tasks.score("vt", ["a", "b"], [("a",)])


def test_effective_length_is_the_longest_above_llama_2():
    """Rows of RULER's table 3; the threshold itself does not exceed it."""
    lengths = [4096 << i for i in range(6)]
    rows = {
        65536: (96.5, 95.8, 95.4, 94.8, 88.4, 66.6),  # Llama 3.1 70B
        131072: (96.7, 95.8, 96.0, 95.9, 95.9, 94.4),  # Gemini 1.5 Pro
        4096: (88.1, 85.5, 84.5, 82.7, 75.5, 68.9),  # InternLM 2.5 7B
        None: (82.3, 78.4, 73.7, 69.1, 68.1, 65.0),  # LWM 7B
    }
    for length, scores in rows.items():
        assert tasks.effective_length(dict(zip(lengths, scores, strict=True))) == length
    assert tasks.effective_length({4096: 85.6}) is None
    assert tasks.effective_length({8192: 90.0, 4096: 80.0}) == 8192
    assert tasks.effective_length({}) is None


def test_averages_are_those_of_the_table():
    lengths = [4096 << i for i in range(6)]
    scores = dict(zip(lengths, (96.5, 95.8, 95.4, 94.8, 88.4, 66.6), strict=True))
    expected = {"average": 89.6, "weighted_increasing": 85.5, "weighted_decreasing": 93.7}
    for shuffled in (scores, dict(reversed(scores.items()))):
        assert tasks.averages(shuffled) == pytest.approx(expected, abs=0.05)
