"""Sections with a field of each type, a config as users write them, what is said of mistakes."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from core.command import cli
from core.config import Experiment, Section, UserError, setting
from model.attention.spec import AttentionSpec, full

ROOT = Path(__file__).parents[2]

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


def toy(**fields) -> Experiment:
    return Experiment(name="x", train=Toy(**fields))


def parse(config_file: str, *overrides: str, **classes) -> Experiment:
    return cli.parse([f"--config={config_file}", *overrides], classes)


def complaint(function, *args, **kwargs) -> str:
    """The message of the UserError that the call raises."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return str(error.value)
