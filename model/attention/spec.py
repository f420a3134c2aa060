"""WHAT attention sees: `AttentionSpec` in configs, `Mask` in kernels.

A mask is a pure function of (position, segment) pairs, evaluated on tiles, never on S x S.
Positions count from 0 inside each document; segments tell the documents of a row apart, and
segment 0 is padding (or an empty cache slot): it sees nothing and nothing sees it.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax

from core.config import Section, UserError, setting


class Where(NamedTuple):
    """Where tokens stand: in-document positions and segments, both int32 [B, T]."""

    positions_BT: jax.Array
    segments_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class Mask:
    """What a query may see: keys of its segment, not after it, less than `window` before it.

    The query itself counts into the window: `window=1` sees itself alone; 0 is no limit.
    """

    causal: bool = True
    window: int = 0

    def allowed(
        self,
        q_positions: jax.Array,
        k_positions: jax.Array,
        q_segments: jax.Array,
        k_segments: jax.Array,
    ) -> jax.Array:
        """Booleans of the broadcast shape of the four int32 arguments."""
        seen = (q_segments == k_segments) & (k_segments > 0)
        if self.causal:
            seen = seen & (k_positions <= q_positions)
        if self.window:
            seen = seen & (q_positions - k_positions < self.window)
        return seen


@dataclasses.dataclass(frozen=True)
class AttentionSpec(Section):
    """One slot of the layer pattern."""

    kind: Literal["full", "sliding"] = setting("full", "every earlier token, or a window")
    window: int = setting(0, "tokens seen by kind='sliding', the query included", low=0)
    rope_base: float = setting(10_000.0, "base of the rotary wavelengths", above=0)
    softcap: float = setting(0.0, "scores become cap * tanh(score / cap); 0 is off", low=0)

    def check(self) -> None:
        if (self.kind == "sliding") != (self.window > 0):
            raise UserError(
                f"kind={self.kind!r} with window={self.window}: a window goes with kind='sliding'"
            )

    @property
    def mask(self) -> Mask:
        return Mask(window=self.window)


def full(**fields) -> AttentionSpec:
    """Causal attention to the whole document."""
    return AttentionSpec(kind="full", **fields)


def sliding(window: int, **fields) -> AttentionSpec:
    """Causal attention to the last `window` tokens, the query included."""
    return AttentionSpec(kind="sliding", window=window, **fields)
