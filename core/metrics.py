"""Writer of training figures: JSON lines, and TensorBoard events (written without TensorFlow)."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from core.config import UserError
from core.storage import files

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and `tensorboard/` of a directory; process 0 alone does."""

    def __init__(self, directory: Path, after_step: int, evaluates_again: bool = False):
        """Drops the rows beyond `after_step`, which a resumed run writes again.

        With `evaluates_again` that holds for the evaluation of `after_step` too. Raises UserError
        for a file that holds other rows than ours.
        """
        self._rows = self._events = None
        if jax.process_index() != 0:
            return
        path = directory / METRICS

        def stays(row: dict) -> bool:
            again = evaluates_again and "eval_loss" in row
            return row["step"] < after_step + (not again)

        kept = [line for line, row in read_rows(path) if stays(row)]
        files.write_text(path, "".join(kept))
        self._rows = path.open("a")
        self._events = SummaryWriter(str(directory / TENSORBOARD), purge_step=after_step + 1)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """One row; None is a figure that is not known here."""
        if self._rows is None:
            return
        self._rows.write(json.dumps({"step": step, **values}) + "\n")
        self._rows.flush()
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._events.close()


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """Each line of the file, and the row that it holds; none if there is no file.

    A killed run may have left half a line at the end, which is left out. Raises UserError for
    another line that is no row of ours.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: move it away, or name another workdir")
    text = path.read_text(errors="replace") if path.exists() else ""
    found = []
    for line in (line for line in text.splitlines(keepends=True) if line.endswith("\n")):
        try:
            row = json.loads(line)
            assert type(row["step"]) is int
        except (ValueError, TypeError, KeyError, RecursionError, AssertionError):
            shown = repr(line[:80].strip())
            raise UserError(
                f"{path} holds a line that is no row of a run: {shown}; move it away, or name "
                "another workdir"
            ) from None
        found.append((line, row))
    return found
