"""The cases that a report compares: the model as it is, and variants of it, each a line of a list.

for case in of(model, CacheConfig(), ("int8",)): case.name  # "sliding", "sliding, int8", "full"
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from core import tree
from core.config import UserError
from model import transformer
from model.cache.form import CacheConfig
from model.cache.kv_cache import PLAIN
from model.sizes import weights
from model.transformer import Transformer

# Kinds of the cache that bench.kv names, beside the one that the section's own fields give.
KV_KINDS = {
    "plain": PLAIN,
    "int8": CacheConfig(k_cache="int8", v_cache="int8"),
    "k8v4": CacheConfig(k_cache="int8", v_cache="int4"),
    "int4": CacheConfig(k_cache="int4", v_cache="int4"),
    "stream": CacheConfig(cache_window=1024, cache_sinks=4),
    "quest": CacheConfig(cache_pages=128),
    "host": CacheConfig(cache_host=True),
}


class Case(NamedTuple):
    """One line of every plot. `model` may be abstract: shapes alone."""

    attention: str
    form: CacheConfig
    model: Transformer  # as the cache is read
    own: bool  # the pattern that it was trained with: quality is told of those alone

    @property
    def kv(self) -> str:
        return self.form.name

    @property
    def name(self) -> str:
        return self.attention if self.kv == "plain" else f"{self.attention}, {self.kv}"


def of(model: Transformer, form: CacheConfig = PLAIN, kinds: Sequence[str] = ()) -> list[Case]:
    """The model with each kind of cache, then with the first and full attention everywhere."""
    for kind in kinds:
        if kind not in KV_KINDS:
            raise UserError(f"bench.kv names {kind!r}, which is not one of {', '.join(KV_KINDS)}")
    config = model.config
    limited = [spec.kind for spec in config.pattern if spec.kind != "full"]
    attention = limited[0] if limited else "full"
    forms = dict.fromkeys([form, *(KV_KINDS[kind] for kind in kinds)])
    found = [Case(attention, each, as_read(model, each), True) for each in forms]
    if limited:
        found.append(Case("full", form, as_read(everywhere(model), form), False))
    return found


def as_read(model: Transformer, form: CacheConfig) -> Transformer:
    """The same weights; Unsupported if such a cache cannot be."""
    config = form.apply(model.config)
    return tree.with_leaves(transformer.abstract(config, model.rules), weights.leaves(model))


def everywhere(model: Transformer) -> Transformer:
    """The same weights with full attention in every layer."""
    pattern = tuple(spec.everywhere() for spec in model.config.pattern)
    config = dataclasses.replace(model.config, pattern=pattern)
    return tree.with_leaves(transformer.abstract(config, model.rules), weights.leaves(model))
