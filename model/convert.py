"""Public checkpoints in and out: a Hugging Face directory of safetensors, and a bundle.

    python -m model.convert --from_hf TinyLlama-1.1B --to_bundle runs/tinyllama
    python -m infer.decode --config=configs/quickstart.py --config.decode.checkpoint=runs/tinyllama

Tensor by tensor: the model is never whole in memory. What is written gets its name when it is
complete; nothing is overwritten. --dtype is that of the parameters, and the one that a bundle
computes in; else a bundle stores what the checkpoint does (float16 or mixed become float32, which
holds them) and computes in what config.json says, and an export has the bundle's.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from core import backend, checkpoint
from core.checkpoint import Bundle
from core.command import cli
from core.config import Experiment, UserError, to_json
from core.storage.files import write_text
from core.tokenizer import tokenizer_files
from model import families
from model.config import ModelConfig
from model.families.tensor import Tensor
from model.io import checkpoint_files, hf_export, hf_import, tokenizer_check
from model.io.checkpoint_files import CONFIG
from model.io.hf_import import Done
from model.sizes import parts

log = logging.getLogger("cakrawala")

PARTIAL = ".partial"  # ends the name of what is not complete


def from_hf(directory: Path, target: Path, dtype: str | None = None) -> None:
    """Imports a directory of safetensors as a bundle with one step."""
    began = time.perf_counter()
    source = checkpoint_files.find(directory)
    codes = sorted({entry.code for entry in source.entries.values()})
    config = source.config
    if dtype:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    dtype, source = config.param_dtype, source._replace(config=config)
    computing = f"computing in {config.dtype}"
    tokenizer_check.check(directory, config.vocab_size)
    with created(target) as partial:
        log.info(
            "%s is %s: %s, the bundle has %s", directory, " and ".join(codes), computing, dtype
        )
        experiment = Experiment(name=target.name, model=config)
        checkpoint.create(partial, to_json(experiment), None)
        tokenizer_files.import_tokenizer(directory, partial / checkpoint.TOKENIZER)
        with progress("importing", len(source.tensors)) as done:
            hf_import.save(source, partial, done)
    report(directory, target, source.tensors, f"{dtype}, {computing}", began)


def from_bundle(
    directory: Path, target: Path, dtype: str | None, shard_gb: float, step: int | None = None
) -> None:
    """Exports a step of a bundle as a directory of safetensors."""
    began = time.perf_counter()
    bundle = Bundle(directory)
    try:
        config, step = bundle.config(model=ModelConfig).model, bundle.choose(step)
        bundle.check(step, model=parts.shapes(config))
    finally:
        bundle.close()
    config_json, tensors = families.write(config), families.tensors(config)
    dtype = dtype or config.param_dtype
    config_json["torch_dtype"] = dtype
    with created(target) as partial:
        log.info("step %d of %s is written as %s", step, directory, dtype)
        if bundle.tokenizer:
            tokenizer_files.export_tokenizer(bundle.tokenizer, partial)
            bos, eos, pad = tokenizer_files.marks(bundle.tokenizer)
            ends = eos[0] if len(eos) == 1 else list(eos) or None
            config_json |= dict(bos_token_id=bos, eos_token_id=ends, pad_token_id=pad)
        with progress("exporting", len(tensors)) as done:
            where = bundle.path / str(step)
            hf_export.save(where, tensors, partial, jnp.dtype(dtype), shard_gb * 1e9, done)
        write_text(partial / CONFIG, json.dumps(config_json, indent=2) + "\n")
    report(directory, target, tensors, dtype, began)


@contextlib.contextmanager
def created(target: Path) -> Iterator[Path]:
    """A directory to fill, which gets the name `target` if nothing goes wrong."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is there already: name another, or remove it")
    partial = target.with_name(target.name + PARTIAL)
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{partial} is left of a conversion that was cut off, or of one that still runs: "
            "remove it, or name another target"
        ) from None
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    try:
        yield partial
        os.replace(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # TensorStore has ValueErrors for a disk that is full.
        if isinstance(error, OSError) or "os_error_code" in str(error):
            sys.exit(f"error: {target} could not be written, and nothing of it is left: {error}")
        raise


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Done]:
    """A bar on stderr that moves with each tensor."""
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[t]}"),
    )
    bar = Progress(TextColumn(title), *columns, console=console, disable=not console.is_terminal)
    task = bar.add_task("", total=total, t="")
    with bar:
        yield lambda name: bar.update(task, advance=1, t=name)


def report(source: Path, target: Path, tensors: list[Tensor], dtype: str, began: float) -> None:
    """The summary on stdout."""
    elements = sum(math.prod(tensor.layout.shape) for tensor in tensors)
    print(
        f"{source} -> {target}: {len(tensors)} tensors, {elements:,} parameters "
        f"in {dtype}, {time.perf_counter() - began:.1f} s"
    )


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows an example")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, one direction or the other."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="python -m model.convert",
        description=__doc__,
        formatter_class=form,
        allow_abbrev=False,
    )
    parser.add_argument("--from_hf", type=Path, metavar="DIR", help="a checkpoint's directory")
    parser.add_argument("--to_bundle", type=Path, metavar="DIR", help="the bundle to make of it")
    parser.add_argument("--from_bundle", type=Path, metavar="DIR", help="a bundle")
    parser.add_argument("--to_hf", type=Path, metavar="DIR", help="the directory to make of it")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of parameters and products"
    )
    parser.add_argument("--step", type=int, help="of the bundle; the newest complete one")
    parser.add_argument("--shard_gb", type=float, default=2.0, help="largest file of an export (2)")
    args = parser.parse_args(argv)
    inward, outward = (args.from_hf, args.to_bundle), (args.from_bundle, args.to_hf)
    chosen = [pair for pair in (inward, outward) if any(pair)]
    if len(chosen) != 1 or not all(chosen[0]):
        parser.error("give --from_hf DIR --to_bundle DIR, or --from_bundle DIR --to_hf DIR")
    if not args.shard_gb > 0:
        parser.error(f"--shard_gb={args.shard_gb} must be more than 0")
    return args


def main(argv: Sequence[str]) -> None:
    """Converts as the arguments say."""
    args = parse(argv)
    if args.from_hf:
        from_hf(args.from_hf, Path(os.path.realpath(args.to_bundle)), args.dtype)
    else:
        target = Path(os.path.realpath(args.to_hf))
        from_bundle(args.from_bundle, target, args.dtype, args.shard_gb, args.step)


if __name__ == "__main__":
    with cli.exits():
        backend.prepare(simulate=1)  # values stay on the host
        main(sys.argv[1:])
