"""Raw documents: the standard library, files, a prepared tfds dataset, or texts made here.

    for document in documents(DataConfig(source="files", files=("books/*.txt",))):
        print(document.id, len(document.raw))

The order is the same on every run. Nothing is judged here: `data.curate` drops and counts.
"""

import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.config import DataConfig
from data.texts import recall
from data.texts.document import Document
from data.texts.files import files, read
from data.texts.tfds_source import examples

STDLIB = (".py", ".txt", ".rst", ".md", ".html")
# Test suites, because many distributions leave them out, and what the build wrote, because it
# holds paths of the machine: without them the same Python has the same text everywhere.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


def documents(config: DataConfig) -> Iterator[Document]:
    """The documents of `config.source`, at most `limit_documents` of them.

    Raises UserError, naming the glob, file, row or dataset at fault.
    """
    if config.source == "stdlib":
        found = stdlib()
    elif config.source == "files":
        found = files(config.files, config.text_field)
    elif config.source == "recall":
        found = recall.documents(config.recall_seed, config.recall_shortest, config.recall_tokens)
    else:
        found = examples(config)
    return itertools.islice(found, config.limit_documents or None)


def stdlib() -> Iterator[Document]:
    """Sources and texts of the running interpreter's standard library."""
    root = sysconfig.get_paths()["stdlib"]
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _skipped(name)]
        paths += [Path(folder, n) for n in names if n.endswith(STDLIB) and not _skipped(n)]
    for path in sorted(paths):
        yield Document(path.relative_to(root).as_posix(), read(path))


def _skipped(name: str) -> bool:
    return name in SKIPPED or name.startswith(SKIPPED_PREFIXES)
