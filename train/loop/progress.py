"""Progress of a run: a bar on a terminal, plain lines in a log; both on stderr."""

import time

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainProgress:
    """Shows steps, loss and speed; process 0 alone speaks."""

    LOG_SECONDS = 15  # between lines where there is no terminal

    def __init__(self, steps: int, first: int):
        self._console = Console(stderr=True, quiet=jax.process_index() != 0)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=first, figures="compiling")
        self._steps, self._spoke, self._rate = steps, time.perf_counter(), None

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *error):
        self._bar.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def step(self, step: int, loss: float) -> None:
        """Every step: moves the bar."""
        speed = f"{self._rate:,.0f} tokens/s" if self._rate else ""
        figures = f"loss {loss:.3f}  {speed}"
        self._bar.update(self._task, completed=step, figures=figures)

    def row(self, step: int, row: dict[str, float | None]) -> None:
        """Every logged step: the speed; a line where there is no bar."""
        self._rate = row["tokens_per_second"] or self._rate
        now = time.perf_counter()
        if self._console.is_terminal or now - self._spoke < self.LOG_SECONDS:
            return
        self._spoke = now
        speed = f", {self._rate:,.0f} tokens/s" if self._rate else ""
        self.say(f"step {step} of {self._steps}: loss {row['loss']:.3f}{speed}")
