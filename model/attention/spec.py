"""WHAT attention sees: `AttentionSpec` in configs, `Mask` in kernels.

A mask is a pure function of (position, segment) pairs, evaluated on tiles, never on S x S.
Positions count from 0 inside each document; segments tell the documents of a row apart, and
segment 0 is padding (or an empty cache slot): it sees nothing and nothing sees it.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax

from core.config import Section, UserError, setting
from model.rope import Rope


class Where(NamedTuple):
    """Where tokens stand: in-document positions and segments, both int32 [B, T]."""

    positions_BT: jax.Array
    segments_BT: jax.Array


class Heads(NamedTuple):
    """What differs from head to head; None where the spec does not ask for it."""

    sink_N: jax.Array | None = None  # float32, learned logit of a key of value zero (gpt-oss)
    slope_N: jax.Array | None = None  # float32, ALiBi: score - slope * distance
    chosen: Any = None  # int32 [B, T, M, C], blocks that a query sees, or Pairs (pairs.py)


@dataclasses.dataclass(frozen=True)
class Mask:
    """What a query may see of its own segment; distances count from the query back.

    Near: a key less than `window` away (`window=1` is the query alone), or of the query's own
    chunk of `chunk` tokens, or less than `local` blocks of `block` tokens back. No limit is 0.
    Far, whatever limits near: the first `sinks` tokens, and every `stride`-th block back.
    Causal: no key after the query, except that the first `prefix` tokens are seen by all.
    """

    causal: bool = True
    window: int = 0
    chunk: int = 0
    block: int = 0
    local: int = 0
    stride: int = 0
    sinks: int = 0
    prefix: int = 0

    def allowed(
        self,
        q_positions: jax.Array,
        k_positions: jax.Array,
        q_segments: jax.Array,
        k_segments: jax.Array,
    ) -> jax.Array:
        """Booleans of the broadcast shape of the four int32 arguments."""
        seen = (q_segments == k_segments) & (k_segments > 0)
        if self.limited:
            seen = seen & (
                self._near(q_positions, k_positions) | self._far(q_positions, k_positions)
            )
        if self.causal:
            past = k_positions <= q_positions
            seen = seen & (past | (k_positions < self.prefix) if self.prefix else past)
        return seen

    def _near(self, q_positions, k_positions):
        if self.window:
            distance = q_positions - k_positions
            return (distance if self.causal else abs(distance)) < self.window
        if self.chunk:
            return q_positions // self.chunk == k_positions // self.chunk
        return q_positions // self.block - k_positions // self.block < self.local

    def _far(self, q_positions, k_positions):
        far = k_positions < self.sinks
        if self.stride:
            # Blocks apart by a multiple of the stride; no division is made pair by pair.
            q_phase, k_phase = (x // self.block % self.stride for x in (q_positions, k_positions))
            far = far | (q_phase == k_phase)
        return far

    @property
    def limited(self) -> bool:
        """Whether some earlier key may be out of sight."""
        return bool(self.window or self.chunk or self.block)

    @property
    def near(self) -> int:
        """Tokens that may be near, the query included; 0 is no limit."""
        return self.window or self.chunk or self.local * self.block

    @property
    def kept(self) -> int:
        """Tokens that a cache must keep, the first `sinks` among them; 0 is all."""
        return 0 if self.stride or not self.near else self.near + self.sinks

    @property
    def reach(self) -> int:
        """Tokens back that can be seen at all, the query included; 0 is no limit."""
        return 0 if self.sinks or self.stride or not self.causal else self.near


Kind = Literal[
    "full", "sliding", "chunked", "block_sparse", "prefix", "bidirectional", "moba", "nsa", "stream"
]
NEEDS = {  # the fields that belong to kinds, and are at least 1 there
    "window": ("sliding", "nsa", "stream"),
    "chunk": ("chunked",),
    "block": ("block_sparse", "moba", "nsa"),
    "local": ("block_sparse",),
    "prefix": ("prefix",),
    "top": ("moba", "nsa"),
    "compress": ("nsa",),
    "step": ("nsa",),
}


@dataclasses.dataclass(frozen=True)
class AttentionSpec(Section):
    """One slot of the layer pattern."""

    kind: Kind = setting("full", "what a token sees of its document")
    window: int = setting(0, "tokens a window sees, the query included", low=0)
    chunk: int = setting(0, "kind='chunked': only the own chunk of so many tokens", low=0)
    block: int = setting(0, "tokens a block, counted from the start of the text", low=0)
    local: int = setting(0, "kind='block_sparse': blocks back in sight, the own included", low=0)
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
        for field, kinds in NEEDS.items():
            value = getattr(self, field)
            if (self.kind in kinds) != (value > 0):
                kinds = " or ".join(map(repr, kinds))
                raise UserError(
                    f"kind={self.kind!r} with {field}={value}: "
                    f"a {field} goes with kind={kinds}, and is at least 1 there"
                )
        if self.stride and self.kind != "block_sparse":
            raise UserError(f"stride={self.stride} goes with kind='block_sparse'")
        if self.sinks and not self.mask.limited:
            raise UserError(f"sinks={self.sinks}: kind={self.kind!r} sees the first tokens anyway")
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
        """What may be seen at all: a query's choice, where it has one, is made from that."""
        if self.top:
            return Mask()
        names = ("window", "chunk", "block", "local", "stride", "sinks", "prefix")
        fields = {name: getattr(self, name) for name in names}
        return Mask(causal=self.kind != "bidirectional", **fields)


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
    """How a cache of `window` + `sinks` tokens is read for texts without end (StreamingLLM)."""
    return AttentionSpec(kind="stream", window=window, sinks=sinks, **fields)
