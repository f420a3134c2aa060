"""`Bundle`: a directory that opens with no other information.

    WORKDIR/config.json                the experiment
    WORKDIR/tokenizer/                 as the data was tokenised
    WORKDIR/<step>/model, optimizer    Orbax arrays by parameter name
    WORKDIR/<step>/data                position in the data, JSON
    WORKDIR/<step>/files.json          the size of every file, written last: the step is complete

A step is complete when each of its files has the size that `files.json` tells.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from core import lazy, tree
from core.config import Experiment, Section, UserError, from_json

log = logging.getLogger("cakrawala")

CONFIG, TOKENIZER, FILES = "config.json", "tokenizer", "files.json"
DAY = 24 * 60 * 60


class Bundle:
    """Saves and restores the steps of one directory. Close it: saving goes on behind it."""

    def __init__(self, path: str | Path, keep: int | None = None, lazily: bool = False):
        """Opens a bundle; `keep` newest steps survive a save (None: all).

        `lazily` saves a model of `lazy.Lazy` leaves, which may take as long as it takes.
        """
        self.path = Path(path).absolute()
        config_file(path)
        self._keep = keep
        self._saving: int | None = None
        lazies = {"model": lazy.handler(), "data": ocp.JsonCheckpointHandler()}
        handlers = lazies if lazily else {}
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(**handlers), timeout_secs=DAY if lazily else None
        )

    def config(self, **classes: type[Section]) -> Experiment:
        """The experiment, with the sections named here, as `config(model=ModelConfig)`."""
        return read_config(self.path, **classes)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's directory; None if the bundle speaks token ids alone."""
        path = self.path / TOKENIZER
        return path if path.is_dir() else None

    def steps(self) -> list[int]:
        """All steps there are, complete or not, oldest first."""
        return sorted(int(p.name) for p in self.path.iterdir() if p.name.isdecimal())

    def is_complete(self, step: int) -> bool:
        """Whether each file of the step is there in full."""
        return damaged(self.path / str(step)) is None

    def choose(self, step: int | None = None) -> int:
        """The step to open: `step` itself, or the newest complete one; UserError if there is none.

        A newer incomplete step is skipped only for `step=None`, and the log says so.
        """
        damage = {s: damaged(self.path / str(s)) for s in self.steps()}
        good = [s for s, reason in damage.items() if reason is None]
        if step is None:
            if not good:
                reasons = "; ".join(filter(None, damage.values())) or "nothing was saved yet"
                raise UserError(f"{self.path} has no complete step: {reasons}")
            for newer in (s for s in damage if s > good[-1]):
                log.warning("step %d is skipped: %s; using step %d", newer, damage[newer], good[-1])
            return good[-1]
        if step not in damage:
            there = ", ".join(map(str, damage)) or "none"
            raise UserError(f"step={step} is not in {self.path}; the steps there are: {there}")
        if damage[step]:
            older = [s for s in good if s < step]
            way_out = f"step={older[-1]} is complete" if older else "no older step is complete"
            raise UserError(f"step={step} cannot be opened: {damage[step]}; {way_out}")
        return step

    def save(self, step: int, items: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Starts saving pytrees `items` and JSON `data`; returns when their arrays are copied.

        The step before is complete when this returns, and steps beyond `keep` are gone.
        """
        self.wait()
        self.discard(step)
        args = {name: ocp.args.PyTreeSave(tree.named_leaves(item)) for name, item in items.items()}
        args["data"] = ocp.args.JsonSave(dict(data))
        self._checkpointer.save(self.path / str(step), args=ocp.args.Composite(**args))
        self._saving = step

    def wait(self) -> None:
        """Returns when the last save is complete; raises what made it fail."""
        step, self._saving = self._saving, None
        self._checkpointer.wait_until_finished()
        if step is None or jax.process_index() != 0:
            return
        self._seal(self.path / str(step))
        if self._keep:
            for old in self.steps()[: -self._keep]:
                shutil.rmtree(self.path / str(old))

    def _seal(self, directory: Path) -> None:
        sizes = {
            str(path.relative_to(directory)): path.stat().st_size
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        write_text(directory / FILES, json.dumps(sizes, indent=1))

    def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        """The items named, each as its abstract pytree says (shapes, dtypes, shardings).

        UserError as `check` says.
        """
        self.check(step, **abstract)
        args = {}
        for name, item in abstract.items():
            leaves = {path: _concrete(leaf) for path, leaf in tree.named_leaves(item).items()}
            args[name] = ocp.args.PyTreeRestore(
                leaves, restore_args=ocp.checkpoint_utils.construct_restore_args(leaves)
            )
        args["data"] = ocp.args.JsonRestore()
        restored = self._checkpointer.restore(
            self.path / str(step), args=ocp.args.Composite(**args)
        )
        items = {name: tree.with_leaves(abstract[name], restored[name]) for name in abstract}
        return {**items, "data": restored["data"]}

    def check(self, step: int, **abstract: Any) -> None:
        """UserError names a parameter that the step lacks, has in another shape, or has beyond."""
        for item, planned in abstract.items():
            where = f"{self.path}/{step}/{item}"
            saved = ocp.PyTreeCheckpointHandler().metadata(self.path / str(step) / item)
            shapes = {path: tuple(m.shape) for path, m in saved.tree.items()}
            leaves = tree.named_leaves(planned)
            for path, leaf in leaves.items():
                if shapes.get(path) != leaf.shape:
                    found = f"is {shapes[path]} there" if path in shapes else "is not there"
                    raise UserError(f"{where}: {path} of {leaf.shape} {found}")
            for path in sorted(shapes.keys() - leaves.keys()):
                raise UserError(f"{where}: {path} of {shapes[path]} is there, and has no place")

    def discard(self, step: int) -> None:
        """Removes a step if it is there."""
        if jax.process_index() == 0:
            shutil.rmtree(self.path / str(step), ignore_errors=True)

    def close(self) -> None:
        """Waits for the last save and stops the threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def create(path: str | Path, config_json: str, tokenizer: Path | None) -> None:
    """Makes the directory, its config and its copy of the tokenizer; no steps yet."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        shutil.copytree(tokenizer, path / TOKENIZER, dirs_exist_ok=True)
    write_text(path / CONFIG, config_json)


def config_file(path: str | Path) -> Path:
    """The config of the bundle at `path`; UserError if there is none."""
    found = Path(path) / CONFIG
    if not found.is_file():
        raise UserError(f"{path} is no bundle: it has no {CONFIG}; train one, or name another")
    return found


def read_config(path: str | Path, **classes: type[Section]) -> Experiment:
    """The experiment of a bundle, without opening it: starts neither threads nor devices."""
    return from_json(config_file(path).read_text(), **classes)


def damaged(step: Path) -> str | None:
    """Why this step cannot be opened, naming the file; None if it is complete."""
    if not (step / FILES).is_file():
        return f"{step / FILES} is missing, so its saving was cut off"
    for name, size in json.loads((step / FILES).read_text()).items():
        path = step / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            return f"{path} {state}"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; UserError names the file."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object; copy it again")
    return content


def write_text(path: Path, text: str) -> None:
    """Writes to a temporary name and renames, so that no half a file is ever seen."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same on the mesh in use: tracing knows only an abstract mesh."""
    spec = leaf.sharding.spec if leaf.sharding else PartitionSpec()
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
