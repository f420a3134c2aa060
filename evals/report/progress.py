"""Progress on stderr, with the time left: a bar on a terminal, else a line a step."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn


class ProgressStep(NamedTuple):
    """One part of the work."""

    name: str
    kind: str  # steps of a kind are wrong about their time by the same factor, more or less
    seconds: float  # predicted


class Bar:
    """Shows steps one after the other. Predictions are corrected by what steps really took."""

    def __init__(self, steps: Sequence[ProgressStep]):
        self._left, self._done = list(steps), []
        self._count = len(steps)
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}")
        hidden = not console.is_terminal
        self._bar = Progress(SpinnerColumn(), *columns, console=console, disable=hidden)
        self._task = self._bar.add_task("", total=self.seconds_left(), left="")
        self._lines = hidden

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    @contextlib.contextmanager
    def step(self, step: ProgressStep) -> Iterator[None]:
        """Around the work of one of the steps."""
        text = f"[{len(self._done) + 1}/{self._count}] {step.name}"
        left = duration(self.seconds_left())
        if self._lines:
            print(f"{text}; about {left} left", file=sys.stderr, flush=True)
        self._bar.update(self._task, description=text, left=f"about {left} left")
        began = time.perf_counter()
        yield
        self._left.remove(step)
        self._done.append((step, time.perf_counter() - began))
        spent = sum(seconds for _, seconds in self._done)
        total = spent + self.seconds_left()
        self._bar.update(self._task, completed=spent, total=total)

    def seconds_left(self) -> float:
        """The predictions of all that is left, each times the factor of its kind so far."""
        overall = self._factor(self._done)
        total = 0.0
        for step in self._left:
            alike = [(one, seconds) for one, seconds in self._done if one.kind == step.kind]
            total += step.seconds * (self._factor(alike) if alike else overall)
        return total

    @staticmethod
    def _factor(done: Sequence[tuple[ProgressStep, float]]) -> float:
        predicted = sum(step.seconds for step, _ in done)
        return sum(seconds for _, seconds in done) / predicted if predicted else 1.0


def duration(seconds: float) -> str:
    """Seconds in words: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
