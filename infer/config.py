"""The `decode`, `score`, `bench` and `recall` sections of an experiment.

DecodeConfig(prompt="Once", max_tokens=64, temperature=0.8, top_p=0.95)
"""

import dataclasses
from typing import Literal

from core.config import Section, UserError, setting
from infer.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Sampling):
    """What `python -m infer.decode` continues, and how."""

    checkpoint: str = setting("", "a bundle; empty is the workdir")
    step: int | None = setting(None, "of the bundle; None is the newest complete one", low=0)
    prompt: str = setting("", "one text; with no prompts either, a document from its start")
    prompts: str = setting(
        "",
        "a .txt (a prompt a line), a .jsonl (text or tokens; sampling of its own), - for stdin",
    )
    logprobs: bool = setting(False, "give the model's own log-probability of each new token")
    top_logprobs: int = setting(0, "give those of so many of the likeliest tokens too", low=0)
    prompt_logprobs: bool = setting(False, "give those of the prompt's tokens")
    stream: bool = setting(True, "show text as it comes, not when its row has ended")
    output: str = setting("", "a JSON lines file of the results")
    batch_size: int = setting(8, "rows at a time, over all devices", low=1)
    prefill_chunk: int = setting(512, "prompt tokens of a row in one step", low=1)

    def check(self) -> None:
        Sampling.check(self)
        if self.prompt and self.prompts:
            raise UserError(f"prompt={self.prompt!r} and prompts={self.prompts!r}: give one")


@dataclasses.dataclass(frozen=True)
class ScoreConfig(Section):
    """What `python -m infer.score` reads."""

    checkpoint: str = setting("", "a bundle; empty is the workdir")
    step: int | None = setting(None, "of the bundle; None is the newest complete one", low=0)
    input: str = setting("", "a .jsonl (text or tokens), a .txt (a text a line), - for stdin")
    output: str = setting("", "a JSON lines file of the results")
    batch_size: int = setting(8, "rows at a time, over all devices", low=1)
    prefill_chunk: int = setting(512, "tokens of a row in one step", low=1)


@dataclasses.dataclass(frozen=True)
class BenchConfig(Section):
    """The context-window sweep of `python -m infer.bench`: speed and memory, not quality."""

    checkpoint: str = setting("", "a bundle; empty is the workdir, or random weights")
    step: int | None = setting(None, "of the bundle; None is the newest complete one", low=0)
    contexts: tuple[int, ...] = setting(
        (256, 512, 1024, 2048, 4096, 8192, 16384), "tokens before the decoded ones", low=1
    )
    batch_size: int = setting(1, "rows at a time, over all devices", low=1)
    prefill_chunk: int = setting(512, "tokens of a row in one step", low=1)
    repeats: int = setting(3, "measurements of 8 decoded tokens; the median counts", low=1)
    output: str = setting("", "a folder; empty is WORKDIR/bench")

    def check(self) -> None:
        if not self.contexts:
            raise UserError("contexts=() is empty: give at least one")


@dataclasses.dataclass(frozen=True)
class RecallConfig(Section):
    """What `python -m infer.recall` asks a model trained on data.source=recall."""

    checkpoint: str = setting("", "a bundle; empty is the workdir")
    step: int | None = setting(None, "of the bundle; None is the newest complete one", low=0)
    lengths: tuple[int, ...] = setting(
        (1024, 2048, 4096, 8192, 16384), "tokens of a text with its question and answer", low=1
    )
    ropes: tuple[Literal["none", "pi", "ntk", "dynamic", "yarn"], ...] = setting(
        ("none",), "how RoPE is extended beyond model.context; each gives rows of its own"
    )
    factor: float = setting(16.0, "of model.context that ropes extend to", low=1)
    records: int = setting(32, "keys in a text, at even depths", low=1)
    asked: int = setting(8, "of them that are asked for, at even depths too", low=1)
    samples: int = setting(16, "texts a length", low=1)
    seed: int = setting(0, "of the texts", low=0)
    batch_size: int = setting(8, "texts at a time, over all devices", low=1)
    prefill_chunk: int = setting(512, "tokens of a row in one step", low=1)
    output: str = setting("", "a JSON file; empty is WORKDIR/recall.json")

    def check(self) -> None:
        for field in ("lengths", "ropes"):
            if not getattr(self, field):
                raise UserError(f"{field}=() is empty: give at least one")
