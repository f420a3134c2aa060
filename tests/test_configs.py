"""Every experiment in configs/ runs at `:tiny` through all commands that it has sections for."""

import inspect
import json
from pathlib import Path

import pytest

from core import checkpoint
from core.command import cli
from core.config import Experiment, UserError, freeze, from_json, sections, to_json
from data import prepare
from evals import bench, recall
from infer import decode, score
from train import pretrain

FILES = sorted(p for p in Path("configs").glob("*.py") if p.name != "__init__.py")
COMMANDS = {
    "data": prepare.main,
    "train": pretrain.main,
    "decode": decode.main,
    "score": score.main,
    "bench": bench.main,
    "recall": recall.main,
}


# One life in every run of the suite; the others are as long and differ in sizes.
LIVES = [
    pytest.param(file, marks=[] if file.stem == "quickstart" else pytest.mark.slow)
    for file in FILES
]


@pytest.mark.parametrize("file", LIVES, ids=lambda f: f.stem)
def test_tiny_runs_the_whole_life(file, tmp_path, capsys):
    config = cli.load(f"{file}:tiny")
    config.workdir = str(tmp_path / "run")
    config.mesh.simulate = 0  # the session's 8 devices are there already
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "import os\n"}) + "\n")
    config.score.input = str(texts)
    experiment = freeze(config)
    for section, command in COMMANDS.items():
        if section in sections(experiment):
            command(experiment)
    out = capsys.readouterr().out
    assert "perplexity" in out
    rows = [json.loads(s) for s in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["bits_per_byte"] > 0
    assert rows[-2]["loss"] < rows[0]["loss"]
    report = json.loads((tmp_path / "run/bench/report.json").read_text())
    windows = any(spec.window for spec in experiment.model.pattern)
    expected = {"full", "sliding"} if windows else {"full"}
    assert {row["attention"] for row in report["rows"]} == expected


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_full_size_is_valid_and_survives_json(file, tmp_path):
    spec = str(file)
    if file.stem in ("bundle", "finetune"):  # which says that it needs one
        with pytest.raises(UserError, match=f"{file.stem}.py:BUNDLE"):
            cli.load(spec)
        model = freeze(cli.load("configs/llama3_8b.py")).model
        checkpoint.create(tmp_path, to_json(Experiment("other", model=model)), None)
        spec = f"{file}:{tmp_path}"
    experiment = freeze(cli.load(spec))
    classes = {name: type(section) for name, section in sections(experiment).items()}
    assert from_json(to_json(experiment), **classes) == experiment
    with pytest.raises(UserError, match=":tiny"):
        cli.load(f"{file}:huge")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_docstring_has_command_hardware_and_expectation(file):
    doc = inspect.cleandoc(compile(file.read_text(), file, "exec").co_consts[0])
    assert f"--config={file}" in doc
    assert "Hardware:" in doc and "Expected:" in doc
