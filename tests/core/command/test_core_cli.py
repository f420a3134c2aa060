"""The command line: what texts mean, what is refused, and how a command ends."""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest
from config_cases import CONFIG_FILE, ROOT, Needy, Toy, complaint, parse

from core import config
from core.command import cli, literals
from core.config import UserError
from core.sharding import MeshConfig
from data.config import DataConfig
from evals.config import BenchConfig, RecallConfig
from infer.config import DecodeConfig, ScoreConfig
from model.config import ModelConfig
from model.describe import DescribeConfig
from train.config import AotConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=64,
    context=32,
    num_layers=4,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
)
DEFAULTS = DataConfig, MeshConfig, TrainConfig, AotConfig, DecodeConfig, ScoreConfig, BenchConfig
SECTIONS = [MODEL, *(cls() for cls in (*DEFAULTS, RecallConfig, DescribeConfig))]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG_FILE)
    return str(path)


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("1_000", int, 1000),
        ("007", int, 7),
        ("1e3", int, 1000.0),  # which `convert` makes an int
        ("1e-3", float, 1e-3),
        ("True", bool, True),
        ("none", int | None, None),
        ("null", int, None),
        ("none", str, "none"),
        ("007", str, "007"),
        ("none", tuple[Literal["none", "yarn"], ...], ("none",)),
        ("none, yarn", tuple[Literal["none", "yarn"], ...], ("none", "yarn")),
        ("5", tuple[int, ...], (5,)),
        ("1_0,2e3", tuple[int, ...], (10, 2000.0)),
        ("[1, 2]", tuple[int, ...], (1, 2)),
        ("", tuple[int, ...], ()),
        ("", tuple[str, ...], ()),
        (" ", tuple[str, ...], (" ",)),
        ("a, b", tuple[str, ...], ("a, b",)),
        ("null", tuple[str, ...], ("null",)),
        ("'a'", tuple[str, ...], ("'a'",)),
        ("('a, b', '\\n')", tuple[str, ...], ("a, b", "\n")),
        ("(" * 100_000, tuple[str, ...], ("(" * 100_000,)),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_texts_as_values(text, hint, value):
    result = literals.value(text, hint)
    assert result == value
    assert type(result) is type(value)


def test_commas_separate_names_and_paths_but_not_within_a_path_that_is_there(tmp_path):
    assert literals.value("int8, k8v4", tuple[str, ...], "names") == ("int8", "k8v4")
    (tmp_path / "a, b.txt").write_text("x")
    for pattern in ("a, b.txt", "a, *.txt"):
        text = f"{tmp_path}/{pattern}"
        assert literals.value(text, tuple[str, ...], "paths") == (text,)
    assert literals.value("c.txt, d*.txt", tuple[str, ...], "paths") == ("c.txt", "d*.txt")


# What people and scripts type, and what breaks Python's parser or its arithmetic.
NASTY = [
    *("", " ", "nan", "-inf", "1e999", "1e3", "1.5", "-1", "9223372036854775808", "True", "none"),
    *("9" * 5000, "0x" + "f" * 5000, "[" * 500, "-" * 9000 + "1", "1+" * 1500 + "1", "\0"),
    *("\udcff", "{[]: 1}", "{}", "(1,", "[1, 'a', None]", "((1, 2),)", "[{}]", "[{1: 2}]", "1j"),
    *("b'x'", "[[[]]]", "(True,)", "a,b", "1,1", "'\\d'", "..."),
]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: type(section).__name__)
def test_whatever_is_typed_gives_a_section_or_a_usererror(section):
    usual = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    for field in usual:
        for text in NASTY:
            with contextlib.suppress(UserError):
                value = cli.read_field(type(section), field, text)
                made = config.build(type(section), {**usual, field: value})
                hash(made)
                for number in np.ravel(getattr(made, field)):
                    assert not isinstance(number, float) or np.isfinite(number)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "exactly one --config is needed; usage: --config=FILE[:ARG]"),
        (["--config", "{file}"], "exactly one --config is needed"),
        (["--config="], "exactly one --config is needed"),
        (["--config=no.py"], "--config=no.py: there is no such file"),
        (["--config={file}", "--config={file}"], "exactly one --config is needed, not 2 ({file}"),
        (["--config={file}", "--config.workdir="], "--config.workdir= is empty: give a value"),
        (["--config={file}", "--config.model._class=int"], "model._class is not a field"),
        (["--config={file}", "--config._class=3"], "_class is not a field"),
        (["--config={file}", "--config.=3"], " is not a field"),
        (
            ["--config={file}", "--config.mesh.data=1", "--config.mesh.data=2"],
            "--config.mesh.data is given twice, as --config.mesh.data=1 and as --config.mesh.data=",
        ),
        (
            ["--config={file}", "--config.aot.topology=v5e:2x2"],
            "{file} has no section 'aot', and this command reads none: leave --config.aot.topology",
        ),
        (["--config={file}", "--config.aot=3"], "{file} has no section 'aot', and this command"),
        (["--config={file}", "steps=3"], "steps=3 is not understood; usage: --config="),
        (["--config={file}", "--config.name"], "--config.name is not understood"),
        (
            ["--config={file}", "--config.model.embed_dmi=3"],
            "model.embed_dmi is not a field; did you mean model.embed_dim?",
        ),
        (
            ["--config={file}", "--config.modle.embed_dim=3"],
            "modle is not a field; did you mean model?",
        ),
        (
            ["--config={file}", "--config.model.embed_dim.size=3"],
            "model.embed_dim has no fields of its own",
        ),
        (["--config={file}", "--config.mesh=3"], "mesh is a section: set one of both_ways, data"),
        (
            ["--config={file}"],
            "{file} has no section 'train': this command needs Needy, which has no default of size",
        ),
    ],
)
def test_command_line_mistakes(config_file, argv, message):
    argv = [arg.format(file=config_file) for arg in argv]
    found = complaint(cli.parse, argv, {"train": Needy} if len(argv) == 1 else {})
    assert message.format(file=config_file) in found
    assert "_class" not in found or "_class" in argv[1]


def test_sections_that_the_file_lacks_have_their_defaults(config_file):
    experiment = parse(config_file, "--config.train.count=7", train=Toy, data=DataConfig)
    assert experiment.train == Toy(count=7) and experiment.data == DataConfig()


HEAD = "from core.config import Experiment\nfrom core.sharding import MeshConfig\n"
GIVES = HEAD + "def get_config(arg):\n  return Experiment"
MISTAKES = {
    "x = 3": "defines no function get_config(arg)",
    "x = (": "config.py line 1: SyntaxError: '(' was never closed",
    "x = 1\n\n\n  y = 2": "config.py line 4: IndentationError: unexpected indent",
    "x = '\xe9'": "config.py line 1: SyntaxError: (unicode error) 'utf-8' codec can't decode",
    "\0": "source code string cannot contain null bytes",
    "import not_there": "config.py line 1: ModuleNotFoundError: No module named 'not_there'",
    "import sys\nsys.exit(7)": "config.py line 2: it ends the program (SystemExit: 7)",
    "get_config = 3": "get_config=3 is no function",
    "def get_config(arg):\n  return 3": "get_config returned 3, but it must return editable(",
    "def get_config(arg):\n  pass": "get_config returned None, but it must return editable(",
    "def get_config(arg):\n  return {'name': 1}": "get_config returned {'name': 1}, but it must",
    "def get_config(arg):\n  return get_config(arg)": "config.py line 2: RecursionError: maximum",
    "def get_config(arg):\n\n  return 1 / 0": "config.py line 3: ZeroDivisionError: division by",
    "def get_config(a, b):\n  pass": "get_config(a, b) must take one argument",
    "def get_config():\n  pass": "get_config returned None",
    GIVES + "(name=3)": "name=3 is int, but it must be str",
    HEAD
    + "def get_config(arg):\n  return Experiment('x', trian=3)": "config.py line 4: TypeError:",
    HEAD
    + "def get_config(arg):\n  return Experiment('x', mesh={'data': 1})": "section 'mesh' is a",
    HEAD
    + "def get_config(arg):\n  return Experiment('x', mesh=MeshConfig(seq=0))": "py line 4: data,",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text.splitlines()[-1])
def test_mistakes_of_a_config_file_name_it(tmp_path, text):
    path = tmp_path / "config.py"
    path.write_text(text, encoding="latin-1")
    message = complaint(parse, str(path))
    assert MISTAKES[text] in message and str(path) in message + f"--config={path}"
    assert "\n" not in message


def test_files_that_are_no_config(tmp_path):
    (tmp_path / "notes.txt").write_text("x = 3\n")
    assert complaint(parse, str(tmp_path / "notes.txt")).endswith("is not a Python file")
    assert complaint(parse, str(tmp_path)).endswith("is a folder: name a Python file in it")
    assert "File name too long" in complaint(parse, f"{'x' * 300}.py")
    os.mkfifo(tmp_path / "pipe.py")
    assert "is no file, but a device or a pipe" in complaint(parse, str(tmp_path / "pipe.py"))


def test_get_config_may_give_the_experiment_itself_and_need_no_argument(tmp_path):
    (tmp_path / "a:b.py").write_text(f"{HEAD}def get_config():\n    return Experiment('x')\n")
    path = str(tmp_path / "a:b.py")
    assert parse(path, "--config.mesh.seq=2", mesh=MeshConfig).mesh == MeshConfig(seq=2)
    assert complaint(parse, f"{path}:tiny") == (
        f"--config={path} takes no argument: leave out :tiny"
    )


def test_help_lists_every_field_with_default_and_meaning(monkeypatch, capsys):
    classes = dict(model=ModelConfig, mesh=MeshConfig, data=DataConfig)
    monkeypatch.setattr(sys, "argv", ["prog", "--help"])
    cli.run(lambda experiment: pytest.fail("--help must not run"), "What it does.", **classes)
    text = capsys.readouterr().out
    assert text.startswith("What it does.\n")
    for section, cls in classes.items():
        for field in dataclasses.fields(cls):
            needed = field.default is dataclasses.MISSING
            default = "(needed)" if needed else repr(field.default)
            start = re.escape(f"--config.{section}.{field.name}={default}")
            doc = field.metadata["doc"]
            assert doc, f"{section}.{field.name} has no doc"
            assert re.search(rf"^ *{start} +{re.escape(doc)}$", text, re.MULTILINE), field.name


@pytest.mark.parametrize("override", ["--config.model.embed_dmi=3", "--config.model.num_heads=3"])
def test_user_mistakes_exit_with_2_and_one_message(config_file, monkeypatch, capsys, override):
    monkeypatch.setattr(sys, "argv", ["prog", f"--config={config_file}", override])
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda experiment: None, "", model=ModelConfig)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"error: model\..*\n", captured.err)
    assert captured.out == ""


def test_a_real_command_fails_without_a_traceback(config_file):
    override = "--config.data.vocab_size=9"
    command = [sys.executable, "-m", "data.prepare", f"--config={config_file}", override]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: data\.vocab_size=9 is out of range: .*\n", done.stderr)
