"""Continues texts: prompts in, text out as it is made.

    python -m infer.decode --config=configs/quickstart.py --config.decode.prompt="def "

Stdout carries the new text alone, the rest goes to stderr. decode.output gets JSON lines, in the
order of the prompts: a row is appended when it and all before it have ended, and a run that is cut
off appends the others that have ended too.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
from rich.console import Console

from core import backend
from core.command import cli
from core.config import Experiment
from core.sharding import MeshConfig, make_mesh, prefilling
from core.storage import rows_file, streams
from infer import load
from infer.config import DecodeConfig
from infer.engine import Engine, Plan
from infer.load import BundleInfo
from infer.prefix import PrefixCache
from infer.rows import Request, Timing, read_rows
from infer.sampling import beam
from infer.sampling.params import Sampling, SamplingBatch, pack
from infer.speculative import speculate
from infer.speculative.speculate import Speculator
from infer.steps import Made
from model.cache.form import CacheConfig
from model.ops.quantised import QuantConfig
from model.sizes import parts, weights


def main(experiment: Experiment) -> list[dict]:
    """Decodes what the `decode` section asks for; the rows of its output."""
    config: DecodeConfig = experiment.decode
    found = load.find(config.checkpoint or experiment.workdir, config.step, config.dtype)
    CacheConfig.of(config).apply(found.config)  # refuses what cannot be
    rows = read_rows(config, found)
    beam.check(config, rows, (found.tokenizer or found.config).vocab_size)
    found_draft = speculate.find_draft(config, found, rows)
    inputs = [("decode.prompts", config.prompts), *found.files("decode.checkpoint")]
    file = rows_file.RowsFile(config.output, "decode.output", inputs)
    backend.keep_programs(experiment.workdir)
    mesh = make_mesh(experiment.mesh)
    with file, streams.guarded(file.kept), jax.set_mesh(mesh), saved(rows, config, file) as save:
        mesh = experiment.mesh
        rules = prefilling(mesh.strategy, mesh.ulysses, mesh.both_ways)
        both = [each for each in (found, found_draft) if each]
        how = config.weights, config.weights_group
        roundings = [weights.rounding(each.config, rules, *how) for each in both]
        model, *draft = map(load.restore, both, [rules] * len(both), roundings)
        longest = max(len(row.prompt.tokens) for row in rows)
        length = max(len(row.prompt.tokens) + row.how.max_tokens for row in rows)
        asked, at_once = rows, min(config.batch_size, len(rows))
        if config.beams:
            asked = beam.asked(rows, config.beams)
            at_once = beam.at_once(config.batch_size, len(asked) // config.beams, config.beams)
        plan = Plan.of(at_once, longest, length - longest, config.prefill_chunk)
        engine = Engine(model, plan, found.tokenizer, config.top_logprobs, CacheConfig.of(config))
        print(header(found, config, rows, roundings[0]), file=sys.stderr, flush=True)
        packed = pack([row.how for row in rows])
        # Rows that go to stdout have it to themselves.
        show, spent = StreamPrinter([] if file.is_stdout else rows, config.stream), Timing()
        prompts, new = zip(*((row.prompt.tokens, row.how.max_tokens) for row in asked), strict=True)
        reader = PrefixCache(engine, prompts, new, config.share_prefix, config.prompt_logprobs)
        speculator = None
        if config.speculate:
            speculator = Speculator.of(config, reader, *draft)
        search = beam.Search(engine, config.beams, config.length_penalty) if config.beams else None
        for first in range(0, len(asked), at_once):
            part = slice(first, min(first + at_once, len(asked)))
            if search:
                grown = beam.decode(search, reader, rows, part, spent)
            else:
                grown = decode(reader, speculator, rows, part, packed.rows(part), spent)
            for _ in grown:
                save()
                show.update()
        print(summary(reader, rows, spent), file=sys.stderr)
        if speculator:
            print(speculator.summary(), file=sys.stderr)
        if config.output:
            print(file.told(), file=sys.stderr)
    return [row.result(config) for row in rows]


@contextlib.contextmanager
def saved(
    rows: list[Request], config: DecodeConfig, file: rows_file.RowsFile
) -> Iterator[Callable[[], None]]:
    """Gives a function that appends to the file what has ended, up to the first that has not.

    In the end, whatever it is (an error, Ctrl-C), the rows after that which have ended follow.
    """

    def save() -> None:
        while file.count < len(rows) and rows[file.count].finish_reason:
            file.append([rows[file.count].result(config)])

    try:
        yield save
    finally:
        save()
        file.append(row.result(config) for row in rows[file.count :] if row.finish_reason)


def decode(
    reader: PrefixCache,
    speculator: Speculator | None,
    rows: list[Request],
    part: slice,
    packed: SamplingBatch,
    spent: Timing,
) -> Iterator[None]:
    """Grows the rows of one batch, a part of all, to their ends; yields whenever they have grown.

    `packed` has the settings of the batch.
    """
    engine, rows = reader.engine, rows[part]
    eos = engine.static["eos"]
    began = engine.clock()
    now, scores = reader.read(part.start, part.stop)
    draft = speculator.read(part) if speculator else None
    for row, logprobs_T in zip(rows, scores, strict=bool(scores)):
        row.prompt_logprobs = logprobs_T.tolist()
    now, draft = jax.block_until_ready((now, draft))
    prefilled = engine.clock()
    prompts = [row.prompt.tokens for row in rows]
    state = engine.start(now, prompts, [row.sample for row in rows], packed)
    stopped_B = np.zeros(engine.plan.batch, bool)
    grown = engine.decode(state, stopped_B)
    if speculator:
        grown = speculator.decode(state, stopped_B, prompts, draft)
    for made in grown:
        seconds = engine.clock() - prefilled
        for b, row in enumerate(rows):
            if row.finish_reason:
                continue
            row.prefill_seconds, row.decode_seconds = prefilled - began, seconds
            for token, logprob, top in tokens_of(made, b):
                if token >= 0 and not row.finish_reason:
                    row.add(token, logprob, top, eos)
            stopped_B[b] = bool(row.finish_reason)
        stopped_B[len(rows) :] = True
        yield
    spent.add(prefilled - began, max(row.decode_seconds for row in rows))


def tokens_of(made: Made, b: int) -> Iterator[tuple[int, float, list[list]]]:
    """(token, log-probability, the likeliest with theirs) of row b, one after the other."""
    tops = [[] for _ in made.tokens_BC[b]]
    if made.top_tokens_BCJ is not None:
        pairs = zip(made.top_tokens_BCJ[b], made.top_logprobs_BCJ[b], strict=True)
        tops = [list(map(list, zip(ids.tolist(), x.tolist(), strict=True))) for ids, x in pairs]
    return zip(made.tokens_BC[b].tolist(), made.logprobs_BC[b].tolist(), tops, strict=True)


class StreamPrinter:
    """Prints rows one after the other; the first that still grows is printed as it grows."""

    def __init__(self, rows: list[Request], stream: bool):
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

    def _begin(self, row: Request) -> None:
        """Writes the prompt, dimmed, before its text, if this is a terminal."""
        self._begun = True
        if self._stderr.is_terminal:
            prompt = row.prompt.text
            if prompt is None:
                prompt = " ".join(map(str, row.prompt.tokens.tolist())) + " "
            self._stderr.print(prompt, style="dim", end="")


def header(
    found: BundleInfo, config: DecodeConfig, rows: list[Request], rounding: QuantConfig | None
) -> str:
    """One line: what decodes, on what, and how."""
    device = jax.devices()[0]
    how = [f"temperature {config.temperature:g}" if config.temperature else "greedy"]
    if config.beams:
        how = [f"{config.beams} beams, length_penalty {config.length_penalty:g}"]
    for field in dataclasses.fields(Sampling):
        value = getattr(config, field.name)
        if field.name not in ("temperature", "max_tokens", "seed") and value != field.default:
            how.append(f"{field.name} {value}")
    form = CacheConfig.of(config)
    how += [f"cache {form.name}"] * (form != CacheConfig())
    own = sum(bool(row.prompt.settings) for row in rows)
    how += [f"seed {config.seed}"] + [f"{own} of {len(rows)} rows set their own"] * bool(own)
    return (
        f"{found.path} step {found.step}, {parts.total(found.config) / 1e6:.1f} M parameters"
        f"{weights.text(rounding)}, {load.computing(found.config, 'decode', config.dtype)}, "
        f"{jax.device_count()} x {device.device_kind}; {', '.join(how)}"
    )


def summary(reader: PrefixCache, rows: list[Request], spent: Timing) -> str:
    """One line: how fast prefill and decode were, over all rows, compilation apart."""
    read, programs = reader.tokens_read, reader.engine.programs
    shared = sum(len(row.prompt.tokens) for row in rows) - read
    made = sum(len(row.tokens) for row in rows)
    prefill, decode = (f"{x:.2f} s" for x in (spent.prefill, spent.decode))
    saved = f" and {shared} shared" if shared else ""
    return (
        f"prefill {read} tokens{saved} in {prefill} ({read / spent.prefill:,.0f} tokens/s); "
        f"decode {made} tokens in {decode} ({made / spent.decode:,.0f} tokens/s); "
        f"compilation {programs.seconds:.1f} s ({len(programs.compiled)} programs)"
    )


if __name__ == "__main__":
    cli.run(main, __doc__, decode=DecodeConfig, mesh=MeshConfig)
