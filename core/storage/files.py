"""Folders that this program writes, and the proof that they are its own.

    files.json    {"model/d/0a1b": 1024, ...}: each file below the folder, and its bytes

A folder with such a listing was written here, whole: the listing is written last. Only what a
listing names is ever removed or replaced, so what a user put beside it stays. Work under way has
a folder of its own, with a mark in it: what a killed run left there can be removed.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from core.config import UserError

LISTING, LOCK = "files.json", ".lock"
PARTIAL, MARK = ".partial", ".cakrawala-work-under-way"


def write_text(path: Path, text: str) -> None:
    """Writes a file whole, as `replace` does."""
    replace(path, text.encode())


def replace(path: Path, content: bytes) -> None:
    """Writes a whole file: under a name of its own, then renamed, so that no half is ever seen.

    A device or a FIFO is written to, not replaced, and a link stays a link. OSError leaves what
    was there.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    target = Path(os.path.realpath(path))
    with _temporary(target.parent) as (file, temporary):
        with open(file, "wb", closefd=False) as out:
            out.write(content)
        os.fsync(file)
        if target.exists():
            shutil.copymode(target, temporary)
        else:
            os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)


def probe(folder: Path) -> None:
    """Raises OSError unless a file with something in it can be made in `folder`."""
    with _temporary(folder) as (file, _):
        os.write(file, b"\n")


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, str]]:
    """(an open file, its path): a new file, which is gone afterwards unless it was renamed."""
    file, name = tempfile.mkstemp(prefix=".cakrawala-", dir=folder)
    try:
        yield file, name
    finally:
        os.close(file)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def seal(folder: Path) -> None:
    """Writes the listing of `folder`: from now on it is complete, and this program's own."""
    write_text(folder / LISTING, json.dumps(_sizes(folder), indent=1))


def listing(folder: Path) -> dict[str, int] | None:
    """Returns what the listing of `folder` names, or None where there is none.

    Raises UserError if it is damaged.
    """
    path = folder / LISTING
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    sizes = content.items() if isinstance(content, dict) else [("", None)]
    if not all(_is_below(name) and type(size) is int for name, size in sizes):
        raise UserError(f"{path} is damaged: it does not list files and their bytes")
    return content


def _is_below(name: str) -> bool:
    return not os.path.isabs(name) and ".." not in Path(name).parts


def damaged(folder: Path) -> str | None:
    """Returns why `folder` is not complete, naming the file; None if it is."""
    try:
        listed = listing(folder)
    except UserError as error:
        return str(error)
    if listed is None:
        return f"{folder / LISTING} is missing"
    for name, size in listed.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            return f"{path} {state}"
    return None


def foreign(folder: Path, proof: str = "") -> str | None:
    """Returns a path at or below `folder` that this program did not write, or None.

    Without a listing that is any file, and also if the listing does not name the file `proof`.
    Hidden files are ignored: they stand in nobody's way.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return str(folder)
    try:
        listed = listing(folder) or {}
    except UserError:
        return str(folder / LISTING)
    if proof and proof not in listed:
        listed = {}
    unlisted = (name for name in _sizes(folder) if name not in listed)
    return next((str(folder / n) for n in unlisted if not _is_hidden(n)), None)


def refuse_foreign(folder: Path, remedy: str, proof: str = "") -> None:
    """Raises UserError, which ends with `remedy`, if `foreign` finds something in `folder`."""
    try:
        listing(folder)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None
    path = foreign(folder, proof)
    if path == str(folder):
        raise UserError(f"{folder} is in the way: it is no folder of this program's; {remedy}")
    if path is not None:
        raise UserError(
            f"{folder} holds {os.path.relpath(path, folder)}, which this program did not write "
            f"(no {LISTING} of its own names it there): {remedy}"
        )


def remove(folder: Path) -> None:
    """Removes the files that the listing of `folder` names, and the folders left empty.

    The listing goes last: a removal that is cut off can be done again.
    """
    listed = listing(folder)
    if listed is not None:
        _unlink(folder, listed)
        (folder / LISTING).unlink()
    with contextlib.suppress(OSError):  # it holds something of the user's, or is not there
        folder.rmdir()


def refuse_scratch(folder: Path) -> None:
    """Raises UserError if `folder` is there and was not made by `scratch`."""
    if folder.is_symlink() or not (folder / MARK).is_file():
        refuse_foreign(folder, f"move {folder} away")


def scratch(folder: Path) -> Path:
    """Makes an empty folder for work under way, in place of what a killed run left there.

    Raises UserError as `refuse_scratch` does.
    """
    refuse_scratch(folder)
    if folder.is_dir():
        clear_scratch(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return folder


def clear_scratch(folder: Path, keeps_mark: bool = False) -> None:
    """Removes a scratch folder. Its mark, the proof that it may be removed, goes last.

    With `keeps_mark` the folder and its mark stay: something may still write there.
    """
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child, ignore_errors=keeps_mark)
        elif child.name != MARK:
            child.unlink()
    if not keeps_mark:
        (folder / MARK).unlink(missing_ok=True)
        folder.rmdir()


@contextlib.contextmanager
def renewed(folder: Path, last: str) -> Iterator[Path]:
    """Gives an empty folder to fill, whose files then take the place of those in `folder`.

    `folder` itself stays, be it a link or a mounted disk. Its file `last` goes first and comes
    last, so that a reader finds the old files, none, or the new ones.
    """
    partial = scratch(folder / PARTIAL)
    try:
        yield partial
        old, new = listing(folder) or {}, _sizes(partial)
        # At every moment the listing names all that is there.
        write_text(folder / LISTING, json.dumps(old | new, indent=1))
        _unlink(folder, sorted(old, key=lambda name: name != last))
        for name in sorted(new, key=lambda name: name == last):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, folder / name)
        write_text(folder / LISTING, json.dumps(new, indent=1))
    finally:
        clear_scratch(partial)


def followed(path: Path) -> Path:
    """Returns where the links of `path` lead. Raises UserError if that place cannot be made."""
    target = Path(os.path.realpath(path))
    if path.is_symlink() and not target.parent.is_dir():
        raise UserError(
            f"{path} is a link to {target}, but {target.parent} is not there: "
            "is its disk mounted? Make the folder, or remove the link"
        )
    return target


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file below `folder`, but for its listing, lock and mark."""
    paths = (p for p in sorted(folder.rglob("*")) if p.is_symlink() or not p.is_dir())
    sizes = {path.relative_to(folder).as_posix(): path.lstat().st_size for path in paths}
    return {name: size for name, size in sizes.items() if name not in (LISTING, LOCK, MARK)}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _unlink(folder: Path, names: Iterable[str]) -> None:
    """Removes these files of `folder`, and the folders between that are empty then."""
    for name in names:
        path = folder / name
        path.unlink(missing_ok=True)
        for parent in path.relative_to(folder).parents[:-1]:
            with contextlib.suppress(OSError):
                (folder / parent).rmdir()
