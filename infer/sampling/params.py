"""Settings of sampling: those of one row, and the arrays of a batch of them.

    packed = pack([Sampling(temperature=0), Sampling(temperature=0.8, top_p=0.95, seed=3)])

`infer.sampling.draw` has the stages and their order.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from core.config import Section, UserError, setting

NO_ID = 2**31 - 1  # fills up lists of ids: beyond every vocabulary
HIGHEST_BIAS = 100.0  # as in vLLM, more counts as this


@dataclasses.dataclass(frozen=True)
class Sampling(Section):
    """Settings of one row; a line of decode.prompts may set any of these for itself."""

    temperature: float = setting(1.0, "divides the logits; 0 is greedy", low=0, high=2)
    top_k: int = setting(0, "keep the k likeliest tokens; 0 is off", low=0, high=NO_ID)
    top_p: float = setting(1.0, "keep the likeliest that add up to p; 1 is off", above=0, high=1)
    min_p: float = setting(0.0, "keep those with p >= min_p * the highest p", low=0, high=1)
    typical_p: float = setting(
        1.0, "keep those of most typical surprise that add up to p; 1 is off", above=0, high=1
    )
    frequency_penalty: float = setting(
        0.0, "off the logit for each time the output has the token", low=-2, high=2
    )
    presence_penalty: float = setting(
        0.0, "off the logit if the output has the token", low=-2, high=2
    )
    repetition_penalty: float = setting(
        1.0, "divides logits > 0 and multiplies others of tokens in prompt or output", above=0
    )
    logit_bias: tuple[tuple[int, float], ...] = setting(
        (), "(id, value) pairs, added to logits; beyond -100 and 100 a value counts as that"
    )
    allowed_tokens: tuple[int, ...] = setting((), "ids; no others are drawn; () allows all", low=0)
    banned_tokens: tuple[int, ...] = setting((), "ids that are never drawn", low=0)
    min_tokens: int = setting(0, "no end token before so many new ones; stop still ends", low=0)
    max_tokens: int = setting(128, "new tokens a row at most", low=1, high=NO_ID)
    stop: tuple[str, ...] = setting((), "strings that end a row; they are never shown")
    seed: int = setting(0, "sample i of a prompt draws from (seed, i)", low=0, high=2**32 - 1)
    n: int = setting(1, "samples a prompt", low=1)

    def check(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise UserError(
                f"temperature=0 with n={self.n}: greedy samples are all the same; "
                "set n=1 or a temperature"
            )
        if self.min_tokens > self.max_tokens:
            raise UserError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}: "
                "lower the one or raise the other"
            )
        if "" in self.stop:
            raise UserError(f"stop={self.stop!r} holds an empty string, which ends every text")
        ids = [token for token, _ in self.logit_bias]
        if len(set(ids)) < len(ids):
            twice = next(token for token in ids if ids.count(token) > 1)
            raise UserError(f"logit_bias names token {twice} twice: give one value")


class Penalties(NamedTuple):
    """Together, as they share `draw.Counts`."""

    repetition_B: Any
    frequency_B: Any
    presence_B: Any


class Bias(NamedTuple):
    """The numbers added to single logits: -inf for banned tokens."""

    tokens_BJ: Any  # int32, filled up with NO_ID
    values_BJ: Any  # float32


class SamplingBatch(NamedTuple):
    """The settings of a batch, or of all rows of a run. An array is None where no row of the
    run uses its stage, which then is not in the program at all.
    """

    max_tokens_B: Any
    seed_B: Any
    temperature_B: Any  # None: all rows are greedy
    min_p_B: Any
    top_k_B: Any
    top_p_B: Any
    typical_p_B: Any
    min_tokens_B: Any
    penalties: Penalties | None
    bias: Bias | None
    allowed_BJ: Any  # int32, filled up with NO_ID; a row of nothing else allows all

    def rows(self, part: slice) -> "SamplingBatch":
        """These rows of it."""
        return jax.tree.map(lambda x: x[part], self)


def pack(hows: Sequence[Sampling]) -> SamplingBatch:
    """All rows of a run, in NumPy; its batches are `rows` of this, so one program fits all."""

    def column(name: str, dtype: type = np.float32) -> np.ndarray:
        return np.array([getattr(how, name) for how in hows], dtype)

    def used(*names: str) -> bool:
        """A stage that a row can leave out is left out by the defaults."""
        off = {field.name: field.default for field in dataclasses.fields(Sampling)}
        return any(getattr(how, name) != off[name] for how in hows for name in names)

    def optional(name: str, dtype: type = np.float32) -> np.ndarray | None:
        return column(name, dtype) if used(name) else None

    penalties = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    biased, restricted = used("logit_bias", "banned_tokens"), used("allowed_tokens")
    temperature_B = column("temperature")
    return SamplingBatch(
        max_tokens_B=column("max_tokens", np.int32),
        seed_B=column("seed", np.uint32),
        temperature_B=temperature_B if temperature_B.any() else None,
        min_p_B=optional("min_p"),
        top_k_B=optional("top_k", np.int32),
        top_p_B=optional("top_p"),
        typical_p_B=optional("typical_p"),
        min_tokens_B=optional("min_tokens", np.int32),
        penalties=Penalties(*map(column, penalties)) if used(*penalties) else None,
        bias=_bias(hows) if biased else None,
        allowed_BJ=_table([how.allowed_tokens for how in hows], NO_ID) if restricted else None,
    )


def _bias(hows: Sequence[Sampling]) -> Bias:
    tokens, values = [], []
    for how in hows:
        clamped = [min(max(value, -HIGHEST_BIAS), HIGHEST_BIAS) for _, value in how.logit_bias]
        tokens.append([*(token for token, _ in how.logit_bias), *how.banned_tokens])
        values.append([*clamped, *(-math.inf for _ in how.banned_tokens)])
    return Bias(_table(tokens, NO_ID), _table(values, 0.0))


def _table(lists: Sequence[Sequence[float]], fill: float) -> np.ndarray:
    """[B, J]: lists of numbers, filled up to a power of 2: few widths are compiled for."""
    dtype = np.int32 if isinstance(fill, int) else np.float32
    width = 2 ** math.ceil(math.log2(max(map(len, lists))))
    table_BJ = np.full((len(lists), width), fill, dtype)
    for row_J, numbers in zip(table_BJ, lists, strict=True):
        row_J[: len(numbers)] = numbers
    return table_BJ
