"""The schema and the command line: what is refused, and in which words."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from core import cli, config
from core.config import Experiment, Section, UserError, editable, freeze, setting
from core.sharding import MeshConfig
from data.config import DataConfig
from model.attention.spec import AttentionSpec, full, sliding
from model.config import ModelConfig

ROOT = Path(__file__).parent.parent

CONFIG_FILE = '''
"""A config as users write them."""
from core.config import Experiment, editable
from core.sharding import MeshConfig
from model.attention.spec import full, sliding
from model.config import ModelConfig


def get_config(arg=""):
    config = editable(
        Experiment(
            name="small",
            mesh=MeshConfig(simulate=8),
            model=ModelConfig(
                vocab_size=64, context=32, num_layers=4, embed_dim=16, num_heads=4,
                num_kv_heads=2, head_dim=8, mlp_dim=32, pattern=(sliding(8), full()),
            ),
        )
    )
    if arg == "tiny":
        config.model.num_layers = 2
    return config
'''


@dataclasses.dataclass(frozen=True)
class Toy(Section):
    """A section with a field of each type."""

    count: int = setting(3, "how many", low=1, high=9)
    rate: float = setting(0.5, "how fast", above=0)
    name: str = setting("a", "what it is called")
    kind: Literal["red", "blue"] = setting("red", "its colour")
    flag: bool = setting(False, "whether")
    sizes: tuple[int, ...] = setting((1, 2), "several", low=0)
    words: tuple[str, ...] = setting(("a",), "a few")
    limit: int | None = setting(None, "or none", low=0)
    parts: tuple[AttentionSpec, ...] = setting((full(),), "nested")

    def check(self) -> None:
        if self.kind == "blue" and self.flag:
            raise UserError("kind='blue' with flag=True: only red has a flag")


@dataclasses.dataclass(frozen=True)
class Needy(Section):
    """A section with a field that has no default."""

    size: int = setting(doc="no default", low=1)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG_FILE)
    return str(path)


def toy(**fields) -> Experiment:
    return Experiment(name="x", train=Toy(**fields))


def parse(config_file: str, *overrides: str, **classes) -> Experiment:
    return cli.parse([f"--config={config_file}", *overrides], classes)


def complaint(function, *args, **kwargs) -> str:
    """The message of the UserError that the call raises."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return str(error.value)


def test_editable_and_freeze_are_inverse():
    experiment = toy(count=4, parts=(sliding(8), full()))
    assert freeze(editable(experiment)) == experiment


def test_edits_reach_the_frozen_experiment():
    edited = editable(toy())
    edited.name, edited.train.count, edited.train.rate = "y", 5, 2
    assert freeze(edited) == Experiment(name="y", workdir="runs/x", train=Toy(count=5, rate=2.0))


def test_json_round_trip():
    experiment = toy(limit=7, sizes=(4,), parts=(sliding(8, softcap=3.0), full()))
    text = config.to_json(experiment)
    assert config.from_json(text, train=Toy) == experiment
    assert json.loads(text)["train"]["parts"][0]["window"] == 8
    assert "mesh" not in json.loads(text)
    assert config.from_json(text) == Experiment(name="x", workdir="runs/x")


def test_json_of_another_schema_is_refused_with_its_path():
    text = config.to_json(toy()).replace('"softcap"', '"softcup"')
    message = complaint(config.from_json, text, train=Toy)
    assert "train.parts[0].softcup is not a field; did you mean" in message
    assert message.endswith("train.parts[0].softcap?")


def test_sections_are_named():
    assert config.sections(toy()) == {"train": Toy()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(count="3"), "count='3' is str, but it must be int"),
        (dict(count=3.5), "count=3.5 is float, but it must be int"),
        (dict(count=True), "count=True is bool, but it must be int"),
        (dict(rate="fast"), "rate='fast' is str, but it must be float"),
        (dict(name=3), "name=3 is int, but it must be str"),
        (dict(flag=1), "flag=1 is int, but it must be bool"),
        (dict(kind="green"), "kind='green' is not one of 'red', 'blue'"),
        (dict(sizes=3), "sizes=3 is int, but it must be tuple[int, ...]"),
        (dict(sizes=(1, "2")), "sizes[1]='2' is str, but it must be int"),
        (dict(limit="none"), "limit='none' is str, but it must be int"),
        (dict(parts=(3,)), "parts[0]=3 is int, but it must be AttentionSpec"),
        (dict(count=0), "count=0 is out of range: it must be >= 1 and <= 9"),
        (dict(count=10), "count=10 is out of range: it must be >= 1 and <= 9"),
        (dict(rate=0.0), "rate=0.0 is out of range: it must be > 0"),
        (dict(sizes=(1, -2)), "sizes=(1, -2) is out of range: it must be >= 0"),
        (dict(limit=-1), "limit=-1 is out of range: it must be >= 0"),
        (dict(kind="blue", flag=True), "kind='blue' with flag=True: only red has a flag"),
    ],
)
def test_a_bad_value_is_refused_at_once_and_by_freeze(fields, message):
    assert complaint(Toy, **fields) == message
    edited = editable(toy())
    for name, value in fields.items():
        edited.train[name] = value
    assert complaint(freeze, edited) == f"train.{message}"


def test_what_is_accepted_is_converted():
    section = Toy(rate=2, sizes=[3, 4], limit=None, parts=[{"kind": "sliding", "window": 4}])
    assert section == Toy(rate=2.0, sizes=(3, 4), parts=(sliding(4),))
    assert type(section.rate) is float
    assert hash(section) == hash(Toy(rate=2.0, sizes=(3, 4), parts=(sliding(4),)))


def test_a_field_without_default_is_asked_for():
    assert complaint(config.build, Needy, {}, "train") == (
        "train.size is missing: Needy needs a value for it"
    )


def test_unknown_field_without_a_near_name_lists_all():
    message = config.unknown_field("train.zzz", "zzz", ["count", "rate"])
    assert message == "train.zzz is not a field; the fields are count, rate"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="sliding"), "kind='sliding' with window=0: a window goes with kind='sliding'"),
        (dict(window=4), "kind='full' with window=4: a window goes with kind='sliding'"),
    ],
)
def test_attention_spec_contradictions(fields, message):
    assert message in complaint(AttentionSpec, **fields)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_heads=3"], "num_heads=3 is not a multiple of num_kv_heads=2"),
        (["head_dim=5"], "head_dim=5 is odd: RoPE rotates pairs"),
        (["num_layers=1"], "pattern has 2 slots for num_layers=1"),
        (["pattern=()"], "pattern has 0 slots for num_layers=4"),
        (["dtype=float16"], "dtype='float16' is not one of 'float32', 'bfloat16'"),
        (["embed_dim=wide"], "embed_dim='wide' is str, but it must be int"),
        (["embed_dim=0"], "embed_dim=0 is out of range: it must be >= 1"),
    ],
)
def test_model_mistakes_on_the_command_line(config_file, overrides, message):
    overrides = [f"--config.model.{text}" for text in overrides]
    assert complaint(parse, config_file, *overrides).startswith(f"model.{message}")


def test_overrides_reach_their_fields(config_file):
    experiment = parse(
        f"{config_file}:tiny",
        "--config.name=1e3",
        "--config.model.norm_eps=1e-5",
        "--config.model.tied_head=false",
        "--config.model.dtype=float32",
        "--config.mesh.model=2",
        "--config.model.pattern=[{'kind':'sliding','window':4,'softcap':5e5},{'kind':'full'}]",
        model=ModelConfig,
        mesh=MeshConfig,
    )
    assert experiment.name == "1e3"
    assert experiment.model.num_layers == 2
    assert experiment.model.norm_eps == 1e-5
    assert experiment.model.tied_head is False
    assert experiment.mesh == MeshConfig(simulate=8, model=2)
    assert experiment.model.pattern == (sliding(4, softcap=5e5), full())


def test_a_nested_mistake_has_its_whole_path(config_file):
    override = "--config.model.pattern=[{'kind':'full'},{'kind':'sliding','windows':4}]"
    assert complaint(parse, config_file, override) == (
        "model.pattern[1].windows is not a field; did you mean model.pattern[1].window?"
    )
    override = "--config.model.pattern=[{'kind':'sliding','window':-4}]"
    assert complaint(parse, config_file, override).startswith(
        "model.pattern[0].window=-4 is out of range: it must be >= 0"
    )


@pytest.mark.parametrize(
    ("text", "current", "value"),
    [
        ("3", 1, 3),
        ("1e-3", 1.0, 1e-3),
        ("True", False, True),
        ("none", None, None),
        ("null", 3, None),
        ("a,b", ("c",), ("a", "b")),
        ("5", (1, 2), (5,)),
        ("[1, 2]", (3,), [1, 2]),
        ("none", "text", "none"),
        ("007", "text", "007"),
    ],
)
def test_literals(text, current, value):
    result = cli.literal(text, current)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "exactly one --config is needed; usage: --config=FILE[:ARG]"),
        (["--config="], "exactly one --config is needed"),
        (["--config=no.py"], "--config=no.py: there is no such file"),
        (["--config={file}", "--config={file}"], "exactly one --config is needed"),
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
        (["--config={file}"], "{file} has no section 'data': this command needs DataConfig"),
    ],
)
def test_command_line_mistakes(config_file, argv, message):
    argv = [arg.format(file=config_file) for arg in argv]
    found = complaint(cli.parse, argv, {"data": DataConfig})
    assert message.format(file=config_file) in found
    assert "_class" not in found


def test_a_file_without_get_config(tmp_path):
    (tmp_path / "empty.py").write_text("x = 3\n")
    message = complaint(parse, str(tmp_path / "empty.py"))
    assert message.endswith("empty.py defines no function get_config(arg)")
    (tmp_path / "notes.txt").write_text("x = 3\n")
    assert complaint(parse, str(tmp_path / "notes.txt")).endswith("is not a Python file")


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
    command = [sys.executable, "-m", "data.prepare", f"--config={config_file}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {config_file} has no section 'data': this command needs DataConfig\n"
    )
