"""The model that a report is of: a bundle, or random weights where there is none.

source = find(experiment)  # shapes, on the mesh in use
model = weights(source)
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from core import sharding, tree
from core.checkpoint import CONFIG, FILES
from core.config import Experiment, to_dict
from core.sharding import Rules
from infer import layout, load
from infer.config import BenchConfig
from infer.load import Found
from infer.report import cases
from infer.report.cases import Case
from infer.report.store import fingerprint
from model import transformer
from model.cache_form import Form
from model.config import ModelConfig
from model.transformer import Transformer


class Source(NamedTuple):
    """Where weights come from, before they are there. `depends`: what tells them from others."""

    found: Found | None
    model: Transformer  # shapes, in the compute dtype
    name: str
    depends: dict[str, Any]


def find(experiment: Experiment) -> Source:
    """The bundle; chance when there is none in the workdir and none is named."""
    config: BenchConfig = experiment.bench
    path, mesh = config.checkpoint or experiment.workdir, experiment.mesh
    rules = sharding.prefilling(mesh.strategy, mesh.ulysses, mesh.both_ways)
    named = config.checkpoint or config.step is not None
    if not named and not (Path(path) / CONFIG).is_file():
        name = f"random, as {path} is no bundle"
        return Source(None, _shapes(experiment.model, rules), name, {"random": 0})
    found = load.find(path, config.step)
    saved = fingerprint(found.path / str(found.step) / FILES)
    depends = {"path": str(found.path), "step": found.step, "saved": saved}
    return Source(found, _shapes(found.config, rules), f"{path} step {found.step}", depends)


def _shapes(config: ModelConfig, rules: Rules) -> Transformer:
    return load.in_compute_dtype(transformer.abstract(config, rules), config)


def weights(source: Source) -> Transformer:
    """The model itself, in the compute dtype."""
    config, rules = source.model.config, source.model.rules
    if source.found:
        return load.restore(source.found, rules)
    model = transformer.create(config, rules, jax.random.key(0))
    weights = tree.named_leaves(load.in_compute_dtype(model, config))
    del model
    return layout.place(config, rules, weights)


def cases_of(model: Transformer, config: BenchConfig) -> list[Case]:
    """All that the report compares."""
    return cases.of(model, Form.of(config), config.kv)


def head(experiment: Experiment, source: Source, device: str) -> dict[str, Any]:
    """The report without its rows."""
    return {
        "device": device,
        "config": experiment.name,
        "weights": source.name,
        "parameters": tree.num_elements(source.model),
        "model": to_dict(source.model.config),
        "bench": to_dict(experiment.bench),
    }
