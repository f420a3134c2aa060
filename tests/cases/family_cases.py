"""Checkpoints of the goldens: made again as files, and opened as any other."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from golden.weights import values

from core.sharding import Rules
from infer import steps
from infer.engine import Engine, Plan
from model.cache.kv_cache import PLAIN
from model.io import hf_import
from model.transformer import Transformer

FOLDER = Path(__file__).parents[1] / "golden"
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


def opened(name: str, folder: Path, rules: Rules, **fields) -> Transformer:
    """The model of a case in float32, on the mesh in use; its checkpoint is written once."""
    directory = folder / name
    if not directory.exists():
        write(name, folder)
    return hf_import.load(directory, rules, dtype="float32", **fields)


def through_the_cache(model, tokens, form=PLAIN) -> np.ndarray:
    """Logits [B, new + 1, V] of the last token of the prompt, read in chunks, and of the new."""
    B, T = tokens.shape
    engine = Engine(model, Plan.of(B, PROMPT, T - PROMPT, 8), form=form)
    length_B = engine.place(np.full(B, T, np.int32))

    @jax.jit
    def decode(model, now, tokens_BT):
        def step(now, at):
            token_B = tokens_BT[:, at]
            logits_BV = model.logits(now.last_BD[:, None])[:, 0]
            at_B = token_B * 0 + at
            return steps.feed(model, now, token_B, at_B, at_B > 0, length_B), logits_BV

        now, logits_CBV = jax.lax.scan(step, now, jnp.arange(PROMPT, T))
        return jnp.moveaxis(logits_CBV, 0, 1), model.logits(now.last_BD[:, None])

    now = engine.prefill([row[:PROMPT] for row in tokens])
    parts = decode(engine.decoder, now, engine.place(tokens))
    return np.concatenate([np.asarray(part) for part in parts], axis=1)


def in_float32(config):
    """The same model, computed in float32."""
    return dataclasses.replace(config, dtype="float32")
