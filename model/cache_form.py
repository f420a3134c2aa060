"""`Form`: how a cache keeps keys and values, and how decoding reads them.

Form(k_cache="int8", v_cache="int4")
"""

import dataclasses
from typing import Literal

from core.config import Section, setting

Numbers = Literal["compute", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}


@dataclasses.dataclass(frozen=True)
class Form(Section):
    """Frozen and hashable; the default keeps every key and value as it was computed."""

    k_cache: Numbers = setting(
        "compute", "keys are kept so; int8 and int4 with a scale for each vector of a head"
    )
    v_cache: Numbers = setting("compute", "values are kept so")

    @classmethod
    def of(cls, section: "Form") -> "Form":
        """The fields of a section that has these and others."""
        return cls(**{f.name: getattr(section, f.name) for f in dataclasses.fields(cls)})

    @property
    def name(self) -> str:
        """For tables: "int8", "k8v4"; "plain" if nothing is special."""
        return ", ".join(filter(None, (self._numbers,))) or "plain"

    @property
    def _numbers(self) -> str:
        kinds = self.k_cache, self.v_cache
        if kinds == ("compute", "compute"):
            return ""
        if "compute" in kinds:
            return f"{kinds[0]} keys" if kinds[1] == "compute" else f"{kinds[1]} values"
        return kinds[0] if kinds[0] == kinds[1] else f"k{BITS[kinds[0]]}v{BITS[kinds[1]]}"
