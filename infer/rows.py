"""The rows to decode: each sample of each prompt, with its own settings, checked.

    rows = read_rows(DecodeConfig(prompts="prompts.jsonl", n=2), found)

A mistake in any row is a UserError, before any weights are read or anything is compiled.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from core.config import UserError, build, unknown_field
from data.tokenizer.base import Tokenizer
from infer import text
from infer.config import DecodeConfig
from infer.load import BundleInfo
from infer.sampling.params import NO_ID, Sampling
from infer.text import Detokenizer, Prompt
from model.cache.form import CacheConfig

SHOWN = 40  # characters of a prompt in errors


@dataclasses.dataclass
class Request:
    """One sample of one prompt, while it grows."""

    prompt: Prompt
    how: Sampling
    sample: int
    writer: Detokenizer | None  # None without a tokenizer: ids are the text
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length", or None while it grows
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    unshown: str = ""
    score: float | None = None  # of beam search

    def add(self, token: int, logprob: float, top: list, eos: tuple[int, ...]) -> None:
        """One more token; may end the row."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top_logprobs.append(top)
        self.unshown += self.writer.push(token) if self.writer else f"{token} "
        reason = None
        if token in eos or (self.writer and self.writer.stopped):
            reason = "stop"
        elif len(self.tokens) == self.how.max_tokens:
            reason = "length"
        if reason and self.writer:
            self.unshown += self.writer.flush()
            if self.writer.stopped:  # by the half character that `flush` gave out
                reason = "stop"
        self.finish_reason = reason  # last: from now on the row is whole

    def result(self, config: DecodeConfig) -> dict:
        """The row of decode.output."""
        row = {
            "prompt": self.prompt.text,
            "prompt_tokens": self.prompt.tokens.tolist(),
            "tokens": self.tokens,
            "text": self.writer.text if self.writer else None,
            "finish_reason": self.finish_reason,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": len(self.tokens) / self.decode_seconds,
        }
        if self.score is not None:
            row["score"] = self.score
        if config.logprobs:
            row["logprobs"] = self.logprobs
        if config.top_logprobs:
            row["top_logprobs"] = self.top_logprobs
        if config.prompt_logprobs:
            row["prompt_logprobs"] = [None, *self.prompt_logprobs]
        return row


@dataclasses.dataclass
class Timing:
    """Seconds of all batches so far."""

    prefill: float = 0.0
    decode: float = 0.0

    def add(self, prefill: float, decode: float) -> None:
        """One batch more."""
        self.prefill, self.decode = self.prefill + prefill, self.decode + decode


def read_rows(config: DecodeConfig, found: BundleInfo) -> list[Request]:
    """Returns the rows to continue. Raises UserError for one that cannot be."""
    tokenizer, vocab_size = found.tokenizer, (found.tokenizer or found.config).vocab_size
    if config.top_logprobs > vocab_size:
        raise UserError(
            f"decode.top_logprobs={config.top_logprobs} is more than the {vocab_size} tokens of "
            "the vocabulary: lower it"
        )
    if config.prompts:
        prompts = text.read(config.prompts, "decode.prompts", tokenizer, vocab_size)
    else:
        cut = config.prompt[:SHOWN] + "..." * (len(config.prompt) > SHOWN)
        prompts = [text.from_text(config.prompt, f"decode.prompt={cut!r}", tokenizer)]
    rows = []
    for prompt in prompts:
        how = settings(config, prompt)
        check(how, prompt, found, CacheConfig.of(config))
        rows += [Request(prompt, how, i, writer(prompt, how, tokenizer)) for i in range(how.n)]
    return rows


def settings(config: DecodeConfig, prompt: Prompt) -> Sampling:
    """Returns the settings of the decode section, overridden by those of the prompt's line."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(Sampling)}
    given = dict(prompt.settings)
    try:
        for name in given:
            if name not in values:
                raise UserError(unknown_field(name, name, [*values, "text", "tokens"]))
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        if isinstance(given.get("logit_bias"), Mapping):
            given["logit_bias"] = _pairs(given["logit_bias"])
        return build(Sampling, {**values, **given})
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}") from None


def _pairs(bias: Mapping[str, Any]) -> list[tuple[int, Any]]:
    """logit_bias as JSON has it: ids are strings there."""
    for token in bias:
        if not token.isdecimal() or len(token) > len(str(NO_ID)):
            raise UserError(f"logit_bias names {token[:SHOWN]!r}, which is not the id of a token")
    return [(int(token), value) for token, value in bias.items()]


def check(how: Sampling, prompt: Prompt, found: BundleInfo, form: CacheConfig) -> None:
    """UserError where settings do not go with the prompt, the model or its vocabulary."""
    tokenizer, context = found.tokenizer, found.config.context
    if how.stop and tokenizer is None:
        raise UserError(
            f"{prompt.where}: stop={how.stop!r}, but the bundle has no tokenizer, hence no text"
        )
    room = context - len(prompt.tokens)
    if room < how.max_tokens and not form.cache_window:
        remedy = f"set it to {room} or less" if room > 0 else "shorten the prompt"
        raise UserError(
            f"{prompt.where} has {len(prompt.tokens)} tokens, and with max_tokens="
            f"{how.max_tokens} that is more than model.context={context}: {remedy}, or train for "
            "a longer context (configs/finetune.py, with RoPE scaling in model.pattern), or set "
            "decode.cache_window, which needs none"
        )
    _check_tokens(how, prompt.where, (tokenizer or found.config).vocab_size, tokenizer)


def _check_tokens(how: Sampling, where: str, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Ids must be of the vocabulary, and leave one to draw."""
    biased = [token for token, _ in how.logit_bias]
    lists = dict(
        logit_bias=biased, allowed_tokens=how.allowed_tokens, banned_tokens=how.banned_tokens
    )
    for name, tokens in lists.items():
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise UserError(
                    f"{where}: {name} names token {token}, which is not in the vocabulary of "
                    f"{vocab_size}"
                )
    never = {*how.banned_tokens, *(tokenizer.eos if tokenizer and how.min_tokens else ())}
    left = len({*how.allowed_tokens} - never) if how.allowed_tokens else vocab_size - len(never)
    if not left:
        raise UserError(
            f"{where}: allowed_tokens, banned_tokens and min_tokens={how.min_tokens} (which "
            "keeps end tokens away) leave no token to draw: allow one more"
        )


def writer(prompt: Prompt, how: Sampling, tokenizer: Tokenizer | None) -> Detokenizer | None:
    """Returns the writer of the text after a prompt; None without a tokenizer."""
    return Detokenizer(tokenizer, how.stop, prompt.tokens) if tokenizer else None
