"""A cache of results in a JSON-lines file: an interrupted sweep goes on from there.

    store = Store(folder / "rows.jsonl", {"device": "cpu", ...})
    of = {"what": "speed", "context": 4096}
    result = store.get(of) or store.put(of, measure())

A line counts only under the key of all that it depends on. Once the report is written the file is
removed: the next run measures anew.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.storage import output, rows_file

NAME = "rows.jsonl"
START = b'{"key": "'  # begins every line


class Store:
    """The lines of a file, by what they are of."""

    def __init__(self, path: Path, depends: Mapping[str, Any]):
        """`depends`: what every line depends on. A line that a killed run left half is dropped."""
        self.path, self._depends = path, dict(depends)
        whole, cut = _lines(path.read_bytes() if path.is_file() else b"")
        if cut:
            os.truncate(path, sum(map(len, whole)))
        self._found = {line["key"]: line["result"] for line in map(json.loads, whole)}
        self._file = rows_file.RowsFile(str(path), "bench.output")

    def _key(self, of: Mapping[str, Any]) -> str:
        text = json.dumps({**self._depends, **of}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, of: Mapping[str, Any]) -> Any:
        """The result of what `of` describes; None if there is none yet."""
        return self._found.get(self._key(of))

    def put(self, of: Mapping[str, Any], result: Any) -> Any:
        """Adds a line, on the disk when this returns; the result as it will be read again."""
        text = json.dumps({"key": self._key(of), "of": dict(of), "result": result})
        self._file.append_line(text + "\n")
        self._file.sync()
        self._found[self._key(of)] = json.loads(text)["result"]
        return self.get(of)

    def remove(self) -> None:
        """Removes the file: the report has what was in it."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def _lines(content: bytes) -> tuple[list[bytes], bytes]:
    """(whole lines, what a killed run left of the next)."""
    *whole, cut = content.split(b"\n")
    return [line + b"\n" for line in whole], cut


def is_ours(content: bytes) -> bool:
    """Whether a file holds lines of a sweep and no others; the last may be cut off."""
    whole, cut = _lines(content)
    is_line = output.is_json("key", "of", "result")
    return all(map(is_line, whole)) and (START.startswith(cut) or cut.startswith(START))


def fingerprint(path: Path) -> str:
    """Returns a file's fingerprint: its name, size and time of writing."""
    stat = path.stat()
    text = json.dumps([str(path.absolute()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
