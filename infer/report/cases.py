"""What a report compares: the model as it is, and variants of it, each a line of a list.

for case in of(model): case.name  # "sliding", "full"
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from core import tree
from model import transformer
from model.transformer import Transformer

AS_THE_MODEL = "as the model"
# Kinds of the cache: name -> keywords that `cache.create` and `Engine` take for it.
KV_KINDS: Mapping[str, Mapping[str, Any]] = {AS_THE_MODEL: {}}


class Case(NamedTuple):
    """One line of every plot. `model` may be abstract: shapes alone."""

    attention: str
    kv: str
    model: Transformer
    own: bool  # the pattern that it was trained with: quality is told of those alone
    how: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        return self.attention if self.kv == AS_THE_MODEL else f"{self.attention}, {self.kv}"


def of(model: Transformer) -> list[Case]:
    """Each kind of cache for the model as it is, and the first for full attention everywhere."""
    config = model.config
    kinds = [spec.kind for spec in config.pattern if spec.kind != "full"]
    attention = kinds[0] if kinds else "full"
    found = [Case(attention, kv, model, True, how) for kv, how in KV_KINDS.items()]
    if kinds:
        found.append(Case("full", AS_THE_MODEL, everywhere(model), False))
    return found


def everywhere(model: Transformer) -> Transformer:
    """The same weights with full attention in every layer."""
    pattern = tuple(spec.everywhere() for spec in model.config.pattern)
    config = dataclasses.replace(model.config, pattern=pattern)
    return tree.with_leaves(transformer.abstract(config, model.rules), tree.named_leaves(model))
