"""Continues texts: prompts in, text out as it is made.

    python -m infer.decode --config=configs/quickstart.py --config.decode.prompt="def "

Stdout carries the new text alone, the rest goes to stderr; decode.output gets JSON lines.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from core import cli, tree
from core.checkpoint import write_text
from core.config import Experiment, UserError
from core.sharding import MeshConfig, make_mesh, prefilling
from data.tokenizer_base import Tokenizer
from infer import load, text
from infer.config import DecodeConfig
from infer.engine import Engine, Plan
from infer.load import Found
from infer.sampling import Sampling
from infer.text import Prompt, Writer


@dataclasses.dataclass
class Row:
    """One sample of one prompt, while it grows."""

    prompt: Prompt
    sample: int
    writer: Writer | None  # None without a tokenizer: ids are the text
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length", or None while it grows
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    unshown: str = ""

    def add(self, token: int, logprob: float, eos: tuple[int, ...], max_tokens: int) -> None:
        """One more token; may end the row."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.unshown += self.writer.push(token) if self.writer else f"{token} "
        if token in eos or (self.writer and self.writer.stopped):
            self.finish_reason = "stop"
        elif len(self.tokens) == max_tokens:
            self.finish_reason = "length"
        if self.finish_reason and self.writer:
            self.unshown += self.writer.flush()
            if self.writer.stopped:  # by the half character that `flush` gave out
                self.finish_reason = "stop"

    def result(self, logprobs: bool) -> dict:
        """The row of decode.output."""
        row = {
            "prompt": self.prompt.text,
            "prompt_tokens": self.prompt.tokens.tolist(),
            "tokens": self.tokens,
            "text": self.writer.text if self.writer else None,
            "finish_reason": self.finish_reason,
            "logprobs": self.logprobs,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "tokens_per_second": len(self.tokens) / self.decode_seconds,
        }
        return row if logprobs else {k: v for k, v in row.items() if k != "logprobs"}


def main(experiment: Experiment) -> list[dict]:
    """Decodes what the `decode` section asks for; the rows of its output."""
    config: DecodeConfig = experiment.decode
    found = load.find(config.checkpoint or experiment.workdir, config.step)
    prompts = read_prompts(config, found)
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(make_mesh(experiment.mesh)):
        mesh = experiment.mesh
        model = load.restore(found, prefilling(mesh.strategy, mesh.ulysses, mesh.both_ways))
        longest = max(len(prompt.tokens) for prompt in prompts)
        num_rows = min(config.batch_size, len(prompts) * config.n)
        plan = Plan.of(num_rows, longest, config.max_tokens, config.prefill_chunk)
        how = Sampling(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Sampling)})
        engine = Engine(model, plan, found.tokenizer, how)
        print(header(found, config, tree.num_elements(model)), file=sys.stderr, flush=True)
        rows = [
            Row(prompt, sample, writer(prompt, config, found.tokenizer))
            for prompt in prompts
            for sample in range(config.n)
        ]
        show = Show(rows, config.stream)
        for first in range(0, len(rows), config.batch_size):
            for _ in decode(
                engine, rows[first : first + config.batch_size], config, found.tokenizer
            ):
                show.update()
        print(summary(engine, rows, config.batch_size), file=sys.stderr)
    results = [row.result(config.logprobs) for row in rows]
    if config.output:
        write_text(Path(config.output), "".join(json.dumps(row) + "\n" for row in results))
        print(f"{len(rows)} rows in {config.output}", file=sys.stderr)
    return results


def read_prompts(config: DecodeConfig, found: Found) -> list[Prompt]:
    """What to continue; UserError when it does not fit, before anything is compiled."""
    model, tokenizer = found.config, found.tokenizer
    if config.stop and tokenizer is None:
        raise UserError(f"decode.stop={config.stop!r}: the bundle has no tokenizer, hence no text")
    if config.prompts:
        vocab_size = tokenizer.vocab_size if tokenizer else model.vocab_size
        prompts = text.read(config.prompts, "decode.prompts", tokenizer, vocab_size)
    else:
        prompts = [text.from_text(config.prompt, f"decode.prompt={config.prompt!r}", tokenizer)]
    for number, prompt in enumerate(prompts, 1):
        room = model.context - len(prompt.tokens)
        if room < config.max_tokens:
            remedy = f"set it to {room} or less" if room > 0 else "shorten the prompt"
            raise UserError(
                f"prompt {number} has {len(prompt.tokens)} tokens, and with "
                f"decode.max_tokens={config.max_tokens} that is more than "
                f"model.context={model.context}: {remedy}"
            )
    return prompts


def writer(prompt: Prompt, config: DecodeConfig, tokenizer: Tokenizer | None) -> Writer | None:
    """What writes the text after a prompt; None where ids are the text."""
    return Writer(tokenizer, config.stop, prompt.tokens) if tokenizer else None


def decode(
    engine: Engine, rows: list[Row], config: DecodeConfig, tokenizer: Tokenizer | None
) -> Iterator[None]:
    """Grows one batch of rows to their ends; yields whenever they have grown."""
    prompts = [row.prompt.tokens for row in rows]
    eos = tokenizer.eos if tokenizer else ()
    began = engine.clock()
    now = jax.block_until_ready(engine.prefill(prompts))
    prefilled = engine.clock()
    samples = [row.sample for row in rows]
    state = engine.start(now, prompts, samples, config.max_tokens, config.seed)
    stopped_B = np.zeros(engine.plan.batch, bool)
    for tokens_BC, logprobs_BC in engine.decode(state, stopped_B):
        seconds = engine.clock() - prefilled
        for b, row in enumerate(rows):
            if row.finish_reason:
                continue
            row.prefill_seconds, row.decode_seconds = prefilled - began, seconds
            for token, logprob in zip(tokens_BC[b].tolist(), logprobs_BC[b].tolist(), strict=True):
                if not row.finish_reason:
                    row.add(token, logprob, eos, config.max_tokens)
            stopped_B[b] = bool(row.finish_reason)
        stopped_B[len(rows) :] = True
        yield


class Show:
    """Prints rows one after the other; the first that still grows is printed as it grows."""

    def __init__(self, rows: list[Row], stream: bool):
        self._rows, self._stream, self._front, self._begun = rows, stream, 0, False
        self._stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

    def update(self) -> None:
        """Prints what has become ready."""
        while self._front < len(self._rows):
            row = self._rows[self._front]
            if not row.tokens or not (row.finish_reason or self._stream):
                return
            if not self._begun:
                self._begin(row)
            sys.stdout.write(row.unshown)
            row.unshown = ""
            if row.finish_reason:
                sys.stdout.write("\n")
                self._front, self._begun = self._front + 1, False
            sys.stdout.flush()
            if not row.finish_reason:
                return

    def _begin(self, row: Row) -> None:
        """On a terminal the prompt stands, dimmed, before its text."""
        self._begun = True
        if self._stderr.is_terminal:
            prompt = row.prompt.text
            if prompt is None:
                prompt = " ".join(map(str, row.prompt.tokens.tolist())) + " "
            self._stderr.print(prompt, style="dim", end="")


def header(found: Found, config: DecodeConfig, num_parameters: int) -> str:
    """One line: what decodes, on what, and how."""
    device = jax.devices()[0]
    how = [f"temperature {config.temperature:g}" if config.temperature else "greedy"]
    for field in dataclasses.fields(Sampling):
        value = getattr(config, field.name)
        if field.name != "temperature" and value != field.default:
            how.append(f"{field.name} {value:g}")
    return (
        f"{found.path} step {found.step}, {num_parameters / 1e6:.1f} M parameters, "
        f"{jax.device_count()} x {device.device_kind}; {', '.join(how)}, seed {config.seed}"
    )


def summary(engine: Engine, rows: list[Row], batch_size: int) -> str:
    """One line: how fast prefill and decode were, over all rows, compilation apart."""
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    prefill = sum(batch[0].prefill_seconds for batch in batches)
    decode = sum(max(row.decode_seconds for row in batch) for batch in batches)
    read = sum(len(row.prompt.tokens) for row in rows)
    made = sum(len(row.tokens) for row in rows)
    return (
        f"prefill {read} tokens in {prefill:.2f} s ({read / prefill:,.0f} tokens/s); "
        f"decode {made} tokens in {decode:.2f} s ({made / decode:,.0f} tokens/s); "
        f"compilation {engine.compile_seconds:.1f} s"
    )


if __name__ == "__main__":
    cli.run(main, __doc__, decode=DecodeConfig, mesh=MeshConfig)
