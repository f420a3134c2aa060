"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split as in LLaMA.

    Rope(500_000.0)                                    a larger base ("ABF")
    Rope(scaling="yarn", factor=4.0, original=4096)    4 times as long a context

Frequencies are made in float64 where they are constants. An angle is a position times a frequency
modulo one turn, in integers of 2^-32 of a turn: as a float32 product it would be off by up to 0.03
radians at position 1,000,000, each token by another amount.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from core.config import Section, UserError, setting

Scaling = Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"]


@dataclasses.dataclass(frozen=True)
class Rope(Section):
    """Wavelengths 2 pi base^(2i / H), and how they are stretched for texts beyond `original`.

    linear divides all frequencies by `factor` (arXiv 2306.15595). llama3 (arXiv 2407.21783) and
    yarn (arXiv 2309.00071) divide those with less than `slow` turns within `original`, keep those
    with more than `fast`, and blend between. dynamic raises the base, and longrope (arXiv
    2402.13753) divides by `long` in place of `short`, as the text gets longer than `original`.
    """

    base: float = setting(10_000.0, "of the wavelengths; a larger one reaches further", above=1)
    scaling: Scaling = setting("none", "how frequencies are changed for longer texts")
    factor: float = setting(1.0, "of which the context is longer than `original`", low=1)
    original: int = setting(0, "tokens that the frequencies were trained for", low=0)
    slow: float = setting(1.0, "yarn, llama3: turns within `original`, low end", above=0)
    fast: float = setting(32.0, "yarn, llama3: turns within `original`, high end", above=0)
    truncate: bool = setting(True, "yarn: the blend starts and ends at whole pairs")
    fraction: float = setting(1.0, "of the pairs that turn, the fastest", above=0, high=1)
    attention_factor: float = setting(
        0.0, "cos and sin are multiplied by it; 0 is what the paper says", low=0
    )
    short: tuple[float, ...] = setting((), "longrope: a divisor a pair, up to `original`", above=0)
    long: tuple[float, ...] = setting((), "longrope: a divisor a pair, beyond `original`", above=0)

    def check(self) -> None:
        if self.scaling in ("none", "linear"):
            idle = {"original": 0, "slow": 1.0, "fast": 32.0, "truncate": True}
        elif self.original == 0:
            raise UserError(f"scaling={self.scaling!r} with original=0: what was trained for?")
        else:
            idle = {}
        if self.scaling == "none":
            idle["factor"] = 1.0
        if self.scaling != "longrope":
            idle |= {"short": (), "long": ()}
        elif not self.short or len(self.short) != len(self.long):
            raise UserError(
                f"scaling='longrope' with {len(self.short)} short and {len(self.long)} long "
                "divisors: each pair of a head needs one of either"
            )
        for field, value in idle.items():
            if getattr(self, field) != value:
                raise UserError(
                    f"{field}={getattr(self, field)!r} means nothing with scaling={self.scaling!r}"
                )
        if self.fraction < 1 and self.scaling not in ("none", "linear"):
            raise UserError(
                f"fraction={self.fraction} with scaling={self.scaling!r}: no model has both"
            )
        if self.fast <= self.slow:
            raise UserError(f"fast={self.fast} must be more than slow={self.slow}")

    @property
    def magnitude(self) -> float:
        """The factor of cos and sin; section 3 of both papers."""
        if self.attention_factor:
            return self.attention_factor
        if self.scaling == "yarn":
            return 0.1 * math.log(self.factor) + 1
        if self.scaling == "longrope":
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original))
        return 1.0

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on the length of the text."""
        return self.scaling in ("dynamic", "longrope")


def frequencies(rope: Rope, head_dim: int, length: jax.Array | None = None) -> jax.Array:
    """Radians a token, float32: [H / 2], or [..., H / 2] for texts of `length` if `by_length`."""
    return jnp.float32(_frequencies(rope, head_dim, length))


def _frequencies(rope: Rope, head_dim: int, length: jax.Array | None) -> np.ndarray | jax.Array:
    """The same; those that do not go by length in float64, by NumPy."""
    exponents = np.arange(0, head_dim, 2) / head_dim
    plain = rope.base**-exponents
    plain[int(rope.fraction * head_dim // 2) :] = 0.0
    if rope.scaling == "dynamic":
        # NTK-aware: the longest wavelength grows as the text does, the shortest stays.
        over = jnp.maximum(length, rope.original).astype(jnp.float32) / rope.original
        growth = (rope.factor * over - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
        plain_h, exponents_h = (
            jnp.float32(x).reshape((1,) * growth.ndim + (-1,)) for x in (plain, exponents)
        )
        return plain_h * growth[..., None] ** -exponents_h
    if rope.scaling == "longrope":
        if len(rope.long) != head_dim // 2:
            raise UserError(
                f"rope.long has {len(rope.long)} divisors, but head_dim={head_dim} has "
                f"{head_dim // 2} pairs"
            )
        short_h, long_h = (
            jnp.float32(plain / np.array(x)).reshape((1,) * length.ndim + (-1,))
            for x in (rope.short, rope.long)
        )
        return jnp.where(length[..., None] > rope.original, long_h, short_h)
    if rope.scaling == "linear":
        plain = plain / rope.factor
    elif rope.scaling in ("yarn", "llama3"):
        kept = _kept_yarn(rope, head_dim) if rope.scaling == "yarn" else _kept_llama3(rope, plain)
        plain = plain * kept + plain / rope.factor * (1 - kept)
    return plain


def _kept_yarn(rope: Rope, head_dim: int) -> np.ndarray:
    """Share of each frequency that is not divided: it falls linearly over the pairs."""

    def pair(turns: float) -> float:  # whose wavelength fits `turns` times into `original`
        pairs = head_dim / 2
        return pairs * math.log(rope.original / (2 * math.pi * turns), rope.base)

    first, last = pair(rope.fast), pair(rope.slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    span = (last - first) or 0.001
    return 1 - np.clip((np.arange(head_dim // 2) - first) / span, 0, 1)


def _kept_llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Share of each frequency that is not divided: it rises linearly with the turns."""
    turns = rope.original * plain / (2 * math.pi)
    return np.clip((turns - rope.slow) / (rope.fast - rope.slow), 0, 1)


def table(
    positions_BT: jax.Array, rope: Rope, head_dim: int, length_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, 1, H / 2] float32, times the magnitude.

    `length_BT` is the length of each token's text, or [B, 1] where a row is one text.
    """
    per_token = _frequencies(rope, head_dim, length_BT)
    if not rope.by_length:
        per_token = per_token[None, None]  # the same for every token
    angles_BTh = _angles(positions_BT, per_token)
    cos_BTh, sin_BTh = (rope.magnitude * f(angles_BTh) for f in (jnp.cos, jnp.sin))
    return cos_BTh[:, :, None, :], sin_BTh[:, :, None, :]


def _angles(positions_BT: jax.Array, per_token: np.ndarray | jax.Array) -> jax.Array:
    """Radians [B, T, H / 2] in -pi .. pi, for any int32 position and frequencies below 2 pi.

    A frequency counts to 2^-39 of a turn: at position 1,000,000 this is 1e-5 radians.
    """
    xp = np if isinstance(per_token, np.ndarray) else jnp
    units = per_token * (2**32 / (2 * math.pi))
    whole = xp.floor(units)
    rest = xp.floor((units - whole) * 2**7).astype(xp.int32)
    at_BT1 = positions_BT[..., None]
    # Unsigned integers wrap around, as whole turns do.
    phase_BTh = at_BT1.astype(jnp.uint32) * whole.astype(xp.uint32)
    # at * rest / 2^7 in two parts: the product itself overflows from position 2^24 on.
    fraction_BTh = (at_BT1 >> 7) * rest + (((at_BT1 & 127) * rest) >> 7)
    phase_BTh += fraction_BTh.astype(jnp.uint32)
    return phase_BTh.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2 * math.pi / 2**32)


def rotate(x_BTNH: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + H / 2) of each head in float32; the dtype stays."""
    cos, sin = cos_sin
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)
