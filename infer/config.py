"""The `decode`, `score` and `bench` sections of an experiment.

DecodeConfig(prompt="Once", max_tokens=64, temperature=0.8, top_p=0.95)
"""

import dataclasses

from core.config import Section, Unsupported, UserError, setting
from infer.sampling import Sampling
from model.cache_form import Form
from model.weights import Kind


@dataclasses.dataclass(frozen=True)
class Weights(Section):
    """How the weights are held."""

    weights: Kind = setting("compute", "model.dtype, or rounded to int8 or int4 when they are read")
    weights_group: int | None = setting(
        None,
        "inputs of a matrix that share a scale; 0 is all; None is all in int8, and in int4 as many "
        "as divide every matrix, up to 128",
        low=0,
    )


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Sampling, Weights, Form):
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
    share_prefix: int = setting(
        64, "a beginning of so many tokens that prompts share is read once; 0 is never", low=0
    )
    speculate: int = setting(0, "tokens guessed a step, for the model to check; 0 is off", low=0)
    ngram: int = setting(3, "guesses follow the last so many tokens, met before; or fewer", low=1)
    draft: str = setting("", "a bundle of a smaller model that guesses, instead of n-grams")
    draft_step: int | None = setting(None, "of draft; None is the newest complete one", low=0)
    beams: int = setting(0, "beam search: texts that are followed at a time; 0 is off", low=0)
    length_penalty: float = setting(
        1.0, "of beam search: a text scores its log-probability / new tokens ** this"
    )

    def check(self) -> None:
        Sampling.check(self)
        Form.check(self)
        if self.prompt and self.prompts:
            raise UserError(f"prompt={self.prompt!r} and prompts={self.prompts!r}: give one")
        if self.cache_pages and self.speculate:
            raise Unsupported(
                f"cache_pages={self.cache_pages} with speculate={self.speculate}: the pages that "
                "count are others when several tokens are checked at once, and the text would "
                "not be the same; set one of them to 0"
            )
        if self.cache_host and (self.share_prefix or self.beams):
            raise Unsupported(
                f"cache_host=True with share_prefix={self.share_prefix} and beams={self.beams}: "
                "rows of a cache are copied on the device alone; set both to 0"
            )
        if self.draft and not self.speculate:
            raise UserError(
                f"draft={self.draft!r} with speculate=0 guesses nothing: set speculate=4, say"
            )
        if self.draft_step is not None and not self.draft:
            raise UserError(f"draft_step={self.draft_step} is of no draft: set draft to a bundle")


@dataclasses.dataclass(frozen=True)
class ScoreConfig(Weights, Form):
    """What `python -m infer.score` reads."""

    checkpoint: str = setting("", "a bundle; empty is the workdir")
    step: int | None = setting(None, "of the bundle; None is the newest complete one", low=0)
    input: str = setting("", "a .jsonl (text or tokens), a .txt (a text a line), - for stdin")
    output: str = setting("", "a JSON lines file of the results")
    batch_size: int = setting(8, "rows at a time, over all devices", low=1)
    prefill_chunk: int = setting(512, "tokens of a row in one step", low=1)


@dataclasses.dataclass(frozen=True)
class BenchConfig(Weights, Form):
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
        Form.check(self)
        if not self.contexts:
            raise UserError("contexts=() is empty: give at least one")
