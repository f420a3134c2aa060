"""`AttentionSpec`: what a config says of one layer's attention, and a constructor for each kind.

pattern = (sliding(1024), sliding(1024), full(rope=None))
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from core.config import Section, UserError, setting
from model.attention.mask import (
    Bidirectional,
    BlockSparse,
    Chunk,
    Dilated,
    Full,
    Mask,
    Prefix,
    Window,
)
from model.ops.rope import Rope


class Heads(NamedTuple):
    """The parameters of single heads; None where the spec does not ask for them."""

    sink_N: jax.Array | None = None  # float32, learned logit of a key of value zero (gpt-oss)
    slope_N: jax.Array | None = None  # float32, ALiBi: score - slope * distance
    chosen: Any = None  # int32 [B, T, M, C], blocks that a query sees, or RoutingPairs


Kind = Literal[
    "full", "sliding", "chunked", "block_sparse", "dilated", "prefix", "bidirectional",
    "moba", "nsa", "stream",
]  # fmt: skip
MASKS: dict[str, type[Mask]] = {  # what may be seen at all; moba and nsa choose from that
    "full": Full,
    "sliding": Window,
    "chunked": Chunk,
    "block_sparse": BlockSparse,
    "dilated": Dilated,
    "prefix": Prefix,
    "bidirectional": Bidirectional,
    "moba": Full,
    "nsa": Full,
    "stream": Window,
}
CHOICE = {"moba": ("block", "top"), "nsa": ("window", "block", "top", "compress", "step")}


def _fields(kind: str) -> tuple[set[str], set[str]]:
    """The fields that a kind must have, at least 1, and those that it may have."""
    fields = dataclasses.fields(MASKS[kind])
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    return needed.union(CHOICE.get(kind, ())), {field.name for field in fields} - needed


NEEDED, OPTIONAL = ({kind: _fields(kind)[i] for kind in MASKS} for i in range(2))
OF_KINDS = sorted(set().union(*NEEDED.values(), *OPTIONAL.values()))


@dataclasses.dataclass(frozen=True)
class AttentionSpec(Section):
    """One slot of the layer pattern."""

    kind: Kind = setting("full", "what a token sees of its document")
    window: int = setting(0, "tokens a window sees, the query included", low=0)
    chunk: int = setting(0, "kind='chunked': only the own chunk of so many tokens", low=0)
    block: int = setting(0, "tokens a block, counted from the start of the text", low=0)
    local: int = setting(0, "kind='block_sparse': blocks back in sight, the own included", low=0)
    dilation: int = setting(0, "kind='dilated': a window sees every so many-th token", low=0)
    stride: int = setting(0, "it also sees every so many-th block back; 0 is none", low=0)
    top: int = setting(0, "blocks that a query chooses, those it always sees included", low=0)
    compress: int = setting(0, "kind='nsa': tokens that are compressed to one", low=0)
    step: int = setting(0, "tokens from one compressed token to the next", low=0)
    prefix: int = setting(0, "kind='prefix': first tokens of a text, seen by all of it", low=0)
    sinks: int = setting(0, "first tokens that stay in sight, beside what is near", low=0)
    sink_logit: bool = setting(False, "a learned logit a head takes part of the softmax")
    alibi: float = setting(0.0, "scores fall by it x a head's slope x distance; 0 is off", low=0)
    rope: Rope | None = setting(Rope(), "rotary positions; None is without")
    kv_heads: int = setting(0, "heads of keys and values; 0 is the model's num_kv_heads", low=0)
    head_dim: int = setting(0, "width of a head; 0 is the model's", low=0)
    shared_kv: bool = setting(False, "keys and values are of one projection")
    softcap: float = setting(0.0, "scores become cap * tanh(score / cap); 0 is off", low=0)

    def check(self) -> None:
        for field in OF_KINDS:
            value = getattr(self, field)
            needed = field in NEEDED[self.kind]
            if needed != (value > 0) and not (value and field in OPTIONAL[self.kind]):
                kinds = [kind for kind in MASKS if field in NEEDED[kind] | OPTIONAL[kind]]
                least = ", and is at least 1 there" * needed
                raise UserError(
                    f"kind={self.kind!r} with {field}={value}: "
                    f"{field} belongs to kind={' or '.join(map(repr, kinds))}{least}"
                )
        if self.kind == "stream" and not self.sinks:
            raise UserError("kind='stream' with sinks=0: that is kind='sliding'")
        if self.alibi and self.softcap:
            raise UserError("alibi with a softcap: no model has both, and the order matters")
        if self.kind == "nsa":
            self._check_nsa()

    def _check_nsa(self) -> None:
        for field in ("compress", "block"):
            if getattr(self, field) % self.step:
                raise UserError(
                    f"kind='nsa' with {field}={getattr(self, field)}: a multiple of "
                    f"step={self.step} is needed, so that blocks can share what is compressed"
                )
        if self.top < 3:
            raise UserError(
                f"kind='nsa' with top={self.top}: the first block, the own and the one before it "
                "are always seen, so top is at least 3"
            )
        if self.sink_logit or self.alibi:
            raise UserError("kind='nsa' has three softmaxes: neither sink_logit nor alibi fits")

    def everywhere(self) -> "AttentionSpec":
        """The same scores over the whole document."""
        names = "sink_logit", "alibi", "rope", "kv_heads", "head_dim", "shared_kv", "softcap"
        return AttentionSpec(**{name: getattr(self, name) for name in names})

    @property
    def mask(self) -> Mask:
        """The keys that may be seen at all: kinds that choose blocks choose from them."""
        mask = MASKS[self.kind]
        return mask(**{f.name: getattr(self, f.name) for f in dataclasses.fields(mask)})

    def keys_seen(self, length: int) -> np.ndarray:
        """Keys that each token of a document of `length` attends to, int [length].

        Those of the three branches of NSA add up; what it costs to choose blocks is not counted.
        FLOPs and the cost model go by it.
        """
        if not self.top:
            return self.mask.count(length)
        q = np.arange(length)
        chosen = q % self.block + 1 + np.minimum(q // self.block, self.top - 1) * self.block
        if self.kind == "moba":
            return chosen
        compressed = np.maximum((q + 1 - self.compress) // self.step + 1, 0)
        return chosen + compressed + np.minimum(q + 1, self.window)


def full(**fields) -> AttentionSpec:
    """Causal attention to the whole document."""
    return AttentionSpec(kind="full", **fields)


def bidirectional(**fields) -> AttentionSpec:
    """Attention to the whole document, what comes later included: for embeddings."""
    return AttentionSpec(kind="bidirectional", **fields)


def sliding(window: int, **fields) -> AttentionSpec:
    """Causal attention to the last `window` tokens, the query included."""
    return AttentionSpec(kind="sliding", window=window, **fields)


def chunked(chunk: int, **fields) -> AttentionSpec:
    """Causal attention inside chunks: tokens i // chunk of a document see each other."""
    return AttentionSpec(kind="chunked", chunk=chunk, **fields)


def block_sparse(block: int, local: int, stride: int = 0, **fields) -> AttentionSpec:
    """Causal attention to `local` blocks, to every `stride`-th block back, and to `sinks`.

    The strided pattern of Sparse Transformer (arXiv 1904.10509); with `sinks` of whole blocks the
    global tokens of Longformer and BigBird (arXiv 2004.05150, 2007.14062).
    """
    return AttentionSpec(kind="block_sparse", block=block, local=local, stride=stride, **fields)


def dilated(window: int, dilation: int, **fields) -> AttentionSpec:
    """Causal attention to every `dilation`-th token back, `window` of them, the query included.

    As in the dilated sliding window of Longformer (arXiv 2004.05150).
    """
    return AttentionSpec(kind="dilated", window=window, dilation=dilation, **fields)


def prefix(tokens: int, **fields) -> AttentionSpec:
    """Causal attention, but all see the first `tokens` of the document, these each other too."""
    return AttentionSpec(kind="prefix", prefix=tokens, **fields)


def moba(block: int, top: int, **fields) -> AttentionSpec:
    """Causal attention to the own block and to the top - 1 whole ones whose mean key fits best.

    Mixture of block attention (arXiv 2502.13189): each query head chooses for itself.
    """
    return AttentionSpec(kind="moba", block=block, top=top, **fields)


def nsa(
    block: int = 64, top: int = 16, window: int = 512, compress: int = 32, step: int = 16, **fields
) -> AttentionSpec:
    """Native sparse attention (arXiv 2502.11089): compressed, chosen and near tokens, gated.

    Every `step` tokens, `compress` of them become one; the heads of a group see all of these, the
    `top` blocks that they attend to most there, and the last `window` tokens.
    """
    how = dict(block=block, top=top, window=window, compress=compress, step=step)
    return AttentionSpec(kind="nsa", **how, **fields)


def stream(window: int, sinks: int, **fields) -> AttentionSpec:
    """Reading a cache of `window` + `sinks` tokens for texts without end (StreamingLLM)."""
    return AttentionSpec(kind="stream", window=window, sinks=sinks, **fields)
