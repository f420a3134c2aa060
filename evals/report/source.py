"""The model that a report is of: a bundle, or random weights where there is none.

source = find(experiment)  # shapes, on the mesh in use
model = weights(source)
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax

from core import sharding
from core.checkpoint import CONFIG
from core.config import Experiment, to_dict
from core.storage.files import LISTING
from evals.config import BenchConfig
from evals.report import cases
from evals.report.cases import Case
from evals.report.store import fingerprint
from infer import load
from infer.load import BundleInfo
from model import transformer
from model.cache.form import CacheConfig
from model.ops.quantised import QuantConfig
from model.sizes import parts
from model.sizes import weights as rounded
from model.transformer import Transformer


class WeightSource(NamedTuple):
    """The source of weights that are not read yet. `depends` tells them from others."""

    found: BundleInfo | None
    model: Transformer  # shapes, of weights as they are held
    rounding: QuantConfig | None
    name: str
    depends: dict[str, Any]


def find(experiment: Experiment) -> WeightSource:
    """The bundle; chance when there is none in the workdir and none is named."""
    config: BenchConfig = experiment.bench
    path, mesh = config.checkpoint or experiment.workdir, experiment.mesh
    rules = sharding.prefilling(mesh.strategy, mesh.ulysses, mesh.both_ways)
    named = config.checkpoint or config.step is not None
    found = None
    if named or (Path(path) / CONFIG).is_file():
        found = load.find(path, config.step, config.dtype)
    model = found.config if found else experiment.model
    model = dataclasses.replace(model, dtype=config.dtype or model.dtype)
    rounding = rounded.rounding(model, rules, config.weights, config.weights_group)
    shapes = load.shapes(model, rules, rounding)
    how = {"weights": config.weights, "group": config.weights_group, "dtype": model.dtype}
    if found is None:
        name = f"random, as {path} is no bundle{rounded.text(rounding)}"
        return WeightSource(None, shapes, rounding, name, {"random": 0, **how})
    saved = fingerprint(found.path / str(found.step) / LISTING)
    depends = {"path": str(found.path), "step": found.step, "saved": saved, **how}
    name = f"{path} step {found.step}{rounded.text(rounding)}"
    return WeightSource(found, shapes, rounding, name, depends)


def weights(source: WeightSource) -> Transformer:
    """The model itself."""
    config, rules = source.model.config, source.model.rules
    if source.found:
        return load.restore(source.found, rules, source.rounding)
    return load.held(transformer.create(config, rules, jax.random.key(0)), source.rounding)


def cases_of(model: Transformer, config: BenchConfig) -> list[Case]:
    """All that the report compares."""
    return cases.of(model, CacheConfig.of(config), config.kv)


def head(experiment: Experiment, source: WeightSource, device: str) -> dict[str, Any]:
    """The report without its rows."""
    asked, says = experiment.bench.dtype, "as the bundle says" if source.found else "model.dtype"
    return {
        "device": device,
        "config": experiment.name,
        "weights": source.name,
        "computing": load.computing(source.model.config, "bench", asked, says),
        "parameters": parts.total(source.model.config),
        "model": to_dict(source.model.config),
        "bench": to_dict(experiment.bench),
    }
