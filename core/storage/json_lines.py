"""One line of a JSON-lines file, or why it cannot be read.

parse('{"text": "x"}')  # {"text": "x"}
parse("[" * 100_000)  # ValueError: it is nested more than 100 levels deep
"""

import json
import math
import re
from typing import Any

DEPTH = 100  # lists and objects within each other; Python's own stack ends at about 1,000
HALF = re.compile(r"[\ud800-\udfff]")  # half of a pair of UTF-16, which is no character


def parse(line: bytes | str, *, lenient: bool = False) -> Any:
    """Returns the value that a line holds; a byte order mark before it is left out.

    Raises ValueError with a reason of one line that stands after "line 3: ". Bytes that are not
    UTF-8 raise UnicodeDecodeError, which is a ValueError. `lenient` lets NaN, Infinity and halves
    of characters pass, for a caller that judges texts itself and reads no numbers.
    """
    text = line.decode() if isinstance(line, bytes) else line
    text = text.removeprefix("\ufeff")
    too_deep = f"it is nested more than {DEPTH} levels deep"
    try:
        value = (_LENIENT if lenient else _STRICT).decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} (character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError(too_deep) from None
    # Only texts with this many brackets can be so deep, and they are few.
    if text.count("[") + text.count("{") > DEPTH and _is_deep(value):
        raise ValueError(too_deep)
    if not lenient and ("\\u" in text or not text.isascii()):
        found = HALF.search(json.dumps(value, ensure_ascii=False))
        if found:
            raise ValueError(f"\\u{ord(found[0]):x} is half a character (a lone surrogate)")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice!r} twice")
    return values


def _constant(name: str) -> None:
    raise ValueError(f"it is not JSON: {name} is no number there")


def _int(digits: str) -> int:
    try:
        value = int(digits)  # ValueError beyond Python's limit of digits
        float(value)  # OverflowError: a field of type float could not hold it
        return value
    except (ValueError, OverflowError):
        raise ValueError(
            f"it holds a number of {len(digits):,} digits, which is too long"
        ) from None


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        shown = digits if len(digits) <= 20 else f"{digits[:20]}..."
        raise ValueError(f"it holds the number {shown}, which is too large")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH):
        lists = (x.values() if type(x) is dict else x for x in level if type(x) in (dict, list))
        level = [x for values in lists for x in values]
    return any(type(x) in (dict, list) for x in level)


_LENIENT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_int)
_STRICT = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_int=_int, parse_float=_float
)
