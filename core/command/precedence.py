"""Precedence of the command line over the file, also for fields that exclude each other.

    class DecodeConfig(Section):
        EXCLUSIVE = {("prompt", "prompts"): why}  # one of them at most is set
        NEEDS = {("draft", "speculate"): why}     # draft is nothing without speculate

`--config.decode.prompts=p.txt` then unsets a prompt of the file, `--config.decode.speculate=0` its
draft. Two fields that are both typed are left for the section to refuse.
"""

import dataclasses
import logging
from collections.abc import Iterable

import ml_collections

from core.config import Section

log = logging.getLogger("cakrawala")


def settle(config: ml_collections.ConfigDict, argv: Iterable[str]) -> None:
    """Unsets the fields of the file that cannot stand beside those in `argv`, and says so."""
    typed = {arg.partition("=")[0].removeprefix("--config.") for arg in argv}
    for name, section in config.items():
        cls = section.get("_class") if isinstance(section, ml_collections.ConfigDict) else None
        if isinstance(cls, type) and issubclass(cls, Section):
            _settle(name, section, cls, typed)


def _settle(
    name: str, section: ml_collections.ConfigDict, cls: type[Section], typed: set[str]
) -> None:
    """The same for one section; a field that is unset counts as typed for what needs it."""
    off = {field.name: field.default for field in dataclasses.fields(cls)}
    decided = {field for field in off if f"{name}.{field}" in typed}

    def is_set(field: str) -> bool:
        return section[field] != off[field]

    def unset(field: str, winner: str) -> None:
        log.info(
            "%s.%s=%r of the config file is left out: %s.%s=%r of the command line wins",
            name, field, section[field], name, winner, section[winner],
        )  # fmt: skip
        section[field] = off[field]
        decided.add(field)

    for pair in cls.EXCLUSIVE:
        for winner, other in (pair, pair[::-1]):
            if winner in decided and other not in decided and is_set(winner) and is_set(other):
                unset(other, winner)
    for field, needed in cls.NEEDS:
        if needed in decided and field not in decided and is_set(field) and not is_set(needed):
            unset(field, needed)
