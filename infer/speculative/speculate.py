"""Speculative decoding: tokens are guessed, and one step of the model checks several of them.

    speculator = Speculator(engine, guesses=4, ngram=3)
    for made in speculator.decode(state, stopped_B, prompts): ...

After each guess the model's own token is drawn as it always is: under the row's settings, with the
key of its place. A guess was right if it is that token; so the text is the same, token for token,
as without guesses. The draft draws with the same keys, hence the same noise, so that it agrees
where it can: the Gumbel coupling of arXiv 2408.07978. Of two distributions at a distance d in total
variation it accepts at least (1 - d) / (1 + d), where the rejection sampling of arXiv 2211.17192
accepts 1 - d; what guesses without chance, as an n-gram, fares alike under both.

The cache is only read while guesses are checked. What is right is written after that, so a ring
buffer never loses a key to a wrong one.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.config import Unsupported, UserError
from core.sharding import Rules
from infer import load, steps
from infer.config import DecodeConfig
from infer.engine import Engine, ahead
from infer.load import BundleInfo
from infer.prefix import PrefixCache
from infer.rows import Request
from infer.speculative import guess
from infer.steps import Made, State
from model.attention.mask import Positions
from model.cache.form import CacheConfig
from model.cache.kv_cache import KVCache
from model.transformer import Transformer

ROUNDS = 4  # steps of the model in a call of the loop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Speculation:
    """Between two calls of the loop. The last token of a row is drawn, but not in the cache."""

    state: State
    last_B: jax.Array  # int32
    tokens_BS: jax.Array | None  # int32, the text so far, -1 after it; of n-grams
    draft: KVCache | None  # of a draft, after the same tokens


def begin(
    model: Transformer, state: State, tokens_BS: jax.Array | None, draft: KVCache | None, **static
) -> tuple[Speculation, Made]:
    """The first token of each row, from the state after its prompt."""
    rules, eos = model.rules, static["eos"]
    logits_BV = jax.sharding.reshard(model.logits(state.prefilled.last_BD), rules("batch", None))
    drawn = steps.drawn_of(logits_BV, state, rules=rules, **static)
    drawn = jax.tree.map(lambda x_B: x_B[:, None], drawn)
    token_B1, active_B1 = drawn.tokens_BC, ~state.done_B[:, None]
    made = drawn._replace(tokens_BC=jnp.where(active_B1, token_B1, -1))
    return _after(state, made, active_B1, token_B1[:, 0], tokens_BS, draft, eos), made


def advance(
    models: tuple[Transformer, Transformer | None],
    now: Speculation,
    stopped_B: jax.Array,
    *,
    guesses: int,
    ngram: int,
    **static,
) -> tuple[Speculation, jax.Array, Made, jax.Array]:
    """(state, whether all rows have ended, tokens [B, ROUNDS * (guesses + 1)] with -1 between them,
    [guesses made, guesses right, rows that a step grew]).
    """
    model, T, B = models[0], guesses + 1, now.last_B.size
    rows = model.rules("batch", None, None)
    tokens_BRT = jnp.full((B, ROUNDS, T), -1, jnp.int32, out_sharding=rows)
    made = Made(tokens_BRT, tokens_BRT * 0.0, None, None)
    if top := static["top_logprobs"]:
        shape, rows = (B, ROUNDS, T, top), model.rules("batch", None, None, None)
        tokens_BRTJ = jnp.zeros(shape, jnp.int32, out_sharding=rows)
        made = made._replace(top_tokens_BCJ=tokens_BRTJ, top_logprobs_BCJ=tokens_BRTJ * 0.0)

    def unfinished(carry):
        i, now, *_ = carry
        return (i < ROUNDS) & ~now.state.done_B.all()

    def step(carry):
        i, now, made, tally = carry
        now, new, counted = _check(models, now, guesses, ngram, static)
        made = jax.tree.map(lambda all_BRT, new_BT: all_BRT.at[:, i].set(new_BT), made, new)
        return i + 1, now, made, tally + counted

    state = dataclasses.replace(now.state, done_B=now.state.done_B | stopped_B)
    carry = jnp.int32(0), dataclasses.replace(now, state=state), made, jnp.zeros(3, jnp.int32)
    _, now, made, tally = jax.lax.while_loop(unfinished, step, carry)
    made = jax.tree.map(lambda x: x.reshape(B, ROUNDS * T, *x.shape[3:]), made)
    return now, now.state.done_B.all(), made, tally


def _check(
    models: tuple[Transformer, Transformer | None],
    now: Speculation,
    guesses: int,
    ngram: int,
    static: dict[str, Any],
) -> tuple[Speculation, Made, jax.Array]:
    """One step of the model: guesses, what is drawn after each, and as much of it as is right."""
    (model, draft), state, eos = models, now.state, static["eos"]
    limit_B = state.packed.max_tokens_B
    total_B, end_B = state.length_B + limit_B, state.length_B + state.made_B
    if draft is None:
        guess_Bk = guess.by_ngram(now.tokens_BS, end_B, guesses, ngram, model.rules)
    else:
        guess_Bk, draft_new, draft_hidden_BTD = guess.by_draft(
            draft, now.draft, state, now.last_B, total_B, guesses,
            vocab_size=static["vocab_size"], width=model.config.vocab_size, eos=eos,
        )  # fmt: skip
    tokens_BT = _join(now.last_B[:, None], guess_Bk, model.rules)
    active_B1, each_1T = ~state.done_B[:, None], jnp.arange(guesses + 1)[None]
    # Nothing is guessed beyond a row's limit: there is no room for it.
    known_BT = active_B1 & (tokens_BT >= 0) & (each_1T < (limit_B - state.made_B)[:, None])
    at = Positions(end_B[:, None] - 1 + each_1T, known_BT.astype(jnp.int32))
    cache = state.prefilled.cache
    hidden_BTD, new = model.read(jnp.maximum(tokens_BT, 0), at, cache, total_B)
    drawn = _drawn(model, hidden_BTD, state, tokens_BT, static)

    right_Bk = known_BT[:, 1:] & (drawn.tokens_BC[:, :-1] == tokens_BT[:, 1:])
    # A token comes out if all guesses before it were right, and none of them an end.
    goes_on_Bk = right_Bk & ~steps.is_end(drawn.tokens_BC[:, :-1], eos)
    all_right_Bk = jnp.cumprod(goes_on_Bk.astype(jnp.int32), axis=1) > 0
    out_BT = active_B1 & _join(active_B1, all_right_Bk, model.rules)
    made = drawn._replace(tokens_BC=jnp.where(out_BT, drawn.tokens_BC, -1))
    kept = at._replace(segments_BT=out_BT.astype(jnp.int32))
    cache = model.write(cache, new, kept, hidden_BTD)
    draft_cache = now.draft
    if draft is not None:
        draft_cache = draft.write(now.draft, draft_new, kept, draft_hidden_BTD)
    is_last_BT = out_BT & (each_1T == out_BT.sum(axis=1, keepdims=True) - 1)
    last_B = jnp.where(is_last_BT, drawn.tokens_BC, 0).sum(axis=1)
    prefilled = dataclasses.replace(state.prefilled, cache=cache)
    state = dataclasses.replace(state, prefilled=prefilled)
    tally = known_BT[:, 1:].sum(), out_BT[:, 1:].sum(), active_B1.sum()
    after = _after(state, made, out_BT, last_B, now.tokens_BS, draft_cache, eos)
    return after, made, jnp.stack(tally).astype(jnp.int32)


def _join(first_B1: jax.Array, rest_Bk: jax.Array, rules: Rules) -> jax.Array:
    """Concatenates along the length; rows stay sharded over `batch`.

    The parts are resharded, because JAX 0.12 forgets the sharding of a slice that has one element:
    of one row and one guess.
    """
    rows = rules("batch", None)
    return jnp.concatenate([jax.sharding.reshard(x, rows) for x in (first_B1, rest_Bk)], axis=1)


def _drawn(
    model: Transformer,
    hidden_BTD: jax.Array,
    state: State,
    tokens_BT: jax.Array,
    static: dict[str, Any],
) -> Made:
    """Draws the token after each of `tokens`, all [B, T, ...]: the next in a text that has them."""
    rules = model.rules
    logits_BTV = jax.sharding.reshard(model.logits(hidden_BTD), rules("batch", None, None))
    each_1T = jnp.arange(tokens_BT.shape[1])[None]

    def draw(counts, x):
        i, logits_BV = x
        next_B = jnp.where(each_1T == i + 1, tokens_BT, 0).sum(axis=1)  # after the last: unused
        there = dataclasses.replace(state, made_B=state.made_B + i, counts=counts)
        drawn = steps.drawn_of(logits_BV, there, rules=rules, **static)
        return steps.counted(counts, next_B, ~state.done_B), drawn

    each = each_1T[0], jnp.moveaxis(logits_BTV, 1, 0)
    _, drawn = jax.lax.scan(draw, state.counts, each)
    return jax.tree.map(lambda x_TB: jnp.moveaxis(x_TB, 0, 1), drawn)


def _after(
    state: State,
    made: Made,
    out_BT: jax.Array,
    last_B: jax.Array,
    tokens_BS: jax.Array | None,
    draft: KVCache | None,
    eos: tuple[int, ...],
) -> Speculation:
    """The state with these tokens more, of which those that are out count."""
    made_B = state.made_B + out_BT.sum(axis=1)
    counts = state.counts
    for t in range(out_BT.shape[1]):
        token_B, out_B = made.tokens_BC[:, t], out_BT[:, t]
        counts = steps.counted(counts, token_B, out_B)
        if tokens_BS is not None:
            place_B1 = (state.length_B + state.made_B + t)[:, None]
            here_BS = (jnp.arange(tokens_BS.shape[1])[None] == place_B1) & out_B[:, None]
            tokens_BS = jnp.where(here_BS, token_B[:, None], tokens_BS)
    ended_B = (out_BT & steps.is_end(made.tokens_BC, eos)).any(axis=1)
    done_B = state.done_B | ended_B | (made_B >= state.packed.max_tokens_B)
    state = dataclasses.replace(state, made_B=made_B, done_B=done_B, counts=counts)
    return Speculation(state, last_B, tokens_BS, draft)


def find_draft(
    config: DecodeConfig, found: BundleInfo, rows: Sequence[Request]
) -> BundleInfo | None:
    """The draft bundle of the `decode` section, if it names one.

    UserError where it or the model, whose bundle is `found`, cannot speculate on these rows.
    """
    draft = load.find(config.draft, config.draft_step, config.dtype) if config.draft else None
    form = CacheConfig.of(config)
    for each in (found, draft):
        prefix = max((spec.prefix for spec in each.config.pattern), default=0) if each else 0
        if config.speculate and prefix > 1:
            raise Unsupported(
                f"decode.speculate={config.speculate} with kind='prefix' in {each.path}: "
                f"several tokens at once must hold the whole prefix of {prefix}; set speculate=0"
            )
    if draft is None:
        return None
    ours, theirs = (_vocabulary(each) for each in (found, draft))
    if ours != theirs:
        raise UserError(
            f"decode.draft={config.draft} has another vocabulary ({theirs}) than {found.path} "
            f"({ours}): its guesses would mean other tokens; name a draft of the same tokenizer"
        )
    form.apply(draft.config)
    longest = max(len(row.prompt.tokens) + row.how.max_tokens for row in rows)
    if longest > draft.config.context and not form.cache_window:
        raise UserError(
            f"decode.draft={config.draft} reads model.context={draft.config.context} tokens, but a "
            f"prompt with its max_tokens comes to {longest}: shorten them, or take another draft"
        )
    return draft


def _vocabulary(found: BundleInfo) -> str:
    if found.tokenizer is None:
        return f"{found.config.vocab_size} ids, no tokenizer"
    return f"{found.tokenizer.vocab_size} tokens, {found.tokenizer.fingerprint[:12]}"


class Speculator:
    """The decode loop of an engine with guesses; `tally` counts what became of them."""

    def __init__(self, engine: Engine, guesses: int, ngram: int, draft: PrefixCache | None = None):
        """`guesses` tokens a step; by a draft that reads the same prompts, else by n-grams."""
        self.engine, self.draft = engine, draft
        self.tally = np.zeros(3, np.int64)  # guesses, those that were right, steps of rows
        self.models = engine.decoder, draft.engine.decoder if draft else None
        how = dict(guesses=guesses, ngram=ngram, **engine.static)
        self._begin = jax.jit(functools.partial(begin, **engine.static), donate_argnums=(1, 2, 3))
        self._advance = jax.jit(functools.partial(advance, **how), donate_argnums=1)

    @classmethod
    def of(
        cls, config: DecodeConfig, reader: PrefixCache, draft: Transformer | None = None
    ) -> "Speculator":
        """Builds what the `decode` section asks for, for the prompts of `reader`."""
        engine, of_draft = reader.engine, None
        if draft is not None:
            small = Engine(draft, engine.plan, form=engine.form, programs=engine.programs)
            of_draft = PrefixCache(small, reader.prompts, reader.new, config.share_prefix)
        return cls(engine, config.speculate, config.ngram, of_draft)

    def read(self, part: slice) -> KVCache | None:
        """The draft's cache after these prompts, if there is a draft."""
        return self.draft.read(part.start, part.stop)[0].cache if self.draft else None

    def decode(
        self,
        state: State,
        stopped_B: np.ndarray,
        prompts: Sequence[np.ndarray],
        cache: KVCache | None,
    ) -> Iterator[Made]:
        """Decodes as `Engine.decode`, with -1 where a row has no token; `cache` is from `read`."""
        engine, tokens_BS = self.engine, None
        if cache is None:
            tokens_BS = np.full((engine.plan.batch, engine.plan.length), -1, np.int32)
            for row_S, prompt in zip(tokens_BS, prompts, strict=False):
                row_S[: len(prompt)] = prompt
            tokens_BS = engine.place(tokens_BS)
        args = engine.decoder, state, tokens_BS, cache
        now, made = engine.programs.run(("begin",), self._begin, *args)
        yield jax.device_get(made)
        for made, tally in ahead(self.advance, now, stopped_B):
            self.tally += tally
            yield made

    def advance(self, now: Speculation, stopped_B: np.ndarray) -> tuple[Speculation, tuple]:
        """One call of the loop, under way when this returns; `now` is used up."""
        args = self.models, now, self.engine.place(stopped_B.copy())
        now, *out = self.engine.programs.run(("guess",), self._advance, *args)
        return now, tuple(out)

    def summary(self) -> str:
        """Tells the share of right guesses, and the tokens that a row had of a step."""
        guesses, right, steps = self.tally.tolist()
        return (
            f"{right} of {guesses} guesses right ({right / max(guesses, 1):.0%}), "
            f"{1 + right / max(steps, 1):.2f} tokens a step"
        )
