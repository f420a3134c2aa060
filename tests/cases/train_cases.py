"""A tiny experiment on generated text, and how the tests of train/ run it.

The step's program depends on `steps` and the like: keep them as they are where possible, and
the compilation cache of the session serves every run.
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from core import layout, sharding, tree
from core.command import cli
from core.config import Experiment, to_json
from core.sharding import MeshConfig
from data.batch import Batch
from data.config import DataConfig
from model import transformer
from model.attention.spec import full, sliding
from model.config import ModelConfig
from train import optimizer, pretrain, state, step
from train.config import TrainConfig

ROOT = Path(__file__).parents[2]
SECTIONS = dict(data=DataConfig, model=ModelConfig, mesh=MeshConfig, train=TrainConfig)
WORDS = ["the", "horizon", "is", "as", "far", "as", "eye", "can", "see", "and", "ship", "sails"]
MODEL = ModelConfig(
    vocab_size=304,
    context=64,
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    pattern=(sliding(8), full()),
    dtype="float32",
    attention_kernel="reference",
)
TRAIN = TrainConfig(
    steps=12, batch_size=8, length=32, warmup=2, log_every=1, save_every=4, keep=3, eval_batches=3
)


def write_texts(folder: Path) -> None:
    """30 texts like no other, made of few words."""
    for number in range(30):
        draw = np.random.default_rng(number)
        lines = "".join(" ".join(draw.choice(WORDS, 8)) + "\n" for _ in range(10))
        (folder / f"{number:02d}.txt").write_text(f"essay {number}\n{lines}")


def experiment(workdir: Path, mesh: dict | None = None, model: dict | None = None, **train):
    """The tiny experiment with these fields changed."""
    data = DataConfig(
        source="files", files=("texts/*.txt",), vocab_size=300, validation_fraction=0.2
    )
    return Experiment(
        name="tiny",
        workdir=str(workdir),
        data=data,
        model=dataclasses.replace(MODEL, **model or {}),
        mesh=MeshConfig(**mesh or {}),
        train=dataclasses.replace(TRAIN, **train),
    )


def copy(source: Path, target: Path) -> Path:
    """A copy of a workdir that a test may spoil."""
    shutil.copytree(source, target)
    return target


def rows(workdir: Path, key: str = "loss") -> dict[int, float]:
    """{step: value} of the rows of metrics.jsonl that have `key`."""
    lines = Path(workdir, "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    steps = [row["step"] for row in found if key in row]
    assert len(steps) == len(set(steps)), f"{key} is there twice for a step: {steps}"
    return {row["step"]: row[key] for row in found if key in row}


def command(
    capsys, monkeypatch, experiment: Experiment, module=pretrain, sections=SECTIONS, **how
) -> tuple[int, str]:
    """(exit status, stderr) of `python -m train.pretrain`, or another module, in this process."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    config = config_file(experiment, Path(experiment.workdir).parent, sections)
    monkeypatch.setattr(sys, "argv", [module.__name__, f"--config={config}"])
    log = logging.getLogger("cakrawala")
    before = log.level, log.propagate, list(log.handlers)
    capsys.readouterr()
    status = 0
    try:
        cli.run(module.main, module.__doc__, **how, **sections)
    except SystemExit as stop:
        # What the interpreter does with sys.exit("text").
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = 1 if isinstance(stop.code, str) else stop.code
    finally:
        log.level, log.propagate, log.handlers[:] = before
    return status, capsys.readouterr().err


def config_file(experiment: Experiment, folder: Path, sections=SECTIONS) -> Path:
    """A config file that describes `experiment`."""
    imports = "".join(f"from {cls.__module__} import {cls.__name__}\n" for cls in sections.values())
    sections = ", ".join(f"{name}={cls.__name__}" for name, cls in sections.items())
    path = folder / "config.py"
    path.write_text(
        f"from core.config import editable, from_json\n{imports}\n"
        f"def get_config(arg=''):\n"
        f"    return editable(from_json({to_json(experiment)!r}, {sections}))\n"
    )
    return path


# `python -m train.pretrain`, but `before_step(n)` runs before step n is reported.
DRIVER = """
import os, resource, signal, sys, time
import jax
from core.command import cli
from train import pretrain
from train_cases import SECTIONS

def before_step(step, loop):
    {body}

report = pretrain.Loop.report
def reported(self, step, data, metrics):
    before_step(step, self)
    report(self, step, data, metrics)
pretrain.Loop.report = reported
cli.run(pretrain.main, pretrain.__doc__, **SECTIONS)
"""


def process(config: Path, body: str = "", **environment: str) -> subprocess.Popen:
    """A real process that trains; with `body` it runs these statements before each report."""
    how = ["-c", DRIVER.format(body=body)] if body else ["-m", "train.pretrain"]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'cases'}"
    return subprocess.Popen(
        [sys.executable, *how, f"--config={config}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(running: subprocess.Popen, seconds: float = 240) -> tuple[int, str]:
    """(exit status, stderr) of a process that ends by itself."""
    try:
        _, err = running.communicate(timeout=seconds)
    finally:
        running.kill()
    return running.returncode, err


def batch(rules: sharding.Rules, rows: int = 8, length: int = 32, seed: int = 0) -> Batch:
    """Random tokens, two packed documents a row, some targets without weight; as rules order."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, MODEL.vocab_size, (rows, length + 1)).astype(np.int32)
    edge = length // 3
    position = np.concatenate([np.arange(edge), np.arange(length - edge)]).astype(np.int32)
    segment = np.repeat([1, 2], [edge, length - edge]).astype(np.int32)
    positions, segments = (np.tile(x, (rows, 1)) for x in (position, segment))
    weights = (draw.random((rows, length)) < 0.9).astype(np.float32)
    arrays = tokens[:, :-1], tokens[:, 1:], weights, positions, segments
    order = layout.order(rules.layout, length, rules.ring_size())
    return Batch(*(jax.device_put(x[:, order], rules("batch", "length")) for x in arrays))


def begin(config: TrainConfig = TRAIN, model: ModelConfig = MODEL, **rules):
    """(fresh state, train step, rules) on the mesh in use; the weights of one device everywhere.

    Drawing them compiles as long as a step does, and for each mesh anew: here it is done once.
    """
    rules = sharding.training(**rules)
    abstract = transformer.abstract(model, rules)
    rule = optimizer.make(config, tree.named_leaves(abstract))
    place = {name: leaf.sharding.spec for name, leaf in tree.named_leaves(abstract).items()}
    drawn = weights(model, config.seed)
    placed = {name: jax.device_put(drawn[name], spec) for name, spec in place.items()}
    fresh = tree.with_leaves(abstract, placed)
    opt_state = jax.jit(rule.init)(tree.named_leaves(fresh))
    whole = state.TrainState(jax.numpy.int32(0), fresh, opt_state)
    return whole, step.make_train_step(config, rule, rules), rules


@functools.cache
def weights(model: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """The initial weights by name."""
    explicit = (jax.sharding.AxisType.Explicit,) * len(sharding.AXES)
    with jax.set_mesh(jax.make_mesh((1, 1, 1), sharding.AXES, explicit, devices=jax.devices()[:1])):
        fresh = transformer.create(model, sharding.training(), jax.random.key(seed))
        return {name: np.asarray(leaf) for name, leaf in tree.named_leaves(fresh).items()}


def bundle_steps(workdir):
    return sorted(int(path.name) for path in workdir.iterdir() if path.name.isdecimal())


def cut_back(source, target, step):
    """A copy of a finished run in which nothing happened after `step`."""
    workdir = copy(source, target)
    for newer in (s for s in bundle_steps(workdir) if s > step):
        shutil.rmtree(workdir / str(newer))
    return workdir
