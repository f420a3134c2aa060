"""The `decode`, `score`, `bench` and `recall` sections of an experiment.

DecodeConfig(prompt="Once", max_tokens=64, temperature=0.8, top_p=0.95)
"""

import dataclasses
from typing import Literal

from core.config import Section, Unsupported, UserError, setting
from infer.sampling import Sampling
from model.cache_form import Form
from model.weights import Kind


@dataclasses.dataclass(frozen=True)
class Rows(Section):
    """Rows of tokens through a bundle's model."""

    checkpoint: str = setting("", "a bundle; empty is the workdir")
    step: int | None = setting(None, "of the bundle; None is the newest complete one", low=0)
    dtype: Literal["", "float32", "bfloat16"] = setting(
        "", "in which the model computes; empty is as its bundle says"
    )
    batch_size: int = setting(8, "rows at a time, over all devices", low=1)
    prefill_chunk: int = setting(512, "tokens of a row in one step", low=1)


@dataclasses.dataclass(frozen=True)
class Weights(Section):
    """How the weights are held."""

    NEEDS = (("weights_group", "weights"),)

    weights: Kind = setting(
        "compute", "as dtype says, or rounded to int8 or int4 when they are read"
    )
    weights_group: int | None = setting(
        None,
        "inputs of a matrix that share a scale; 0 is all; None is all in int8, and in int4 as many "
        "as divide every matrix, up to 128",
        low=0,
    )


# The settings of which beam search has no use.
DRAWN = [field for field in dataclasses.fields(Sampling) if field.name not in ("max_tokens", "n")]


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Rows, Sampling, Weights, Form):
    """What `python -m infer.decode` continues, and how."""

    EXCLUSIVE = (
        *Form.EXCLUSIVE,
        ("prompt", "prompts"),
        ("cache_pages", "speculate"),
        ("beams", "speculate"),
        ("beams", "top_logprobs"),
        *(("beams", field.name) for field in DRAWN),
    )
    NEEDS = (
        *Form.NEEDS,
        *Weights.NEEDS,
        ("draft", "speculate"),
        ("draft_step", "draft"),
        ("length_penalty", "beams"),
    )

    prompt: str = setting("", "one text; with no prompts either, a document from its start")
    prompts: str = setting(
        "",
        "a .txt (a prompt a line), a .jsonl (text or tokens; sampling of its own), - for stdin",
    )
    logprobs: bool = setting(False, "give the model's own log-probability of each new token")
    top_logprobs: int = setting(0, "give those of so many of the likeliest tokens too", low=0)
    prompt_logprobs: bool = setting(False, "give those of the prompt's tokens")
    stream: bool = setting(True, "show text as it comes, not when its row has ended")
    output: str = setting("", "a JSON lines file: rows are appended as they end; - for stdout")
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
        if self.draft and not self.speculate:
            raise UserError(
                f"draft={self.draft!r} with speculate=0 guesses nothing: set speculate=4, say"
            )
        if self.draft_step is not None and not self.draft:
            raise UserError(f"draft_step={self.draft_step} is of no draft: set draft to a bundle")


@dataclasses.dataclass(frozen=True)
class ScoreConfig(Rows, Weights, Form):
    """What `python -m infer.score` reads."""

    NEEDS = (*Form.NEEDS, *Weights.NEEDS)

    input: str = setting("", "a .jsonl (text or tokens), a .txt (a text a line), - for stdin")
    output: str = setting("", "a JSON lines file: rows are appended as they end; - for stdout")


@dataclasses.dataclass(frozen=True)
class BenchConfig(Rows, Weights, Form):
    """The context-window report of `python -m infer.bench`."""

    EXCLUSIVE = (*Form.EXCLUSIVE, ("compare", "topology"))
    NEEDS = (*Form.NEEDS, *Weights.NEEDS)

    checkpoint: str = setting("", "a bundle; empty is the workdir, or random weights")
    contexts: tuple[int, ...] = setting(
        (),
        "tokens before the decoded ones; () is 1K, 2K, 4K ... up to what fits",
        low=1,
        high=2**24,
    )
    kv: tuple[str, ...] = setting(
        (),
        "other caches to compare: plain, int8, k8v4, int4, host, stream (1024 + 4), "
        "quest (128 pages)",
        commas="names",
    )
    beyond: bool = setting(False, "measure contexts longer than model.context too")
    batch_size: int = setting(1, "rows at a time, over all devices", low=1)
    repeats: int = setting(3, "timed calls of 8 decoded tokens; the median counts", low=1)
    decode_samples: int = setting(
        100, "single tokens timed one by one; the 99th percentile needs 100", low=1
    )
    price_per_hour: float = setting(0.0, "of all devices, for the cost; 0 is none", low=0)
    memory_gib: float = setting(0.0, "GiB of a device to plan for; 0 is what it has", low=0)
    text: tuple[str, ...] = setting(
        (),
        "globs of .txt files to tell the loss on; () is the validation split in WORKDIR/data",
        commas="paths",
    )
    loss_rows: int = setting(4, "texts a context for the loss by position; 0 is off", low=0)
    tasks: tuple[str, ...] = setting(
        (),
        "needle, passkey, RULER's kinds by name, ruler (all of those) or all; () is none",
        commas="names",
    )
    task_samples: int = setting(10, "samples of each task, or of each depth", low=1)
    depths: tuple[float, ...] = setting(
        (0.0, 0.25, 0.5, 0.75, 1.0), "of needle and passkey in their haystack", low=0, high=1
    )
    haystack: tuple[str, ...] = setting(
        (), "globs of .txt files; () is the built-in filler", commas="paths"
    )
    questions: str = setting("", "a JSON file for qa_1 and qa_2")
    compare: tuple[str, ...] = setting(
        (), "reports to overlay, folders or report.json; no model is run", commas="paths"
    )
    topology: str = setting(
        "", "a TPU slice to predict for by its compiler, as v5p:2x2x1; no model is run"
    )
    output: str = setting("", "a folder; empty is WORKDIR/bench (compare: WORKDIR/compare)")

    def check(self) -> None:
        Form.check(self)
        if len(self.compare) == 1:
            raise UserError(f"compare={self.compare} is one report: name two or more")
        if self.compare and self.topology:
            raise UserError(
                f"compare={self.compare} and topology={self.topology!r}: neither runs a model, and "
                "they are two commands; leave one out"
            )
        for name in ("contexts", "kv", "depths", "tasks"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{name}={values} names one of them twice")


@dataclasses.dataclass(frozen=True)
class RecallConfig(Rows):
    """What `python -m infer.recall` asks a model trained on data.source=recall."""

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
    output: str = setting("", "a JSON file; empty is WORKDIR/recall.json")

    def check(self) -> None:
        for field in ("lengths", "ropes"):
            if not getattr(self, field):
                raise UserError(f"{field}=() is empty: give at least one")
