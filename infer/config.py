"""Sections that the commands of infer/ read: decode and score."""

import dataclasses
from typing import Literal

from core.config import Section, setting
from infer.sampling.params import Sampling
from model.cache.form import CacheConfig
from model.sizes.weights import Kind


@dataclasses.dataclass(frozen=True)
class BundleSection(Section):
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
    """The form in which weights are held."""

    NEEDS = {("weights_group", "weights"): "it is of int8 and int4"}

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
DRAWS_NOTHING = "beam search looks for the likeliest text and draws nothing"
AT_ITS_END = "the text of a beam search is known when the search has ended"


@dataclasses.dataclass(frozen=True)
class DecodeConfig(BundleSection, Sampling, Weights, CacheConfig):
    """Settings of `python -m infer.decode`: the prompts, and how to continue them."""

    EXCLUSIVE = {
        **CacheConfig.EXCLUSIVE,
        ("prompt", "prompts"): "they are two sources of prompts",
        ("cache_pages", "speculate"): "the pages that count are others when several tokens are "
        "checked at once, and the text would not be the same",
        ("beams", "speculate"): AT_ITS_END,
        ("beams", "top_logprobs"): AT_ITS_END,
        **{("beams", field.name): DRAWS_NOTHING for field in DRAWN},
    }
    NEEDS = {
        **CacheConfig.NEEDS,
        **Weights.NEEDS,
        ("draft", "speculate"): "a draft guesses the tokens of speculation",
        ("draft_step", "draft"): "it is a step of a draft bundle",
        ("length_penalty", "beams"): "it ranks the texts of beam search",
    }

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


@dataclasses.dataclass(frozen=True)
class ScoreConfig(BundleSection, Weights, CacheConfig):
    """Settings of `python -m infer.score`."""

    NEEDS = {**CacheConfig.NEEDS, **Weights.NEEDS}

    input: str = setting("", "a .jsonl (text or tokens), a .txt (a text a line), - for stdin")
    output: str = setting("", "a JSON lines file: rows are appended as they end; - for stdout")
