"""Rows with settings of their own: in one batch, from a file, and refused."""

import dataclasses
import json
from types import SimpleNamespace

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from core.config import UserError
from data.tokenizer import load as tokenizers
from infer import decode, load, rows
from infer.config import DecodeConfig
from infer.engine import Engine, Plan
from infer.sampling.params import Sampling, pack
from model.attention.spec import full
from model.ops.rope import Rope

V, EOS = 320, (4, 9, 17)
LENGTHS = 1, 5, 13, 23, 8, 8
PROMPTS = [np.random.default_rng(n).integers(0, V, n).astype(np.int32) for n in LENGTHS]
TWO_LAYERS = cases.model_config(num_layers=2)
HOWS = [
    Sampling(temperature=0, max_tokens=13),
    Sampling(top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, seed=5, max_tokens=9),
    Sampling(temperature=0.8, top_k=40, min_p=0.01, min_tokens=12, max_tokens=17),
    Sampling(typical_p=0.9, logit_bias=((5, 3.0),), banned_tokens=(6, 7), seed=1, max_tokens=11),
    Sampling(seed=8, max_tokens=10),
    Sampling(seed=8, temperature=1.9, allowed_tokens=tuple(range(0, V, 3)), max_tokens=10),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A workdir with a bundle and its tokenizer."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        workdir = tmp_path_factory.mktemp("bundle")
        cases.save(workdir, TWO_LAYERS)
    return workdir


@pytest.fixture(autouse=True)
def small_mesh(monkeypatch):
    monkeypatch.setattr(decode, "make_mesh", lambda _: make_mesh((1, 1, 1)))


def run(bundle, **fields):
    """The rows of `python -m infer.decode` with these fields."""
    fields = {"max_tokens": 6, **fields}
    return decode.main(cases.experiment(bundle, decode=DecodeConfig(**fields)))


def generate(model, which, packed=None, hows=HOWS, eos=EOS):
    """For these of PROMPTS, each under its own settings: tokens and log-probabilities [C], of the
    two likeliest too [C, 2].

    The shapes are those of all: a row that computes the same may round differently in another.
    """
    plan = Plan.of(len(hows), max(LENGTHS), 17, 8)
    engine = Engine(model, plan, SimpleNamespace(eos=eos, vocab_size=V), top_logprobs=2)
    prompts, hows = [PROMPTS[b] for b in which], [hows[b] for b in which]
    packed = pack(hows) if packed is None else packed.rows(np.array(which))
    now = engine.prefill(prompts, new=[how.max_tokens for how in hows])
    state = engine.start(now, prompts, [0] * len(prompts), packed)
    parts = list(engine.decode(state, np.zeros(plan.batch, bool)))
    fields = [np.concatenate(field, axis=1) for field in zip(*parts, strict=True)]
    ended = [int((row_C >= 0).sum()) for row_C in fields[0]]
    return [[field[b, : ended[b]].tolist() for field in fields] for b in range(len(which))]


@pytest.mark.slow
def test_a_row_is_the_same_bit_for_bit_whatever_else_is_in_its_batch(one_device):
    model = cases.random_model(TWO_LAYERS)
    together = generate(model, range(6))
    for (tokens, *_), how in zip(together, HOWS, strict=True):
        assert len(tokens) == how.max_tokens or tokens[-1] in EOS
        assert not set(tokens) & set(how.banned_tokens)
        assert not how.allowed_tokens or set(tokens) <= set(how.allowed_tokens)
    assert generate(model, range(6)[::-1])[::-1] == together
    for b in (0, 2, 5):  # alone, in a program that has its stages only
        assert generate(model, [b]) == together[b : b + 1]
    assert generate(model, [3, 1], pack(HOWS)) == [together[3], together[1]]


@pytest.mark.slow
def test_a_mesh_decodes_as_one_device():
    made = {}
    for sizes in ((1, 1, 1), (2, 2, 2)):
        with jax.set_mesh(make_mesh(sizes)):
            made[sizes] = generate(cases.random_model(TWO_LAYERS), range(5))
    for one, many in zip(*made.values(), strict=True):
        assert one[0] == many[0] and one[2] == many[2]
        np.testing.assert_allclose(one[1], many[1], atol=1e-4)
        np.testing.assert_allclose(one[3], many[3], atol=1e-4)


def test_frequencies_that_depend_on_a_row_do_not_depend_on_the_others(one_device):
    """RoPE that stretches with the text: a row's own max_tokens says how long it may become."""
    rope = Rope(scaling="dynamic", original=10, factor=4.0)
    model = cases.random_model(dataclasses.replace(TWO_LAYERS, pattern=(full(rope=rope),)))
    assert generate(model, [4])[0] == generate(model, range(6))[4]


def test_min_tokens_keep_end_tokens_away_until_then(one_device):
    model = cases.random_model(TWO_LAYERS)
    likely = dict(logit_bias=tuple((token, 100.0) for token in EOS), max_tokens=13)
    hows = [Sampling(min_tokens=least, seed=least, **likely) for least in range(6)]
    out = generate(model, range(6), hows=hows)
    for (tokens, *_), least in zip(out, range(6), strict=True):
        assert len(tokens) == least + 1 and tokens[-1] in EOS
        assert not set(tokens[:-1]) & set(EOS)


def test_lines_of_a_file_override_the_section(bundle, tmp_path):
    lines = [
        {"text": "the cat", "max_tokens": 3},
        {"text": "the cat", "temperature": 0, "logit_bias": {"70": 100, "71": -100}},
        {"tokens": [1, 20, 21], "seed": 7, "n": 2, "min_tokens": 4},
        {"text": "the cat", "seed": 7, "stop": ["e"], "banned_tokens": [*range(5, 100)]},
    ]
    path = cases.write_jsonl(tmp_path / "in.jsonl", lines)
    output = tmp_path / "out.jsonl"
    out = run(bundle, prompts=path, output=str(output), seed=3, temperature=1.5, batch_size=3)
    assert [json.loads(line) for line in output.read_text().splitlines()] == out
    assert len(out) == 5 and len(out[0]["tokens"]) <= 3
    assert out[1]["tokens"] == [70] * 6
    assert (
        out[2]["prompt_tokens"] == out[3]["prompt_tokens"] and out[2]["tokens"] != out[3]["tokens"]
    )
    assert len(out[2]["tokens"]) >= 4 and len(out[3]["tokens"]) >= 4
    assert "e" not in out[4]["text"] and not set(out[4]["tokens"]) & set(range(5, 100))
    # As the section would have it, for this prompt alone: a seed is a text.
    section = dict(seed=7, temperature=1.5, n=2, min_tokens=4)
    path = cases.write_jsonl(tmp_path / "in.jsonl", [{"tokens": [1, 20, 21]}])
    again = run(bundle, prompts=path, **section)
    assert [row["tokens"] for row in again] == [row["tokens"] for row in out[2:4]]


def test_a_line_draws_by_its_own_seed(bundle, tmp_path):
    lines = [{"text": "the", "seed": seed} for seed in (7, 8, 7, 2**32 - 1)]
    path = cases.write_jsonl(tmp_path / "in.jsonl", lines)
    first, second, third, last = (row["tokens"] for row in run(bundle, prompts=path))
    assert first == third and len({tuple(first), tuple(second), tuple(last)}) == 3


def test_every_setting_of_a_line_counts(bundle, tmp_path):
    line = dict(
        temperature=0.3, top_k=2, top_p=0.3, min_p=0.5, typical_p=0.6, frequency_penalty=2.0,
        presence_penalty=1.0, repetition_penalty=5.0, logit_bias={"7": 1.5}, allowed_tokens=[7, 8],
        banned_tokens=[8], min_tokens=2, max_tokens=9, stop=["x"], seed=4, n=3,
    )  # fmt: skip
    assert set(line) == {field.name for field in dataclasses.fields(Sampling)}
    harmless = {"text": "b", "stop": "x", "seed": None, "max_tokens": 4.0}
    path = cases.write_jsonl(
        tmp_path / "in.jsonl", [{"text": "a", **line}, harmless, {"text": "a"}]
    )
    found = load.find(bundle)
    *own, other, plain = rows.read_rows(DecodeConfig(prompts=path, max_tokens=5), found)
    expected = Sampling(**{**line, "logit_bias": ((7, 1.5),)})
    assert [row.sample for row in own] == [0, 1, 2] and {row.how for row in own} == {expected}
    assert plain.how == Sampling(max_tokens=5) and other.how == Sampling(max_tokens=4, stop=("x",))
    assert all(x is not None for x in pack([expected]))
    fields = {**line, "logit_bias": ((7, 1.5),)}
    (section, *_) = rows.read_rows(DecodeConfig(prompt="a", **fields), found)
    assert section.how == expected


@pytest.mark.slow
def test_logprobs_are_those_of_the_model_whatever_the_settings(bundle, tmp_path):
    given = [{"text": "the cat sat"}, {"tokens": [1, 40, 2, 40]}, {"tokens": [40]}]
    path = cases.write_jsonl(tmp_path / "in.jsonl", given)
    settings = dict(temperature=2.0, presence_penalty=2.0, banned_tokens=(30,), prefill_chunk=16)
    asked = dict(logprobs=True, top_logprobs=5, prompt_logprobs=True)
    out = run(bundle, prompts=path, **settings, **asked)
    plain = run(bundle, prompts=path, **settings)
    with jax.set_mesh(make_mesh((1, 1, 1))):
        model, tokenizer, _, _ = load.load(bundle)
        for row, other in zip(out, plain, strict=True):
            assert row["tokens"] == other["tokens"]
            assert not set(other) & set(asked)
            tokens, start = row["prompt_tokens"] + row["tokens"], len(row["prompt_tokens"])
            logprobs_TV = np.asarray(jax.nn.log_softmax(cases.full_logits(model, tokens), axis=-1))
            of_tokens = [float(logprobs_TV[t, v]) for t, v in enumerate(tokens[1:])]
            assert row["prompt_logprobs"][0] is None
            np.testing.assert_allclose(
                row["prompt_logprobs"][1:], of_tokens[: start - 1], atol=1e-4
            )
            np.testing.assert_allclose(row["logprobs"], of_tokens[start - 1 :], atol=1e-4)
            assert len(row["top_logprobs"]) == len(row["tokens"])
            for t, pairs in enumerate(row["top_logprobs"], start - 1):
                best = np.argsort(-logprobs_TV[t, : tokenizer.vocab_size])[:5]
                assert [token for token, _ in pairs] == best.tolist()
                np.testing.assert_allclose([x for _, x in pairs], logprobs_TV[t, best], atol=1e-4)


LINES = [
    ({"top_kk": 3}, "top_kk is not a field; did you mean top_k?"),
    ({"nonsense": 3}, "nonsense is not a field; the fields are allowed_tokens, banned_tokens,"),
    ({"temperature": "hot"}, "temperature='hot' is str, but it must be float"),
    ({"top_p": 1.5}, "top_p=1.5 is out of range: it must be > 0 and <= 1"),
    ({"temperature": 0, "n": 2}, "temperature=0 with n=2: greedy samples are all the same"),
    ({"stop": 3}, "stop=3 is int, but it must be tuple"),
    ({"logit_bias": {"x": 1}}, "logit_bias names 'x', which is not the id of a token"),
    ({"logit_bias": {"290": 1}}, "token 290, which is not in the vocabulary of 290"),
    ({"allowed_tokens": [3, 300]}, "allowed_tokens names token 300, which is not in"),
    ({"banned_tokens": [999]}, "banned_tokens names token 999, which is not in"),
    ({"allowed_tokens": [5], "banned_tokens": [5]}, "leave no token to draw"),
    ({"banned_tokens": [*range(290)]}, "leave no token to draw"),
    ({"allowed_tokens": [EOS_ID := 2], "min_tokens": 1}, "min_tokens=1 (which keeps end tokens"),
    ({"min_tokens": 7}, "min_tokens=7 is more than max_tokens=6"),
    ({"max_tokens": 63}, "has 2 tokens, and with max_tokens=63 that is more than model.context=64: "
     "set it to 62 or less, or train for a longer context (configs/finetune.py"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), LINES, ids=[m[:30] for _, m in LINES])
def test_a_mistake_in_a_line_is_refused_with_its_place(
    bundle, tmp_path, monkeypatch, line, message
):
    monkeypatch.setattr(load, "restore", None)  # refused before any work is done
    assert tokenizers.load(bundle / "tokenizer").eos == (EOS_ID,)
    given = [{"text": "a"}, {"tokens": [1, 5], **line}]
    path = cases.write_jsonl(tmp_path / "in.jsonl", given)
    with pytest.raises(UserError) as error:
        run(bundle, prompts=path)
    assert str(error.value).startswith(f"decode.prompts={path} line 2")
    assert message in str(error.value)


def test_top_logprobs_beyond_the_vocabulary_are_refused(bundle):
    with pytest.raises(UserError, match="top_logprobs=291 is more than the 290 tokens"):
        run(bundle, top_logprobs=291)
