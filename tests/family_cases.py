"""Checkpoints of the goldens: made again as files, and opened as any other."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from golden.weights import values

FOLDER = Path(__file__).parent / "golden"
PROMPT = 24
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz") if path.stem != "rope")


class Golden(NamedTuple):
    """What transformers says of a case (golden/make.py)."""

    config: dict  # config.json
    shapes: dict[str, list[int]]  # of the tensors
    tokens: np.ndarray  # int32 [B, T]: PROMPT random ones, then the greedy continuation
    logits: np.ndarray  # float32 [B, T, V]


@functools.cache
def golden(name: str) -> Golden:
    """The golden of a case."""
    with np.load(FOLDER / f"{name}.npz") as found:
        about = json.loads(str(found["about"]))
        arrays = (found[key] for key in ("tokens", "logits"))
        return Golden(about["config"], about["shapes"], *arrays)


def weights(name: str) -> dict[str, np.ndarray]:
    """The tensors of a case by name."""
    case = golden(name)
    offset = case.config["model_type"] in ("gemma", "gemma2", "gemma3_text")
    return {key: values(key, tuple(shape), offset) for key, shape in case.shapes.items()}


def write(name: str, folder: Path) -> Path:
    """The directory of a case's checkpoint, under `folder`."""
    directory = folder / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(golden(name).config))
    safetensors.numpy.save_file(weights(name), directory / "model.safetensors")
    return directory


def in_float32(config):
    """The same model, computed in float32."""
    return dataclasses.replace(config, dtype="float32")
