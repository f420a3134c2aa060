"""`Bundle`: a directory that opens with no other information.

    WORKDIR/config.json                the experiment
    WORKDIR/tokenizer/                 as the data was tokenised
    WORKDIR/<step>/model, optimizer    Orbax arrays by parameter name
    WORKDIR/<step>/data                position in the data, JSON
    WORKDIR/<step>/files.json          the size of every file, written last: the step is complete
    WORKDIR/saving/                    a step that is being saved; it is renamed when complete

A step is a folder with our files.json (core/storage/files.py), and complete when each of its files
has the size told there. A folder that is called 2024 and has none is the user's, and stays.
"""

import dataclasses
import filecmp
import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from core import lazy, tree
from core.config import Experiment, Section, UserError, from_json
from core.storage import files
from core.storage.files import damaged, write_text

log = logging.getLogger("cakrawala")

CONFIG, TOKENIZER, SAVING = "config.json", "tokenizer", "saving"
METADATA = "_CHECKPOINT_METADATA"  # Orbax writes it into every step
DAY = 24 * 60 * 60


class Bundle:
    """Saves and restores the steps of one directory. Close it: saving goes on behind it."""

    def __init__(self, path: str | Path, keep: int | None = None, lazily: bool = False):
        """Opens a bundle; `keep` newest steps survive a save (None: all).

        `lazily` saves a model of `lazy.StreamedArray` leaves, which may take as long as it takes.
        """
        self.path = Path(path).absolute()
        config_file(path)
        self._keep = keep
        self._saving: Future | None = None
        self._behind = ThreadPoolExecutor(1, "saving")
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
        return steps(self.path)

    def is_complete(self, step: int) -> bool:
        """Returns whether each file of the step is there in full."""
        return damaged(self.path / str(step)) is None

    def choose(self, step: int | None = None) -> int:
        """The step to open: `step` itself, or the newest complete one; UserError if there is none.

        A newer incomplete step is skipped only for `step=None`, and the log says so.
        """
        damage = {s: damaged(self.path / str(s)) for s in self.steps()}
        good = [s for s, reason in damage.items() if reason is None]
        if step is None:
            if not good:
                reasons = "; ".join([*filter(None, damage.values()), *unlisted(self.path)])
                raise UserError(
                    f"{self.path} has no complete step: {reasons or 'nothing was saved yet'}"
                )
            for newer in (s for s in damage if s > good[-1]):
                log.warning("step %d is skipped: %s; using step %d", newer, damage[newer], good[-1])
            for reason in unlisted(self.path, after=good[-1]):
                log.warning("%s; using step %d", reason, good[-1])
            return good[-1]
        if step not in damage:
            there = "; ".join([", ".join(map(str, damage)) or "none", *unlisted(self.path)])
            raise UserError(f"step={step} is not in {self.path}; the steps there are: {there}")
        if damage[step]:
            older = [s for s in good if s < step]
            way_out = f"step={older[-1]} is complete" if older else "no older step is complete"
            raise UserError(f"step={step} cannot be opened: {damage[step]}; {way_out}")
        return step

    def save(self, step: int, items: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Starts saving pytrees `items` and JSON `data`; returns when their arrays are copied.

        The step gets its name, and steps beyond `keep` go, when all of it is on the disk.
        """
        self.wait()
        partial = self.path / SAVING
        if jax.process_index() == 0:
            files.scratch(partial)
        args = {name: ocp.args.PyTreeSave(tree.named_leaves(item)) for name, item in items.items()}
        args["data"] = ocp.args.JsonSave(dict(data))
        self._checkpointer.save(partial / str(step), args=ocp.args.Composite(**args))
        self._saving = self._behind.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        """Gives a step its name once all processes have written it."""
        partial = self.path / SAVING
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                files.seal(partial / str(step))
                self.discard(step)
                os.replace(partial / str(step), self.path / str(step))
        except BaseException:  # the space is needed: most often the disk is full
            if jax.process_index() == 0:
                files.clear_scratch(partial, keeps_mark=True)
            raise
        if jax.process_index() == 0:
            files.clear_scratch(partial)
            for old in self.steps()[: -self._keep] if self._keep else []:
                files.remove(self.path / str(old))

    def wait(self) -> None:
        """Returns when the last save is complete; raises what made it fail."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

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
        """Removes a step if it is there. UserError if what is there is not a step."""
        if jax.process_index() == 0:
            refuse_folder(self.path / str(step))
            files.remove(self.path / str(step))

    def close(self) -> None:
        """Waits for the last save and stops the threads."""
        try:
            self.wait()
        finally:
            self._behind.shutdown()
            self._checkpointer.close()


def steps(path: Path) -> list[int]:
    """The steps in a bundle's directory, complete or not, oldest first."""
    found = (int(p.name) for p in path.iterdir() if _is_number(p.name))
    return sorted(step for step in found if _is_step(path / str(step)))


def _is_step(folder: Path) -> bool:
    """Returns whether a folder holds our listing, and Orbax's metadata is there or listed."""
    if not (folder / files.LISTING).is_file():
        return False
    if (folder / METADATA).is_file():
        return True
    try:
        return METADATA in (files.listing(folder) or {})
    except UserError:
        return False


def unlisted(path: Path, after: int = -1) -> list[str]:
    """Names each folder beyond `after` that would be a step if its listing were there."""
    numbers = sorted(int(p.name) for p in path.iterdir() if _is_number(p.name))
    listings = {number: path / str(number) / files.LISTING for number in numbers if number > after}
    return [
        f"{listing} is missing, so {number} is no step"
        for number, listing in listings.items()
        if not listing.is_file() and (listing.parent / METADATA).is_file()
    ]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and str(int(name)) == name


def refuse_folder(folder: Path) -> None:
    """Raises UserError if `folder`, where a step would be written, is not a step of ours."""
    files.refuse_foreign(folder, "move it away, or name another workdir", proof=METADATA)


def refuse_foreign(path: Path, first: int, last: int) -> None:
    """Raises UserError for what a run that saves steps `first` to `last` would have to replace at
    `path`, and that this program did not write. Call it before any work.
    """
    if (path / CONFIG).exists() and not _is_experiment(path / CONFIG):
        raise UserError(
            f"{path / CONFIG} is not the config of a run of this program, and would be lost: "
            "name another workdir"
        )
    for folder in path.iterdir():
        if _is_number(folder.name) and first <= int(folder.name) <= last:
            refuse_folder(folder)
    files.refuse_scratch(path / SAVING)


def _is_experiment(path: Path) -> bool:
    """Returns whether `create` wrote this config: a name, and sections of an Experiment."""
    fields = {field.name for field in dataclasses.fields(Experiment)}
    content = read_json(path)
    return "name" in content and content.keys() <= fields


def create(path: str | Path, config_json: str, tokenizer: Path | None) -> None:
    """Makes the directory, its config and its copy of the tokenizer; no steps yet.

    Raises UserError if a tokenizer is there that this program did not write.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, path)
    write_text(path / CONFIG, config_json)


def _copy_tokenizer(source: Path, path: Path) -> None:
    target = path / TOKENIZER
    if _same_files(source, target):
        return
    files.refuse_foreign(target, "move it away, or name another workdir")
    partial = files.scratch(path / SAVING)
    try:
        shutil.copytree(source, partial / TOKENIZER)
        files.seal(partial / TOKENIZER)
        files.remove(target)
        os.replace(partial / TOKENIZER, target)
    finally:
        files.clear_scratch(partial)


def _same_files(source: Path, target: Path) -> bool:
    """Returns whether two folders hold the same files with the same bytes."""
    names, there = (
        {p.relative_to(folder) for p in folder.rglob("*") if p.name != files.LISTING}
        for folder in (source, target)
    )
    is_file = (name for name in names if (source / name).is_file())
    return names == there and all(
        filecmp.cmp(source / name, target / name, shallow=False) for name in is_file
    )


def config_file(path: str | Path) -> Path:
    """The config of the bundle at `path`; UserError if there is none."""
    found = Path(path) / CONFIG
    if not found.is_file():
        raise UserError(f"{path} is no bundle: it has no {CONFIG}; train one, or name another")
    return found


def read_config(path: str | Path, **classes: type[Section]) -> Experiment:
    """The experiment of a bundle, without opening it: starts neither threads nor devices.

    Raises UserError that names the file if it is damaged, or another program's.
    """
    file = config_file(path)
    if "model_type" in read_json(file):
        raise UserError(
            f"{file} is of a Hugging Face checkpoint: make a bundle of it, "
            f"python -m model.convert --from_hf {path} --to_bundle DIR"
        )
    try:
        return from_json(file.read_text(), **classes)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; UserError names the file."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object; copy it again")
    return content


def _concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The same on the mesh in use: tracing knows only an abstract mesh."""
    spec = leaf.sharding.spec if leaf.sharding else PartitionSpec()
    sharding = NamedSharding(jax.sharding.get_mesh(), spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
