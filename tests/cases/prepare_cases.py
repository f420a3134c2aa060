"""Essays as files, and `data.prepare` run on them in this process."""

from pathlib import Path

import numpy as np

from core.config import Experiment
from data import prepare, store
from data.config import DataConfig
from data.tokenizer import load as tokenizers

WORDS = ["the", "horizon", "is", "as", "far", "as", "eye", "can", "see", "and", "ship", "sails"]


def essay(number):
    """A text like no other, made of few words."""
    draw = np.random.default_rng(number)
    lines = [" ".join(draw.choice(WORDS, 8)) for _ in range(10)]
    return f"essay {number}\n" + "\n".join(lines) + "\n"


def write_essays(folder: Path) -> Path:
    """30 essays as files, and four files that curation must drop."""
    folder.mkdir()
    for number in range(30):
        (folder / f"{number:02d}.txt").write_text(essay(number))
    (folder / "97-empty.txt").write_bytes(b" \n")
    (folder / "96-binary.txt").write_bytes(b"PNG\0\1\2")
    (folder / "98-latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "99-again.txt").write_text(essay(7))
    return folder


def config(folder, **changes):
    fields = dict(source="files", files=(f"{folder}/*.txt",), vocab_size=300)
    return DataConfig(**fields | dict(validation_fraction=0.2) | changes)


def run(tmp_path, data, **fields):
    return prepare.main(Experiment(name="test", workdir=str(tmp_path / "run"), data=data, **fields))


def read(tmp_path, split):
    """The texts of a split, decoded from its tokens, by name."""
    tokens = store.TokenStore(tmp_path / "run/data", split)
    tokens.verify()
    model = tokenizers.load(tmp_path / "run/data/tokenizer")
    assert model.fingerprint == tokens.manifest["tokenizer"]
    texts = {}
    for name, start, stop in zip(tokens.names(), tokens.starts, tokens.starts[1:], strict=False):
        ids = tokens[start:stop]
        assert (ids[0], ids[-1]) == (model.bos, *model.eos) and min(ids[1:-1]) > 3
        texts[name] = model.decode(ids)
    return texts
