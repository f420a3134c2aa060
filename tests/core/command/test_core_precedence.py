"""Fields that exclude each other: the command line wins over the file."""

import dataclasses
import logging

import pytest

from core.command import cli
from core.config import UserError
from evals.config import BenchConfig
from infer.config import DecodeConfig
from train.config import TrainConfig

FILE = """
from core.config import Experiment, editable
from evals.config import BenchConfig
from infer.config import DecodeConfig
from train.config import TrainConfig

def get_config(arg):
    return editable(Experiment(
        name="x",
        decode=DecodeConfig({decode}),
        bench=BenchConfig(topology="v5p:2x2x1"),
        train=TrainConfig(start="a", start_step=3),
    ))
"""
CASES = [
    ('prompt="a"', ["prompts=p.txt"], dict(prompt="", prompts="p.txt")),
    ('prompts="p.txt"', ["prompt=a"], dict(prompt="a", prompts="")),
    ('prompt="a"', ["prompts="], dict(prompt="a", prompts="")),  # nothing is set by it
    ("speculate=4", ["cache_pages=8"], dict(speculate=0, cache_pages=8)),
    ("cache_pages=8", ["cache_window=64"], dict(cache_pages=0, cache_window=64)),
    ('k_cache="int8"', ["cache_host=True"], dict(k_cache="compute", cache_host=True)),
    ("temperature=0.7, top_p=0.9", ["beams=4"], dict(temperature=1.0, top_p=1.0, beams=4)),
    ('speculate=4, draft="d", draft_step=3', ["speculate=0"], dict(draft="", draft_step=None)),
    ("cache_window=64, cache_sinks=4", ["cache_window=0"], dict(cache_sinks=0)),
    ('weights="int4", weights_group=32', ["weights=compute"], dict(weights_group=None)),
]


@pytest.fixture
def parse(tmp_path):
    def run(fields, *overrides, **classes):
        (tmp_path / "case.py").write_text(FILE.replace("{decode}", fields))
        argv = [f"--config.{each}" for each in overrides]
        return cli.parse([f"--config={tmp_path / 'case.py'}", *argv], classes)

    return run


@pytest.mark.parametrize(("decode", "typed", "expected"), CASES, ids=[c[1][0] for c in CASES])
def test_what_is_typed_wins(parse, caplog, monkeypatch, decode, typed, expected):
    monkeypatch.setattr(logging.getLogger("cakrawala"), "propagate", True)
    caplog.set_level(logging.INFO)
    config = parse(decode, *(f"decode.{each}" for each in typed), decode=DecodeConfig).decode
    assert {name: getattr(config, name) for name in expected} == expected
    off = {field.name: field.default for field in dataclasses.fields(DecodeConfig)}
    lost = [name for name in expected if f"{name}=" in decode and expected[name] == off[name]]
    for name in {*lost} - {typed[0].partition("=")[0]}:
        assert f"decode.{name}=" in caplog.text


def test_of_other_sections(parse):
    one = parse("", "bench.compare=('a', 'b')", bench=BenchConfig)
    assert one.bench.compare == ("a", "b") and one.bench.topology == ""
    assert parse("", "train.start=", train=TrainConfig).train.start_step is None


@pytest.mark.parametrize(
    ("decode", "typed", "message"),
    [
        ("", ["decode.prompt=a", "decode.prompts=p.txt"], "prompt='a' with prompts='p.txt'"),
        ('prompt="a", prompts="p.txt"', [], "prompt='a' with prompts='p.txt'"),
    ],
)
def test_two_that_are_typed_or_in_the_file_are_refused(parse, decode, typed, message):
    with pytest.raises(UserError, match=message):
        parse(decode, *typed, decode=DecodeConfig)
