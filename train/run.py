"""Where a run begins: a new bundle, or the newest complete step of the one that is there."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from core import checkpoint, sharding, tree
from core.checkpoint import Bundle
from core.config import Experiment, UserError, to_dict, to_json
from core.sharding import Rules
from data import balance, tokenizer
from data.store import TokenStore
from model import transformer
from train import feed, initial, optimizer, state
from train.config import OPERATIONAL
from train.state import TrainState

log = logging.getLogger("cakrawala")


@dataclasses.dataclass
class Run:
    """All that the loop needs. `data` is None at the start, else where the data went on."""

    bundle: Bundle
    optimizer: optax.GradientTransformation
    rules: Rules
    state: TrainState
    data: dict[str, Any] | None


def start(experiment: Experiment, store: TokenStore) -> Run:
    """Opens or makes the bundle in `experiment.workdir`, on the mesh in use.

    Resumes from the newest complete step: parameters, optimizer, step and data position. A run
    with no step of its own begins with the weights of `train.start`, or random ones.
    UserError if another run is there, or its tokenizer is not that of the data.
    """
    config, workdir = experiment.train, Path(experiment.workdir)
    experiment.model.check_length("train.length", config.length)
    if not os.access(workdir, os.W_OK):  # the data is there, so the workdir is
        raise UserError(f"workdir={workdir} cannot be written: name another, or make it writable")
    rules = choose_rules(experiment, lambda: balance.sample(store, config.length))
    abstract = transformer.abstract(experiment.model, rules)
    rule = optimizer.make(config, tree.named_leaves(abstract))
    if store.manifest["vocab_size"] > experiment.model.vocab_size:
        raise UserError(
            f"model.vocab_size={experiment.model.vocab_size} is less than the tokenizer's "
            f"{store.manifest['vocab_size']}"
        )
    # Before its first checkpoint a run is nothing to protect: it starts again.
    resumes = not config.overwrite and has_steps(workdir)
    # Before anything is written: a bundle that does not fit is refused with nothing lost.
    model = None if resumes or not config.start else initial.restore(experiment, store, rules)
    if resumes:
        check_same(experiment, workdir)
    elif jax.process_index() == 0:
        try:
            clear(workdir)
            checkpoint.create(workdir, to_json(experiment), Path(store.directory, "tokenizer"))
        except OSError as error:
            raise UserError(f"workdir={workdir} cannot be written: {error.strerror}") from None
    _barrier("bundle")
    bundle = Bundle(workdir, keep=config.keep)
    check_tokenizer(bundle, store)
    if not resumes:
        if model is None:
            fresh = state.create(experiment.model, rules, rule, config.seed)
        else:
            fresh = state.begin(model, rule)
        return Run(bundle, rule, rules, fresh, None)
    step = bundle.choose()
    for newer in (s for s in bundle.steps() if s > step):
        bundle.discard(newer)  # incomplete: the run writes it again
    abstract = state.abstract(experiment.model, rules, rule)
    items = bundle.restore(step, model=abstract.model, optimizer=abstract.opt_state)
    log.info("resuming from step %d of %s", step, workdir)
    resumed = TrainState(jnp.int32(step), items["model"], items["optimizer"])
    return Run(bundle, rule, rules, resumed, items["data"])


def choose_rules(experiment: Experiment, segments: Callable[[], np.ndarray]) -> Rules:
    """What the mesh section asks for; UserError if rows do not divide over the mesh in use.

    `segments()` gives rows [B, T] like those to come, by which mesh.layout=auto is chosen.
    """
    mesh, config = experiment.mesh, experiment.train
    rules = sharding.training(mesh.strategy, mesh.ulysses, both_ways=mesh.both_ways)
    feed.check(config, rules)
    chosen = mesh.layout
    if chosen == "auto":
        windows = [spec.mask.reach for spec in experiment.model.pattern]
        chosen = balance.choose(segments(), rules, windows)
    return dataclasses.replace(rules, layout=chosen)


def has_steps(workdir: Path) -> bool:
    """Whether a run saved something here, complete or not."""
    return (workdir / checkpoint.CONFIG).is_file() and any(
        path.name.isdecimal() for path in workdir.iterdir()
    )


def check_same(experiment: Experiment, workdir: Path) -> None:
    """UserError that shows the fields in which the run in `workdir` differs from this one."""
    classes = {name: type(getattr(experiment, name)) for name in ("data", "model", "train")}
    # Read as sections: a field that is newer than the run has its default there.
    there = to_dict(checkpoint.read_config(workdir, **classes))
    if "train" not in there:
        raise UserError(
            f"workdir={workdir} holds a model that no run made, as model.convert imports them: "
            f"name another workdir, and train.start={workdir} to go on from it"
        )
    here = to_dict(experiment)
    differ = []
    for section in classes:
        old, new = there.get(section, {}), here[section]
        differ += [
            f"{section}.{field}: {old.get(field)!r} there, {new.get(field)!r} here"
            for field in sorted(old.keys() | new.keys())
            if old.get(field) != new.get(field)
            and not (section == "train" and field in OPERATIONAL)
        ]
    if differ:
        raise UserError(
            f"workdir={workdir} holds another run:\n  " + "\n  ".join(differ) + "\n"
            "Name another workdir, or start again with --config.train.overwrite=True"
        )


def check_tokenizer(bundle: Bundle, store: TokenStore) -> None:
    """UserError unless the bundle's tokenizer is the one that made the tokens."""
    ours = tokenizer.load(bundle.path / checkpoint.TOKENIZER).fingerprint
    theirs = store.manifest["tokenizer"]
    if ours != theirs:
        raise UserError(
            f"the tokenizer of {bundle.path} ({ours[:12]}) is not that of {store.directory} "
            f"({theirs[:12]}): the data was prepared again; prepare it as it was, name another "
            "workdir, or start again with --config.train.overwrite=True"
        )


def clear(workdir: Path) -> None:
    """Removes what a run wrote, but not its data."""
    if not workdir.is_dir():
        return
    for path in workdir.iterdir():
        if path.name.isdecimal() or path.name in (checkpoint.TOKENIZER, "tensorboard"):
            shutil.rmtree(path)
        elif path.name in (checkpoint.CONFIG, "metrics.jsonl"):
            path.unlink()


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
