"""One line of JSON: its value, or a reason of one line."""

import math

import pytest

from core.storage.json_lines import parse

GOOD = {
    '{"text": "x"}': {"text": "x"},
    b'\xef\xbb\xbf{"a": 1}\r\n': {"a": 1},
    '"\\ud83d\\ude00"': "\U0001f600",
    '"' + "[" * 300 + '"': "[" * 300,
    "[" * 3 + "]" * 3: [[[]]],
    "1" * 300: int("1" * 300),
}
BAD = {
    "": "it is not JSON: Expecting value (character 1)",
    "[" * 100_000: "it is nested more than 100 levels deep",
    "[" * 101 + "]" * 101: "it is nested more than 100 levels deep",
    "1" * 5000: "it holds a number of 5,000 digits, which is too long",
    "1" * 400: "it holds a number of 400 digits, which is too long",
    "[NaN]": "it is not JSON: NaN is no number there",
    "-Infinity": "it is not JSON: -Infinity is no number there",
    "1e999": "it holds the number 1e999, which is too large",
    '{"\\udc00": 1}': "\\udc00 is half a character (a lone surrogate)",
    '{"a": 1, "b": 2, "a": 3}': "it names 'a' twice",
    '{"a": "\0"}': "it is not JSON: Invalid control character at (character 8)",
    "{} {}": "it is not JSON: Extra data (character 4)",
    b'"\xff"': "'utf-8' codec can't decode byte 0xff in position 1: invalid start byte",
}


@pytest.mark.parametrize("line", GOOD, ids=lambda line: repr(line)[:20])
def test_value(line):
    assert parse(line) == GOOD[line]


@pytest.mark.parametrize("line", BAD, ids=lambda line: repr(line)[:20])
def test_reason(line):
    with pytest.raises(ValueError) as error:
        parse(line)
    assert str(error.value) == BAD[line]


def test_deepest_and_halves_for_a_caller_that_judges_them():
    value = parse("[" * 100 + "]" * 100)
    for _ in range(99):
        (value,) = value
    assert value == []
    assert parse('["\\ud800", -Infinity, 1e999]', lenient=True) == ["\ud800", -math.inf, math.inf]
