"""What a sweep has measured so far, a JSON line each: an interrupted one goes on from there.

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


class Store:
    """The lines of a file, by what they are of."""

    def __init__(self, path: Path, depends: Mapping[str, Any]):
        """`depends`: what every line depends on. A line that a killed run left half is dropped."""
        self.path, self._depends = path, dict(depends)
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            path.write_text("".join(whole))
        self._found = {line["key"]: line["result"] for line in map(json.loads, whole)}

    def _key(self, of: Mapping[str, Any]) -> str:
        text = json.dumps({**self._depends, **of}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, of: Mapping[str, Any]) -> Any:
        """The result of what `of` describes; None if there is none yet."""
        return self._found.get(self._key(of))

    def put(self, of: Mapping[str, Any], result: Any) -> Any:
        """Adds a line, on the disk when this returns; the result as it will be read again."""
        text = json.dumps({"key": self._key(of), "of": dict(of), "result": result})
        with self.path.open("a") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[self._key(of)] = json.loads(text)["result"]
        return self.get(of)


def fingerprint(path: Path) -> str:
    """Of a file: its name, size and time of writing."""
    stat = path.stat()
    text = json.dumps([str(path.absolute()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
