"""Prepares the data of an experiment: raw text -> tokenizer and tokenised shards.

    python -m data.prepare --config=configs/quickstart.py

Writes WORKDIR/data: tokenizer/, train-*.bin, validation-*.bin, manifest.json and files.json, which
lists the others. They appear when all of them are there; running again replaces them. A folder
with files that this command did not write is refused.
"""

import dataclasses
import math
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from core.command import cli
from core.config import Experiment, UserError, to_dict
from core.storage import files, lock
from core.tokenizer import tokenizer_files
from data import store
from data.config import DataConfig
from data.curate import REMOVED, Text, curate
from data.texts.files import matches
from data.texts.sample import TextSample
from data.texts.sources import documents
from data.tokenizer import load, trained
from data.tokenizer.base import Tokenizer

SPLITS = ("train", "validation")
ENCODE_BYTES = 4_000_000  # of text at a time: enough to share lines, little beside the rest


def main(experiment: Experiment) -> dict[str, Any]:
    """Prepares `experiment.data` into WORKDIR/data; returns the manifest."""
    began = time.perf_counter()
    target = files.followed(Path(experiment.workdir, "data"))
    check_sources(experiment.data, target)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"workdir={experiment.workdir}: {target} cannot be made: {error.strerror}; name another"
        ) from None
    with lock.hold(target, "name another workdir"):
        files.refuse_foreign(target, "move it away, or name another workdir", store.MANIFEST)
        try:
            manifest = write(experiment.data, target)
        except OSError as error:
            sys.exit(f"error: {target} could not be written, and what was there stays: {error}")
    console = Console(stderr=True)
    console.print(summary(manifest))
    lines = f"{remarks(manifest)}\n{time.perf_counter() - began:.1f} s, in {target}"
    console.print(lines, markup=False, highlight=False, soft_wrap=True)
    return manifest


def check_sources(config: DataConfig, target: Path) -> None:
    """Raises UserError if a file to read lies in the folder that is to be written."""
    paths = matches(config.files) if config.source == "files" else []
    if config.source == "tfds" and config.tfds_dir:
        paths = [Path(config.tfds_dir)]
    for path in paths:
        if Path(os.path.realpath(path)).is_relative_to(target):
            raise UserError(
                f"data.{'tfds_dir' if config.source == 'tfds' else 'files'}: {path} lies in "
                f"{target}, which this command writes: move it, narrow the glob, or name another "
                "workdir"
            )


def write(config: DataConfig, target: Path) -> dict[str, Any]:
    """Replaces what an earlier run wrote to `target`; returns the manifest."""
    console = Console(stderr=True)
    # Disabled, or it would end with a blank line in a log.
    quiet = not console.is_terminal
    with (
        Progress(console=console, transient=True, disable=quiet) as progress,
        files.renewed(target, last=store.MANIFEST) as partial,
    ):
        return build(config, partial, progress)


def build(config: DataConfig, directory: Path, progress: Progress) -> dict[str, Any]:
    """Writes everything into `directory`; returns the manifest."""
    if config.tokenizer:
        model = given(config, directory / "tokenizer")
        found = survey(config, progress)
    else:
        found = survey(config, progress)
        task = progress.add_task("training the tokenizer", total=None)
        texts = found.sample.texts()
        model = trained.train(texts, config.vocab_size, directory / "tokenizer")
        progress.update(task, total=1, completed=1)
    # Of a text without bos the end token is what comes before, as GPT-2 was trained and lm-eval
    # counts: else the first token would be no target, and its bytes would count all the same.
    first = model.eos[0] if model.bos is None else model.bos

    task = progress.add_task("encoding", total=found.num_bytes)
    dtype = store.token_dtype(model.vocab_size)
    writers = {s: store.ShardWriter(directory, s, dtype, config.shard_tokens) for s in SPLITS}
    counts, packed_bytes = Counter(), 0
    for group in grouped(curate(documents(config), counts)):
        for item, ids in zip(group, model.encode_batch([t.text for t in group]), strict=True):
            split = item.split(config.validation_fraction)
            tokens = np.concatenate([[first], ids, [model.eos[0]]])
            writers[split].add(item.id, tokens, item.num_bytes)
            if split == "validation":
                packed_bytes += packed(item.text)
            progress.advance(task, item.num_bytes)

    splits = {split: writer.close() for split, writer in writers.items()}
    for split in SPLITS:
        if not splits[split]["documents"]:  # `survey` has found some
            raise UserError(
                f"data.source={config.source!r} changed while it was read: no document is left "
                f"for {split}; run it again when nothing writes there"
            )
    manifest = dict(
        config=to_dict(config),
        documents=tally(counts),
        tokenizer=model.fingerprint,
        vocab_size=model.vocab_size,
        first_token=first,
        dtype=dtype.name,
        bytes_per_token=_total(splits, "bytes") / _total(splits, "tokens"),
        gzip_bits_per_byte=8 * packed_bytes / splits["validation"]["bytes"],
        splits=splits,
    )
    store.write_manifest(directory, manifest)
    return manifest


def packed(text: str) -> int:
    """Bytes that `gzip -9` makes of a text, without its header and trailer.

    These are 18 bytes of every file, whatever is in it: more than all of a tiny document.
    """
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)  # negative: without either
    return len(deflate.compress(text.encode()) + deflate.flush())


def given(config: DataConfig, directory: Path) -> Tokenizer:
    """A copy in `directory` of the tokenizer that data.tokenizer names."""
    source = f"data.tokenizer={config.tokenizer}"
    try:
        model = load.load(config.tokenizer)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if config.vocab_size not in (DataConfig.vocab_size, model.vocab_size):
        raise UserError(
            f"data.vocab_size={config.vocab_size} is for a tokenizer to train, but {source} is "
            f"there already, with {model.vocab_size} tokens: set data.vocab_size to that"
        )
    if not model.eos:
        raise UserError(
            f"{source} names no token that ends a text: write eos_token_id into its "
            "generation_config.json"
        )
    tokenizer_files.import_tokenizer(config.tokenizer, directory)
    return model


@dataclasses.dataclass(frozen=True)
class Survey:
    """Findings of a first pass over the documents."""

    num_bytes: int  # of text that is kept
    sample: TextSample  # of the training documents: the tokenizer may not see the others


def survey(config: DataConfig, progress: Progress) -> Survey:
    """Reads all documents once. UserError when there are too few to split."""
    task = progress.add_task("reading", total=None)
    sample, counts, num_bytes, fractions = TextSample(config.tokenizer_bytes), Counter(), 0, []
    for item in curate(documents(config), counts):
        num_bytes += item.num_bytes
        fractions.append(item.fraction)
        if item.split(config.validation_fraction) == "train":
            sample.add(item.text)
        progress.update(task, advance=1)
    progress.update(task, total=1, completed=1)
    if len(fractions) < 2:
        dropped = ", ".join(f"{counts[kind]} {kind}" for kind in REMOVED if counts[kind])
        raise UserError(
            f"data.source={config.source!r} gave {len(fractions)} usable documents of "
            f"{counts['in']} read{f' ({dropped})' if dropped else ''}: give at least two, "
            "one to train on and one to validate on"
        )
    _check_split(config.validation_fraction, sorted(fractions))
    return Survey(num_bytes, sample)


def _check_split(fraction: float, drawn: list[float]) -> None:
    """Each document has a number drawn from its text; those below `fraction` validate."""
    number = f"data.validation_fraction={fraction} leaves no document of {len(drawn)} to"
    steps = 10**6  # the fraction proposed has six digits, rounded to the side that works
    if drawn[0] >= fraction:
        fits = (math.floor(drawn[0] * steps) + 1) / steps
        raise UserError(f"{number} validate on: set it to {fits:.6f} or more, or add documents")
    if drawn[-1] < fraction:
        fits = math.floor(drawn[-1] * steps) / steps
        raise UserError(f"{number} train on: set it to {fits:.6f} or less, or add documents")


def grouped(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Groups of consecutive texts of about ENCODE_BYTES."""
    group, num_bytes = [], 0
    for text in texts:
        group.append(text)
        num_bytes += text.num_bytes
        if num_bytes >= ENCODE_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def tally(counts: Counter) -> dict[str, Any]:
    """Documents read, kept, and removed by reason: read = kept + the sum of removed."""
    removed = {kind: counts[kind] for kind in REMOVED}
    return {"in": counts["in"], "kept": counts["kept"], "removed": removed}


def _total(splits: dict[str, Any], key: str) -> int:
    return sum(split[key] for split in splits.values())


def summary(manifest: dict[str, Any]) -> Table:
    """The table that the command ends with."""
    table = Table("split", *("documents", "MB", "tokens", "bytes/token"), box=box.SIMPLE)
    for name, split in manifest["splits"].items():
        ratio = split["bytes"] / split["tokens"]
        numbers = f"{split['documents']:,}", f"{split['bytes'] / 1e6:.2f}", f"{split['tokens']:,}"
        table.add_row(name, *numbers, f"{ratio:.3f}")
    return table


def remarks(manifest: dict[str, Any]) -> str:
    """The lines below the table: what was removed, and what a compressor makes of the text."""
    documents = manifest["documents"]
    removed = ", ".join(f"{number} {kind}" for kind, number in documents["removed"].items())
    return (
        f"{documents['in']:,} documents = {documents['kept']:,} kept + {removed}\n"
        f"gzip -9 of validation: {manifest['gzip_bits_per_byte']:.3f} bits per byte"
    )


if __name__ == "__main__":
    cli.run(main, __doc__, data=DataConfig)
