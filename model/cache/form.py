"""`CacheConfig`: how a cache keeps keys and values, and how decoding reads them.

CacheConfig(k_cache="int8", v_cache="int4")
"""

import dataclasses
import math
from typing import Literal

from core.config import Section, Unsupported, setting
from model.attention.spec import AttentionSpec
from model.config import ModelConfig

Numbers = Literal["compute", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}
FEW_BITS = "no compiler for TPUs writes so few bits to the host's memory"


@dataclasses.dataclass(frozen=True)
class CacheConfig(Section):
    """Frozen and hashable; the default keeps every key and value as it was computed."""

    EXCLUSIVE = {
        ("cache_host", "cache_pages"): "pages are read where they lie, and nothing on the device "
        "reads the host's memory",
        ("cache_host", "k_cache"): FEW_BITS,
        ("cache_host", "v_cache"): FEW_BITS,
        ("cache_pages", "cache_window"): "pages are chosen from the whole text, of which a window "
        "keeps the end",
    }
    NEEDS = {("cache_sinks", "cache_window"): "sinks stay in sight beside a window"}

    k_cache: Numbers = setting(
        "compute", "keys are kept so; int8 and int4 with a scale for each vector of a head"
    )
    v_cache: Numbers = setting("compute", "values are kept so")
    cache_window: int = setting(
        0, "layers that see further see so many tokens, in texts of any length; 0 is off", low=0
    )
    cache_sinks: int = setting(
        0, "with cache_window: first tokens that stay in sight; StreamingLLM has 4", low=0
    )
    cache_host: bool = setting(
        False,
        "layers that keep whole texts keep them in the host's memory; each comes to the "
        "device while the one before it computes",
    )
    cache_pages: int = setting(
        0, "a new token reads so many pages of full layers, the likeliest (Quest); 0 is all", low=0
    )
    cache_page: int = setting(16, "with cache_pages: neighbouring tokens that make a page", low=1)

    @classmethod
    def of(cls, section: "CacheConfig") -> "CacheConfig":
        """The fields of a section that has these and others."""
        return cls(**{f.name: getattr(section, f.name) for f in dataclasses.fields(cls)})

    @property
    def name(self) -> str:
        """The name in tables: "int8", "k8v4"; "plain" if nothing is special."""
        stream = f"stream {self.cache_window}+{self.cache_sinks}" * bool(self.cache_window)
        quest = f"quest {self.cache_pages}x{self.cache_page}" * bool(self.cache_pages)
        host = "host" * self.cache_host
        return ", ".join(filter(None, (self._numbers, stream, quest, host))) or "plain"

    def hosts(self, spec: AttentionSpec) -> bool:
        """Whether tokens of this layer are in the host's memory: rings are not worth it."""
        return self.cache_host and not spec.mask.kept

    def pages(self, shards: int) -> int:
        """Pages that each shard of the length reads."""
        return math.ceil(self.cache_pages / shards)

    def reads_pages(self, spec: AttentionSpec, whole: int, shards: int) -> bool:
        """Whether a shard with `whole` tokens of a text is read in part, and not all of it."""
        several = whole > self.pages(shards) * self.cache_page
        return bool(self.cache_pages) and spec.kind == "full" and several

    def apply(self, model: ModelConfig) -> ModelConfig:
        """The model as this cache is read: the same weights; Unsupported if it cannot be so."""
        if self.cache_pages and all(spec.kind != "full" for spec in model.pattern):
            kinds = ", ".join(sorted({spec.kind for spec in model.pattern}))
            raise Unsupported(
                f"cache_pages={self.cache_pages} with model.pattern of kind {kinds}: pages are "
                "chosen in layers of kind='full', and there is none; set cache_pages=0"
            )
        model = self._read(model)
        if self.cache_host and not any(map(self.hosts, model.pattern)):
            kinds = ", ".join(sorted({spec.kind for spec in model.pattern}))
            raise Unsupported(
                f"cache_host=True with layers of kind {kinds}: they keep the end of a text alone, "
                "on the device; set cache_host=False"
            )
        return model

    def _read(self, model: ModelConfig) -> ModelConfig:
        if not self.cache_window:
            return model
        if model.learned_positions:
            raise Unsupported(
                f"cache_window={self.cache_window} with model.learned_positions: texts without "
                "end need a position for each token, and the model has learned model.context="
                f"{model.context} of them; set cache_window=0"
            )
        pattern = tuple(self._streamed(spec) for spec in model.pattern)
        return dataclasses.replace(model, pattern=pattern)

    def _streamed(self, spec: AttentionSpec) -> AttentionSpec:
        """Layers that keep no more than the window anyway stay as they are."""
        kept = spec.mask.kept
        if kept and (spec.kind != "sliding" or kept <= self.cache_window + self.cache_sinks):
            return spec
        if spec.kind not in ("full", "sliding"):
            raise Unsupported(
                f"cache_window={self.cache_window} with kind={spec.kind!r} in model.pattern: it "
                "sees by where tokens stand in the text, not how far back; set cache_window=0"
            )
        if spec.rope is not None and spec.rope.by_length:
            raise Unsupported(
                f"cache_window={self.cache_window} with scaling={spec.rope.scaling!r} in "
                "model.pattern: its frequencies go by the length of the text, which has no end; "
                "set cache_window=0"
            )
        window = dict(kind="sliding", window=self.cache_window)
        if self.cache_sinks:
            window |= dict(kind="stream", sinks=self.cache_sinks)
        return dataclasses.replace(spec.everywhere(), **window)

    @property
    def _numbers(self) -> str:
        kinds = self.k_cache, self.v_cache
        if kinds == ("compute", "compute"):
            return ""
        if "compute" in kinds:
            return f"{kinds[0]} keys" if kinds[1] == "compute" else f"{kinds[1]} values"
        return kinds[0] if kinds[0] == kinds[1] else f"k{BITS[kinds[0]]}v{BITS[kinds[1]]}"
