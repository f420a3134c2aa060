"""Chunked prefill and a jitted decode loop over one donated cache, for a batch of rows.

engine = Engine(model, Plan(batch=8, length=1024, chunk=256), tokenizer)
state = engine.start(engine.prefill(prompts), prompts, samples, pack([Sampling()] * 8))
for made in engine.decode(state, stopped_B): ...
"""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import sharding, tree
from core.config import Unsupported
from data.tokenizer.base import Tokenizer
from infer import steps
from infer.programs import CompiledSteps, bucket
from infer.sampling import logprobs
from infer.sampling.draw import Counts
from infer.sampling.params import SamplingBatch
from infer.steps import Made, Prefilled, PromptChunk, State
from model import transformer
from model.cache import kv_cache
from model.cache.form import CacheConfig
from model.cache.kv_cache import PLAIN
from model.sizes import weights
from model.transformer import Transformer


class Plan(NamedTuple):
    """The shapes that an engine compiles for."""

    batch: int  # rows, a multiple of mesh.data
    length: int  # tokens a row that there is room for, prompt and new ones
    chunk: int  # tokens a row in one prefill step, a multiple of mesh.seq
    new: int = 0  # tokens of `length` that come after the prompt

    @classmethod
    def of(cls, rows: int, prompt: int, new: int, chunk: int) -> "Plan":
        """Rows and chunks up to what the mesh divides, lengths up to a `bucket`, so that few are
        compiled for. No chunk needs to be longer than `prompt`.
        """
        rules = sharding.prefilling()
        batch, chunk = (
            math.ceil(size / rules.size(name)) * rules.size(name)
            for size, name in ((rows, "batch"), (chunk_for(prompt, chunk), "length"))
        )
        return cls(batch, bucket(prompt + new), chunk, new)


def chunk_for(tokens: int, longest: int) -> int:
    """`longest`, or the power of 2 from 16 on that is enough for `tokens` in one step."""
    return min(longest, max(16, 2 ** math.ceil(math.log2(max(tokens, 1)))))


def _end(until_BT: np.ndarray, start: int, chunk: int) -> int:
    """Returns the end of the longest chunk from `start` in which no token looks beyond it."""
    seen_T = np.maximum.accumulate(until_BT[:, start : start + chunk].max(axis=0))
    whole_T = np.flatnonzero(seen_T < start + 1 + np.arange(chunk))
    if not whole_T.size:
        raise Unsupported(
            f"tokens {start} to {seen_T[-1]} of the rows see each other, but a prefill chunk has "
            f"{chunk} tokens, and must hold them whole: raise the chunk"
        )
    return start + 1 + int(whole_T[-1])


def _keys(seed_B: jax.Array, sample_B: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.key)(seed_B), sample_B)


class Engine:
    """A model with its prefill and decode steps, compiled for one `Plan` when first used."""

    def __init__(
        self,
        model: Transformer,
        plan: Plan,
        tokenizer: Tokenizer | None = None,
        top_logprobs: int = 0,
        form: CacheConfig = PLAIN,
        programs: CompiledSteps | None = None,
    ):
        """`top_logprobs`: of how many of the likeliest tokens `Made` tells, at every step.

        `form` says how the cache keeps keys and values, and how it is read. `programs` are those
        of an engine for the same plan and another model, which it shares.
        """
        as_read = transformer.abstract(form.apply(model.config), model.rules)
        self.model = model = tree.with_leaves(as_read, weights.leaves(model))
        self.plan, self.form = plan, form
        # The same weights, under the rules by which new tokens come one at a time.
        one_by_one = transformer.abstract(model.config, sharding.decoding())
        self.decoder = tree.with_leaves(one_by_one, weights.leaves(model))
        self.static = dict(
            top_logprobs=top_logprobs,
            eos=tokenizer.eos if tokenizer else (),
            vocab_size=tokenizer.vocab_size if tokenizer else model.config.vocab_size,
        )
        self._jitted = {
            "empty": jax.jit(self._empty),
            "keys": jax.jit(_keys),
            "extend": jax.jit(steps.extend, donate_argnums=1),
            "extend_until": jax.jit(steps.extend, donate_argnums=1),
            "extend_and_score": jax.jit(steps.extend, donate_argnums=1),
            "follow": jax.jit(logprobs.following),
            "advance": jax.jit(functools.partial(steps.advance, **self.static), donate_argnums=1),
        }
        self.programs = CompiledSteps() if programs is None else programs

    def resized(self, batch: int, chunk: int) -> "Engine":
        """The same for other rows and chunks: weights, programs and the clock are shared."""
        other = copy.copy(self)
        other.plan = self.plan._replace(batch=batch, chunk=chunk)
        other._jitted = {**self._jitted, "empty": jax.jit(other._empty)}
        return other

    def clock(self) -> float:
        """Seconds that stand still while the engine compiles."""
        return time.perf_counter() - self.programs.seconds

    def _run(self, name: str, *args: Any) -> Any:
        chunk = self.plan.chunk if name.startswith("extend") else None
        key = name, self.model.config, self.plan.batch, chunk
        return self.programs.run(key, self._jitted[name], *args)

    def empty(self) -> Prefilled:
        """A cache without tokens."""
        return self._run("empty")

    def abstract(self) -> Prefilled:
        """`empty` with shapes in place of arrays."""
        return jax.eval_shape(self._empty)

    def _empty(self) -> Prefilled:
        config, rules = self.model.config, self.model.rules
        kv = kv_cache.create(config, self.plan.batch, self.plan.length, rules, self.form)
        shape = (self.plan.batch, config.embed_dim)
        zeros_BD = jnp.zeros(shape, config.compute_dtype, out_sharding=rules("batch", None))
        return Prefilled(kv, zeros_BD)

    def place(self, x: np.ndarray) -> jax.Array:
        """Rows on the devices that work on them."""
        names = ("batch",) + (None,) * (x.ndim - 1)
        return jax.device_put(x, self.model.rules(*names))

    def prefill(
        self,
        rows: Sequence[np.ndarray],
        now: Prefilled | None = None,
        first: int = 0,
        new: Sequence[int] | None = None,
        until: Sequence[np.ndarray] | None = None,
    ) -> Prefilled:
        """The tokens `first` and later of at most `plan.batch` rows, in chunks, after `now`.

        At most `new` tokens will follow each row; `plan.new` if that is None. `until` [T] of each
        row is the last token that each of its tokens sees, itself or a later one: a chunk then ends
        where none looks beyond it. Unsupported if no chunk of the plan is long enough.
        """
        now, new_B = self.empty() if now is None else now, self._new(new)
        name = "extend" if until is None else "extend_until"
        for chunk in self.chunks(rows, first, until):
            now, _ = self._run(name, self.model, now, chunk, new_B)
        return now

    def score(
        self,
        rows: Sequence[np.ndarray],
        new: Sequence[int] | None = None,
        now: Prefilled | None = None,
        first: int = 0,
    ) -> tuple[Prefilled, list[np.ndarray]]:
        """`prefill`, and for each row [T] the log-probability of its tokens `first` and later,
        [T - first]; of the very first token there is none.
        """
        parts = []
        if now is None:
            now = self.empty()
        else:
            next_B = np.zeros(self.plan.batch, np.int32)
            next_B[: len(rows)] = [row[first] if len(row) > first else 0 for row in rows]
            logprob_B = self._run("follow", self.model, now, self.place(next_B))
            parts.append(np.asarray(logprob_B)[:, None])
        new_B = self._new(new)
        shifted = self.chunks([np.append(row[1:], 0) for row in rows], first)
        for chunk, targets in zip(self.chunks(rows, first), shifted, strict=True):
            args = self.model, now, chunk, new_B, targets.tokens_BT
            now, logprobs_BT = self._run("extend_and_score", *args)
            parts.append(np.asarray(logprobs_BT))
        logprobs_BT = np.concatenate(parts, axis=1)
        return now, [logprobs_BT[b, : len(row) - max(first, 1)] for b, row in enumerate(rows)]

    def _new(self, new: Sequence[int] | None) -> jax.Array:
        """[B], new tokens of each row."""
        new_B = np.full(self.plan.batch, self.plan.new, np.int32)
        if new is not None:
            new_B[: len(new)] = new
        return self.place(new_B)

    def chunks(
        self,
        rows: Sequence[np.ndarray],
        first: int = 0,
        until: Sequence[np.ndarray] | None = None,
    ) -> Iterator[PromptChunk]:
        """The chunks of `prefill`, from token `first` up to the end of the longest row."""
        chunk, longest = self.plan.chunk, max(map(len, rows), default=0)
        length_B = np.zeros(self.plan.batch, np.int32)
        length_B[: len(rows)] = [len(row) for row in rows]
        tokens_BT = self._padded(rows, longest + chunk)
        self._check(tokens_BT, longest)
        lengths = self.place(length_B)
        if until is None:
            for start in range(first, longest, chunk):
                yield PromptChunk(
                    self.place(tokens_BT[:, start : start + chunk]), jnp.int32(start), lengths
                )
            return
        until_BT, start = self._padded(until, longest + chunk), first
        while start < longest:
            here, end = slice(start, start + chunk), _end(until_BT, start, chunk)
            arrays = self.place(tokens_BT[:, here]), jnp.int32(start), lengths
            yield PromptChunk(*arrays, self.place(until_BT[:, here]), jnp.int32(end))
            start = end

    def _padded(self, rows: Sequence[np.ndarray], length: int) -> np.ndarray:
        padded_BT = np.zeros((self.plan.batch, length), np.int32)
        for b, row in enumerate(rows):
            padded_BT[b, : len(row)] = row
        return padded_BT

    def _check(self, tokens_BT: np.ndarray, longest: int) -> None:
        """Asserts what commands refuse by name: JAX would take the last row of a table, and the
        cache would write over its first tokens.
        """
        config = self.model.config
        assert tokens_BT.min(initial=0) >= 0, tokens_BT.min()
        assert tokens_BT.max(initial=0) < config.vocab_size, tokens_BT.max()
        assert longest <= self.plan.length, (longest, self.plan)
        assert longest <= config.context or not config.learned_positions, longest

    def start(
        self,
        now: Prefilled,
        prompts: Sequence[np.ndarray],
        samples: Sequence[int],
        packed: SamplingBatch,
    ) -> State:
        """`now` holds the prompts, no token is new yet; row b draws by its seed and samples[b].

        `packed` has the settings of these rows, and in every call the same arrays or None.
        """
        B, V = self.plan.batch, self.model.config.vocab_size
        fill = B - len(prompts)
        packed = jax.tree.map(lambda x: np.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1)), packed)
        length_B, sample_B = np.zeros(B, np.int32), np.zeros(B, np.int32)
        length_B[: len(prompts)] = [len(prompt) for prompt in prompts]
        sample_B[: len(prompts)] = samples
        ends_B = (length_B + packed.max_tokens_B.astype(np.int64))[: len(prompts)]
        self._check(np.zeros(0, np.int32), ends_B.max(initial=0))
        done_B = packed.max_tokens_B == 0
        packed = jax.tree.map(self.place, packed)
        keys_B = self._run("keys", packed.seed_B, self.place(sample_B))
        counts = None
        if packed.penalties is not None:
            prompt_BV = np.zeros((B, V), bool)
            for b, prompt in enumerate(prompts):
                prompt_BV[b, prompt] = True
            counts = Counts(self.place(prompt_BV), self.place(np.zeros((B, V), np.int32)))
        length_B, made_B, done_B = map(self.place, (length_B, np.zeros(B, np.int32), done_B))
        return State(now, length_B, made_B, done_B, keys_B, packed, counts)

    def advance(self, state: State, stopped_B: np.ndarray) -> tuple[State, tuple[jax.Array, Made]]:
        """One call of the decode loop, under way when this returns; `state` is used up.

        Beside the state: whether all rows have ended, and what is new.
        """
        state, made, finished = self._run(
            "advance", self.decoder, state, self.place(stopped_B.copy())
        )
        return state, (finished, made)

    def decode(self, state: State, stopped_B: np.ndarray) -> Iterator[Made]:
        """STEPS tokens a row at a time, as NumPy arrays, until all rows have ended.

        The caller ends row b early by setting `stopped_B[b]`.
        """
        for (made,) in ahead(self.advance, state, stopped_B):
            yield made

    def temporary_bytes(self) -> int:
        """Bytes that the compiled steps need on a device beside weights and cache."""
        steps = (p for (name, *_), p in self.programs.compiled.items() if name != "empty")
        return max(program.memory_analysis().temp_size_in_bytes for program in steps)


def ahead(advance: Callable, state: Any, stopped_B: np.ndarray) -> Iterator[tuple]:
    """Yields `out` of each `state, (finished, *out) = advance(state, stopped_B)`, in NumPy.

    The next call is under way while the caller looks at it.
    """
    state, ready = advance(state, stopped_B)
    while True:
        state, coming = advance(state, stopped_B)
        finished, *out = jax.device_get(ready)
        yield tuple(out)
        if finished or stopped_B.all():
            return
        ready = coming
