"""Where figures go: a JSON object a line, and TensorBoard events (written without TensorFlow)."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from core import files
from core.config import UserError

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

        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A killed run may have left half a line at the end.
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if stays(_row(path, line))]
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


def _row(path: Path, line: str) -> dict:
    try:
        row = json.loads(line)
        if type(row["step"]) is int:
            return row
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(
        f"{path} holds a line that is no row of ours: {line[:80].strip()!r}; move it away"
    )
