"""A directory of a public checkpoint: its config, and where each of its tensors is.

    source = find("TinyLlama-1.1B")     # config and headers are checked, no values are read
    source.config, source.entries["model.norm.weight"]

Nothing is guessed: a tensor that is missing, too many or of another shape is refused by name.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.checkpoint import read_json
from core.config import UserError
from model import families
from model.config import ModelConfig
from model.families.tensor import Tensor
from model.io import safetensors
from model.io.safetensors import DTYPES, Entry

CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SHOWN = 5  # names in a message


class CheckpointSource(NamedTuple):
    """A checkpoint whose headers agree with its config, whose dtypes are the checkpoint's own."""

    config: ModelConfig
    tensors: list[Tensor]
    entries: dict[str, Entry]  # by the names in `tensors`


def find(directory: str | Path) -> CheckpointSource:
    """Checks a directory without reading values; UserError names what is wrong with it."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: there is no such directory")
    headers = {path: safetensors.header(path) for path in weight_files(directory)}
    check_index(directory, headers)
    if not (directory / CONFIG).is_file():
        raise UserError(f"{directory} has no {CONFIG}: it is no directory of a checkpoint")
    config_json = read_json(directory / CONFIG)
    config = families.read(config_json)
    tensors = families.tensors(config)
    entries = named(headers, config)
    head = duplicate_head(config)
    check_names(directory, tensors, entries, allowed=head)
    if head in entries:
        check_same_head(directory, tensors, entries, head)
        del entries[head]
    check_shapes(directory, tensors, entries)
    check_dtypes(directory, entries)
    codes = {entry.code for entry in entries.values()}
    stored = "bfloat16" if codes == {"BF16"} else "float32"  # which holds every float16
    # transformers, too, computes in the dtype that config.json names. bfloat16 would round float16.
    dtypes = {"bfloat16": "bfloat16", "float32": "float32", "float16": "float32"}
    compute = dtypes.get(families.declared_dtype(config_json), stored)
    config = dataclasses.replace(config, dtype=compute, param_dtype=stored)
    return CheckpointSource(config, tensors, entries)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files: the one, or those that the index names."""
    whole, index = directory / WHOLE, directory / INDEX
    if whole.is_file() and index.is_file():
        raise UserError(f"{directory} has both {WHOLE} and {INDEX}: remove the one not meant")
    if whole.is_file():
        return [whole]
    if index.is_file():
        names = sorted(set(weight_map(index).values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise UserError(f"{index} names {outside[0]!r}, which is not in its directory")
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{index} names {_some(missing)}, not there; get them again")
        return [directory / name for name in names]
    raise UserError(no_weights(directory))


def no_weights(directory: Path) -> str:
    """Why a directory has no weights for us."""
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    loose = sorted(p.name for p in directory.glob("*.safetensors"))
    if loose:
        return f"{directory} has {_some(loose)}, but neither {WHOLE} nor {INDEX}"
    if pickles:
        return (
            f"{directory} holds its weights in {_some(pickles)}, a PyTorch pickle: opening one "
            "runs whatever code its author put in. Take the safetensors files of the same model, "
            "or save it again with transformers: model.save_pretrained(DIR) writes safetensors"
        )
    return f"{directory} has no weights: neither {WHOLE} nor {INDEX}"


def weight_map(index: Path) -> dict[str, str]:
    """File names by tensor name."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} has no weight_map from tensors to files")
    return found


def check_index(directory: Path, headers: dict[Path, dict[str, Entry]]) -> None:
    """UserError unless each tensor of the index is in its file, and in no other."""
    if not (directory / INDEX).is_file():
        return
    told = weight_map(directory / INDEX)
    lost = [f"{t} (in {f})" for t, f in told.items() if t not in headers[directory / f]]
    if lost:
        raise UserError(f"{directory / INDEX} names tensors that are not there: {_some(lost)}")
    more = [f"{t} (in {p.name})" for p, h in headers.items() for t in h if told.get(t) != p.name]
    if more:
        raise UserError(f"{directory / INDEX} does not name tensors that are there: {_some(more)}")


def named(headers: dict[Path, dict[str, Entry]], config: ModelConfig) -> dict[str, Entry]:
    """Entries by canonical name, without what may be dropped."""
    entries: dict[str, Entry] = {}
    for entry in (entry for header in headers.values() for entry in header.values()):
        name = families.canonical(entry.name, config)
        if name in entries:
            raise UserError(f"{entry.path}: {entry.name} and {entries[name].name} are the same")
        if name is not None:
            entries[name] = entry
    return entries


def duplicate_head(config: ModelConfig) -> str | None:
    """The name under which a tied head may be there once more; None for a head of its own."""
    if not config.tied_head:
        return None
    untied = families.tensors(dataclasses.replace(config, tied_head=False))
    return next(tensor.name for tensor in untied if tensor.params == ("head_VD",))


def check_names(
    directory: Path, tensors: list[Tensor], entries: dict[str, Entry], allowed: str | None
) -> None:
    """UserError unless exactly the tensors of the config are there; `allowed` may be."""
    expected = {tensor.name for tensor in tensors}
    missing = [tensor.name for tensor in tensors if tensor.name not in entries]
    extra = [e.name for name, e in entries.items() if name not in expected and name != allowed]
    faults = [f"lacks {_some(missing)}"] * bool(missing)
    faults += [f"has {_some(extra)}, not of this model"] * bool(extra)
    if faults:
        raise UserError(f"{directory} does not fit its {CONFIG}: it {'; it '.join(faults)}")


def check_same_head(
    directory: Path, tensors: list[Tensor], entries: dict[str, Entry], head: str
) -> None:
    """UserError unless the tied head is the embedding, bit for bit."""
    embedding = next(t.name for t in tensors if t.params == ("embedding_VD",))
    if not safetensors.same(entries[embedding], entries[head]):
        raise UserError(
            f"{directory}: {CONFIG} ties the head to the embedding, but "
            f"{entries[head].name} is not equal to {entries[embedding].name}"
        )


def check_shapes(directory: Path, tensors: list[Tensor], entries: dict[str, Entry]) -> None:
    """UserError that names tensors of another shape than the config gives them."""
    wrong = [
        f"{t.name} is {entries[t.name].shape}, not {t.layout.shape}"
        for t in tensors
        if entries[t.name].shape != t.layout.shape
    ]
    if wrong:
        raise UserError(f"{directory} does not fit its {CONFIG}: {_some(wrong)}")


def check_dtypes(directory: Path, entries: dict[str, Entry]) -> None:
    """UserError that names tensors of dtypes that we do not read."""
    wrong = [f"{e.name} is {e.code}" for e in entries.values() if e.code not in DTYPES]
    if wrong:
        raise UserError(f"{directory}: {_some(wrong)}; supported are {', '.join(DTYPES)}")


def part(tensor: Tensor, index: int, source: CheckpointSource) -> np.ndarray:
    """One parameter's values (of one layer, if stacked) out of a tensor, in the file's dtype."""
    return tensor.layout.split(safetensors.read(source.entries[tensor.name]))[index]


def _some(names: list[str]) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names)} in all)"
