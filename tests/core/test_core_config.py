"""The schema: what is refused, and in which words."""

import json

import numpy as np
import pytest
from config_cases import CONFIG_FILE, Needy, Toy, complaint, parse, toy

from core import config
from core.config import Experiment, editable, freeze
from core.sharding import MeshConfig
from model.attention.spec import AttentionSpec, full, sliding
from model.config import ModelConfig


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG_FILE)
    return str(path)


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
        (dict(kind="sliding"), "kind='sliding' with window=0: window belongs to kind='sliding'"),
        (dict(window=4), "kind='full' with window=4: window belongs to kind='sliding'"),
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
    ("fields", "message"),
    [
        (dict(rate=float("nan")), "rate=nan is not finite: give a usual number"),
        (dict(rate=float("inf")), "rate=inf is not finite: give a usual number"),
        (dict(rate=10**400), "rate=1000"),
        (dict(count=10**5000), "count=a long int is beyond the integers of 64 bits"),
        (dict(sizes=(1e300,)), "sizes[0]=1e+300 is beyond the integers of 64 bits"),
        (dict(kind=["red"]), "kind=['red'] is not one of 'red', 'blue'"),
        (dict(kind=np.zeros(2)), "kind=array([0., 0.]) is not one of 'red', 'blue'"),
        (dict(count=np.zeros(2)), "count=array([0., 0.]) is ndarray, but it must be int"),
        (dict(parts=({1: 2},)), "parts[0].1 is not a field"),
    ],
    ids=lambda case: case[:20] if isinstance(case, str) else "",
)
def test_values_that_only_a_config_file_gives(fields, message):
    assert complaint(Toy, **fields).startswith(message)
