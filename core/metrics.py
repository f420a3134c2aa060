"""Where figures go: a JSON object a line, and TensorBoard events (written without TensorFlow)."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and `tensorboard/` of a directory; process 0 alone does."""

    def __init__(self, directory: Path, after_step: int):
        """Rows of steps beyond `after_step` are dropped: a resumed run writes them again."""
        self._rows = self._events = None
        if jax.process_index() != 0:
            return
        path = directory / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A killed run may have left half a line at the end.
        kept = [s for s in lines if s.endswith("\n") and json.loads(s)["step"] <= after_step]
        path.write_text("".join(kept))
        self._rows = path.open("a")
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=after_step + 1)

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
