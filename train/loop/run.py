"""The start of a run: a new bundle, or the newest complete step of the one that is there."""

import dataclasses
import logging
import os
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
from core.metrics import METRICS, TENSORBOARD, read_rows
from core.sharding import Rules
from core.storage import files
from data import balance
from data.store import TokenStore
from data.tokenizer import load as tokenizers
from model import transformer
from train import initial, optimizer, state
from train.config import OPERATIONAL
from train.loop import feed
from train.state import TrainState

log = logging.getLogger("cakrawala")


@dataclasses.dataclass
class Run:
    """All that the loop needs."""

    bundle: Bundle
    optimizer: optax.GradientTransformation
    rules: Rules
    state: TrainState
    digests: dict[str, str]  # of the data, by split
    data: dict[str, Any] | None = None  # where the data went on; None at the start
    evaluation_owed: bool = False  # a signal cut off the evaluation of this step


def start(experiment: Experiment, train: TokenStore, validation: TokenStore) -> Run:
    """Opens or makes the bundle in `experiment.workdir`, on the mesh in use.

    Resumes from the newest complete step: parameters, optimizer, step and data position. A run
    with no step of its own begins with the weights of `train.start`, or random ones.
    UserError if another run is there, if the data is not what it was trained on, or if files are
    in the way that this program did not write.
    """
    config, workdir = experiment.train, Path(experiment.workdir)
    experiment.model.check_length("train.length", config.length)
    if not os.access(workdir, os.W_OK):  # the data is there, so the workdir is
        raise UserError(f"workdir={workdir} cannot be written: name another, or make it writable")
    rules = choose_rules(experiment, lambda: balance.sample(train, config.length))
    abstract = transformer.abstract(experiment.model, rules)
    rule = optimizer.make(config, tree.named_leaves(abstract))
    if train.manifest["vocab_size"] > experiment.model.vocab_size:
        raise UserError(
            f"model.vocab_size={experiment.model.vocab_size} is less than the tokenizer's "
            f"{train.manifest['vocab_size']}"
        )
    # Before its first checkpoint a run is nothing to protect: it starts again.
    resumes = not config.overwrite and bool(checkpoint.steps(workdir))
    if resumes:
        check_same(experiment, workdir)
    there = checkpoint.steps(workdir) if resumes else []
    complete = [step for step in there if not files.damaged(workdir / str(step))]
    check_own(workdir, complete[-1] if complete else 0, config.steps)
    # Before anything is written: a bundle that does not fit is refused with nothing lost.
    model = None if resumes or not config.start else initial.restore(experiment, train, rules)
    if not resumes:
        in_first_process(lambda: begin(experiment, Path(train.directory, "tokenizer")))
    bundle = Bundle(workdir, keep=config.keep)
    check_tokenizer(bundle, train)
    digests = {store.split: store.digest() for store in (train, validation)}
    if not resumes:
        if model is None:
            fresh = state.create(experiment.model, rules, rule, config.seed)
        else:
            fresh = state.begin(model, rule)
        return Run(bundle, rule, rules, fresh, digests)
    step = bundle.choose()
    abstract = state.abstract(experiment.model, rules, rule)
    items = bundle.restore(step, model=abstract.model, optimizer=abstract.opt_state)
    data = items["data"]
    check_data(step, data.pop("digests", None), digests, config.data_changed)
    in_first_process(lambda: drop_newer(bundle, step))
    log.info("resuming from step %d of %s", step, workdir)
    resumed = TrainState(jnp.int32(step), items["model"], items["optimizer"])
    owed = data.pop("evaluation_owed", False)
    return Run(bundle, rule, rules, resumed, digests, data, owed)


def check_own(workdir: Path, newest: int, last: int) -> None:
    """Raises UserError for what is in the way of a run that goes on to step `last`.

    `newest` is the newest complete step there; 0 at the start.
    """
    has_config = (workdir / checkpoint.CONFIG).is_file()
    if not has_config and checkpoint.steps(workdir):
        raise UserError(
            f"workdir={workdir} holds steps of a run, but no {checkpoint.CONFIG}: "
            "put it back, or name another workdir"
        )
    if not has_config and (workdir / METRICS).exists():
        raise UserError(
            f"{workdir / METRICS} is there, but no run of this program: "
            "move it away, or name another workdir"
        )
    read_rows(workdir / METRICS)
    if (workdir / TENSORBOARD).exists() and not (workdir / TENSORBOARD).is_dir():
        raise UserError(f"{workdir / TENSORBOARD} is no folder: move it, or name another workdir")
    checkpoint.refuse_foreign(workdir, newest + 1, last)


def begin(experiment: Experiment, tokenizer_directory: Path) -> None:
    """Makes the bundle in the workdir, in place of a run that is to be forgotten."""
    workdir = Path(experiment.workdir)
    try:
        for step in checkpoint.steps(workdir):
            files.remove(workdir / str(step))
        (workdir / METRICS).unlink(missing_ok=True)
        checkpoint.create(workdir, to_json(experiment), tokenizer_directory)
    except OSError as error:
        raise UserError(f"workdir={workdir} cannot be written: {error.strerror}") from None


def drop_newer(bundle: Bundle, step: int) -> None:
    """Removes the steps after `step`: they are damaged, and the run writes them again."""
    for newer in (s for s in bundle.steps() if s > step):
        bundle.discard(newer)


def check_data(
    step: int, there: dict[str, str] | None, here: dict[str, str], changed: bool
) -> None:
    """Raises UserError if the data is not that of `step`, unless `changed` says that it may be.

    Steps of an older version say nothing of their data, and their epochs had no row for the rest
    of the tokens: another number of rows is another order of them.
    """
    differ = [split for split in here if there is None or there.get(split) != here[split]]
    if not differ:
        return
    what, why = " and ".join(differ), "it was prepared again from other texts"
    if there is None:
        why = "an older version made that step, from epochs without the last part of a row"
    if not changed:
        raise UserError(
            f"the {what} data is not what step {step} was trained on: {why}. Prepare it as it was, "
            "or name another workdir with train.start to begin a new run from these weights; "
            "--config.train.data_changed=True goes on in the order of the new data, at the "
            "position of the old"
        )
    log.warning("the %s data is not what step %d was trained on: it goes on in the new", what, step)


def in_first_process(action: Callable[[], None]) -> None:
    """Runs `action` in process 0 when all have come here; no process goes on if it fails there."""
    error = None
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first process")
    if jax.process_index() == 0:
        try:
            action()
        except UserError as raised:
            error = raised
    failed = bool(multihost_utils.broadcast_one_to_all(np.int32(error is not None)))
    if failed:
        raise error or UserError("process 0 could not begin: see its message")


def choose_rules(experiment: Experiment, segments: Callable[[], np.ndarray]) -> Rules:
    """Returns the rules of the mesh section. UserError if rows do not divide over the mesh.

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
    ours = tokenizers.load(bundle.path / checkpoint.TOKENIZER).fingerprint
    theirs = store.manifest["tokenizer"]
    if ours != theirs:
        raise UserError(
            f"the tokenizer of {bundle.path} ({ours[:12]}) is not that of {store.directory} "
            f"({theirs[:12]}): the data was prepared again; prepare it as it was, name another "
            "workdir, or start again with --config.train.overwrite=True"
        )
