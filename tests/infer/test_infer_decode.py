"""Decoding against a plain loop of whole forward passes; prompts, stops, streams and refusals."""

import dataclasses
import functools
import io
import json
from types import SimpleNamespace

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh
from tolerances import assert_close

from core import tree
from core.compile import hlo
from core.config import Unsupported, UserError
from core.sharding import MeshConfig
from data.tokenizer import load as tokenizers
from infer import decode, load, text
from infer.config import DecodeConfig
from infer.engine import Engine, Plan
from infer.sampling.params import Sampling, pack
from infer.text import Detokenizer

NEW = 13
PROMPTS = [np.random.default_rng(n).integers(0, 320, n).astype(np.int32) for n in (1, 5, 13, 23)]
TWO_LAYERS = cases.model_config(num_layers=2)  # one of each slot
PENALTIES = Sampling(top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2)
GREEDY = pack([Sampling(temperature=0, max_tokens=8)])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A workdir with a bundle and its tokenizer."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        workdir = tmp_path_factory.mktemp("bundle")
        cases.save(workdir)
    return workdir


@pytest.fixture(autouse=True)
def small_mesh(monkeypatch):
    """`main` would take all 8 simulated devices, which only costs time here."""
    monkeypatch.setattr(decode, "make_mesh", lambda _: make_mesh((1, 1, 1)))


@pytest.fixture(scope="module")
def tokenizer(bundle):
    return tokenizers.load(bundle / "tokenizer")


def run(bundle, model=None, **fields):
    """The rows of `python -m infer.decode` with these fields."""
    fields = {"max_tokens": 12, "temperature": 0.0, **fields}
    return decode.main(cases.experiment(bundle, model, decode=DecodeConfig(**fields)))


def generate(
    model, prompts, how, chunk=5, samples=(0, 1, 2, 3), batch=None, eos=(), vocab_size=320
):
    """(tokens, log-probabilities) of each row, until its end."""
    tokenizer = SimpleNamespace(eos=eos, vocab_size=vocab_size)
    plan = Plan.of(batch or len(prompts), max(map(len, prompts)), NEW, chunk)
    engine = Engine(model, plan, tokenizer)
    packed = pack([dataclasses.replace(how, max_tokens=NEW, seed=3)] * len(prompts))
    state = engine.start(engine.prefill(prompts), prompts, samples[: len(prompts)], packed)
    out = list(engine.decode(state, np.zeros(plan.batch, bool)))
    tokens_BC, logprobs_BC = (np.concatenate(x, axis=1) for x in list(zip(*out, strict=True))[:2])
    made = [row >= 0 for row in tokens_BC[: len(prompts)]]
    return [tokens_BC[b, m].tolist() for b, m in enumerate(made)], logprobs_BC


@pytest.mark.parametrize(
    ("chunk", "fields"),
    [(5, {}), (512, dict(attention_kernel="chunked"))],
    ids=["chunks", "one chunk"],
)
def test_greedy_is_argmax_of_the_full_forward(one_device, chunk, fields):
    config = cases.model_config(**fields)
    model = cases.random_model(config)
    tokens, logprobs_BC = generate(model, PROMPTS, Sampling(temperature=0), chunk, vocab_size=290)
    for b, prompt in enumerate(PROMPTS):
        assert tokens[b] == cases.greedy(model, prompt, NEW, 290)
        logits_TV = cases.full_logits(model, [*prompt, *tokens[b]])[len(prompt) - 1 : -1]
        expected_TV = jax.nn.log_softmax(logits_TV, axis=-1)
        expected_T = np.take_along_axis(np.asarray(expected_TV), np.c_[tokens[b]], axis=1)[:, 0]
        np.testing.assert_allclose(logprobs_BC[b, :NEW], expected_T, atol=2e-5)


def test_a_row_does_not_depend_on_its_batch(one_device):
    model = cases.random_model()
    together, _ = generate(model, PROMPTS, PENALTIES)
    turned, _ = generate(model, PROMPTS[::-1], PENALTIES, samples=(3, 2, 1, 0))
    assert turned[::-1] == together
    alone, _ = generate(model, PROMPTS[3:], PENALTIES, samples=(3,), batch=4)
    assert alone == together[3:]


def test_penalties_count_prompt_and_output(one_device):
    model = cases.random_model()
    how = Sampling(temperature=0, presence_penalty=2.0, repetition_penalty=1e6)
    # Of the 60 tokens there are, the prompt holds so many that chance would hit one.
    prompts = [*PROMPTS[:3], PROMPTS[3] % 40]
    (*_, tokens), _ = generate(model, prompts, how, vocab_size=60)
    # Positive logits of seen tokens become 0, negative ones vast: none can win again.
    assert len(set(tokens)) == NEW and not set(tokens) & set(prompts[3].tolist())


def test_rows_end_at_any_end_mark_and_the_others_go_on(one_device):
    model = cases.random_model()
    free, _ = generate(model, PROMPTS, Sampling())
    eos = free[2][3], free[1][5]
    ended, _ = generate(model, PROMPTS, Sampling(), eos=eos)
    for before, after in zip(free, ended, strict=True):
        ends = [at for at, token in enumerate(before, 1) if token in eos]
        assert after == before[: min(ends, default=NEW)]
    assert len(ended[2]) == 4 and len(ended[1]) == 6


@functools.cache
def of_mesh(sizes):
    """(tokens, log-probabilities) of three prompts on this mesh."""
    with jax.set_mesh(make_mesh(sizes)):
        return generate(cases.random_model(TWO_LAYERS), PROMPTS[1:], PENALTIES, batch=3)


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)], ids=str
)
def test_a_mesh_decodes_as_one_device(sizes):
    """Rows, length and heads sharded; a row that only fills the batch, chunks drawn out to 8."""
    tokens, logprobs_BC = of_mesh(sizes)
    expected, expected_BC = of_mesh((1, 1, 1))
    assert tokens == expected
    np.testing.assert_allclose(logprobs_BC[:3], expected_BC[:3], atol=1e-4)


def test_mesh_strategy_is_followed(bundle, monkeypatch):
    monkeypatch.setattr(decode, "make_mesh", lambda _: make_mesh((1, 2, 1)))
    with pytest.raises(Unsupported, match="mesh.strategy='local' needs whole rows"):
        config = DecodeConfig(max_tokens=8)
        decode.main(cases.experiment(bundle, decode=config, mesh=MeshConfig(strategy="local")))


def test_a_prompt_is_read_on_from_any_token():
    """As the bench does: 7 tokens, of shards 0 to 3 and 0 to 2, then the others."""
    with jax.set_mesh(make_mesh((1, 4, 1))):
        model = cases.random_model(TWO_LAYERS)
        engine = Engine(model, Plan.of(1, 23, 0, 8))
        now = engine.prefill([PROMPTS[3][:7]])
        now = engine.prefill(PROMPTS[3:], now, 7)
        logits_V = np.asarray(model.logits(now.last_BD[:, None]))[0, 0]
        assert_close(logits_V, cases.full_logits(model, PROMPTS[3])[-1], "model")


@functools.cache
def compiled(name, sizes, length):
    """A step of the engine, compiled for one text of this length and for chunks of 32."""
    with jax.set_mesh(make_mesh(sizes)):
        model = cases.random_model(TWO_LAYERS)
        engine = Engine(model, Plan.of(1, length, 0, 32))
        now = engine.prefill([])  # compiles nothing but the empty cache
        if name == "extend":
            args = now, next(engine.chunks(PROMPTS[1:2])), engine.place(np.zeros(1, np.int32))
        else:
            args = engine.start(now, PROMPTS[1:2], [0], GREEDY), engine.place(np.zeros(1, bool))
            model = engine.decoder
        return engine._jitted[name].lower(model, *args).compile()


STEPS = [("extend", (1, 4, 1)), ("advance", (1, 4, 1)), ("advance", (1, 2, 2))]


@pytest.mark.parametrize(("name", "sizes"), STEPS)
def test_a_device_holds_its_share_of_the_cache(name, sizes):
    """What a step has, and needs for a while, of 4096 more tokens."""
    short, long = (compiled(name, sizes, n).memory_analysis() for n in (4096, 8192))
    _, seq, model = sizes
    share = 4096 // seq * (2 * 2 * 8 // model + 1) * 4  # K and V of the full layer, positions
    assert long.argument_size_in_bytes - short.argument_size_in_bytes == share
    # Less than K or V: of a single query the scores of all keys are there at a time.
    assert long.temp_size_in_bytes - short.temp_size_in_bytes < share / 4


@pytest.mark.parametrize(("name", "sizes"), STEPS)
def test_what_crosses_the_mesh_does_not_grow_with_the_cache(name, sizes):
    short, long = (hlo.count(compiled(name, sizes, n).as_text(), scope="") for n in (4096, 8192))
    assert short.collectives == long.collectives
    assert "all-reduce" in {c.kind for c in short.collectives}


def test_output_rows(bundle, tmp_path, tokenizer, capsys):
    output = tmp_path / "folder" / "out.jsonl"
    prompts = cases.write_jsonl(
        tmp_path / "in.jsonl", [{"text": "the cat"}, {"tokens": [1, 20, 21]}, {"text": ""}]
    )
    rows = run(bundle, prompts=prompts, output=str(output), logprobs=True, batch_size=2)
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    assert [row["prompt"] for row in rows] == ["the cat", None, ""]
    assert rows[0]["prompt_tokens"] == [1, *tokenizer.encode("the cat").tolist()]
    assert rows[1]["prompt_tokens"] == [1, 20, 21] and rows[2]["prompt_tokens"] == [1]
    for row in rows:
        assert row["text"] == tokenizer.decode(row["tokens"])
        assert len(row["logprobs"]) == len(row["tokens"])
        ended = row["tokens"][-1] in tokenizer.eos
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert ended or len(row["tokens"]) == 12
        assert row["prefill_seconds"] > 0 and row["decode_seconds"] > 0
        assert row["tokens_per_second"] == len(row["tokens"]) / row["decode_seconds"]
    assert capsys.readouterr().out == "".join(row["text"] + "\n" for row in rows)
    assert list(output.parent.iterdir()) == [output]


def test_a_seed_gives_one_text_and_samples_differ(bundle, tokenizer):
    runs = [run(bundle, prompt="the", temperature=2.0, n=3, seed=seed) for seed in (4, 4, 5)]
    texts = [[row["text"] for row in rows] for rows in runs]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3
    assert "logprobs" not in runs[0][0]
    # The model has 320 rows of the vocabulary, of which 30 are padding.
    drawn = {token for rows in runs for row in rows for token in row["tokens"]}
    assert len(drawn) > 30 and max(drawn) < tokenizer.vocab_size == 290


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_text_and_stream(bundle, capsys, stream):
    free = run(bundle, prompt="the", max_tokens=40)[0]
    capsys.readouterr()
    stop = free["text"][7:10]
    row = run(bundle, prompt="the", max_tokens=40, stop=("never", stop), stream=stream)[0]
    assert row["text"] == free["text"][: free["text"].find(stop)]
    assert row["finish_reason"] == "stop" and len(row["tokens"]) < 40
    assert row["tokens"] == free["tokens"][: len(row["tokens"])]
    assert capsys.readouterr().out == row["text"] + "\n"


@pytest.mark.parametrize(
    ("content", "stop", "expected", "stopped"),
    [
        ("abcdef", ("cd",), "ab", True),
        ("abcabd", ("abd",), "abc", True),
        ("aaab", ("aab",), "a", True),
        ("the", ("the", "h"), "t", True),  # "h" is complete first, though "the" is one token
        ("abcde", ("cde", "bcde"), "a", True),  # both end here, and neither is shown
        ("one\u2603two\u20acthree", ("\u20act",), "one\u2603two", True),
        ("ends with part of a st", ("stop",), "ends with part of a st", False),
        ("half \u2603", ("\ufffd",), "half \u2603", False),
    ],
)
def test_stop_strings_across_tokens(tokenizer, content, stop, expected, stopped):
    pieces = tokenizer.encode(content).tolist()
    assert content != "the" or len(pieces) == 1
    # The byte tokens 5..260 cut characters, and stop strings, at every place.
    for tokens in (pieces, [5 + byte for byte in content.encode()]):
        writer, shown = Detokenizer(tokenizer, stop), ""
        for token in tokens:
            shown += writer.push(token)
            assert shown == writer.text and expected.startswith(shown)
        shown += writer.flush()
        assert (shown, writer.text, writer.stopped) == (expected, expected, stopped)


def test_text_is_shown_as_soon_as_no_stop_string_can_begin_with_it(tokenizer):
    writer = Detokenizer(tokenizer, ("cat!",))
    shown = [writer.push(5 + byte) for byte in b"a cab cat"]
    assert shown == ["a", " ", "", "", "cab", " ", "", "", ""]
    assert writer.flush() == "cat"


def test_a_bundle_without_a_tokenizer_speaks_ids(one_device, tmp_path, capsys):
    cases.save(tmp_path, with_tokenizer=False)
    prompts = cases.write_jsonl(tmp_path / "p.jsonl", [{"tokens": [5, 6, 7]}])
    (row,) = run(tmp_path, prompts=prompts)
    assert row["prompt"] is None and row["text"] is None and len(row["tokens"]) == 12
    assert row["prompt_tokens"] == [5, 6, 7]
    assert capsys.readouterr().out.split() == [str(token) for token in row["tokens"]]
    model, tokenizer, _, step = load.load(tmp_path)
    assert tokenizer is None and step == cases.STEP
    assert row["tokens"] == cases.greedy(model, [5, 6, 7], 12, 320)
    for fields in (dict(prompt="text"), dict(), dict(prompts=prompts, stop=("x",))):
        with pytest.raises(UserError, match="the bundle has no tokenizer"):
            run(tmp_path, **fields)


def test_prompts_from_a_text_file_and_from_stdin(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "p.txt").write_text("one\n\ntwo {\n")
    prompts = text.read(str(tmp_path / "p.txt"), "decode.prompts", tokenizer, 290)
    assert [prompt.text for prompt in prompts] == ["one", "", "two {"]
    for content, expected in (("a\nb", ["a", "b"]), ('{"text": "c\\nd"}\n', ["c\nd"])):
        monkeypatch.setattr("sys.stdin", io.StringIO(content))
        prompts = text.read("-", "decode.prompts", tokenizer, 290)
        assert [prompt.text for prompt in prompts] == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a"}\nnonsense', "in.jsonl line 2 is not JSON"),
        ('{"txt": "a"}', 'line 1 must be {"text": ...} or {"tokens": [...]}'),
        ('{"text": 3}', "line 1: text is int, not a string"),
        ('{"tokens": "3"}', "line 1: tokens must be a list of integers"),
        ('{"tokens": []}', "line 1: tokens is empty"),
        ('{"tokens": [3, 290]}', "line 1: token 290 is not in the vocabulary of 290"),
        ("", "in.jsonl is empty"),
    ],
)
def test_refused_rows(bundle, tmp_path, lines, message):
    (tmp_path / "in.jsonl").write_text(lines)
    with pytest.raises(UserError) as error:
        run(bundle, prompts=str(tmp_path / "in.jsonl"))
    assert message in str(error.value) and "decode.prompts=" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(n=2), "temperature=0 with n=2"),
        (dict(prompt="a", prompts="b.txt"), "prompt='a' with prompts='b.txt'"),
        (dict(stop=("a", "")), "stop=('a', '') holds an empty string"),
        (dict(max_tokens=0), "max_tokens=0 is out of range"),
        (dict(prompts="nowhere.txt"), "decode.prompts=nowhere.txt: there is no such file"),
        (dict(prompts="config.json"), "decode.prompts=config.json: only .txt and .jsonl"),
        (dict(step=3), "step=3 is not in"),
        (dict(checkpoint="nowhere"), "nowhere is no bundle"),
        (dict(max_tokens=64), "has 1 tokens, and with max_tokens=64 that is more than"
         " model.context=64: set it to 63 or less"),
        (dict(prompt="xyzw " * 80), "model.context=64: shorten the prompt, or train"),
        (dict(output="."), "decode.output=. is a folder: name a file"),
        (dict(output="config.json"), "decode.output=config.json is the file of decode.checkpoint="),
    ],
)  # fmt: skip
def test_refused_settings(bundle, monkeypatch, fields, message):
    monkeypatch.setattr(load, "restore", None)  # refused before any work is done
    monkeypatch.chdir(bundle)
    with pytest.raises(UserError) as error:
        run(bundle, **fields)
    assert message in str(error.value)


def test_decoding_copies_no_cache(one_device):
    # Slots of a single layer: XLA unrolls their scans, and then would copy the whole cache.
    model = cases.random_model(TWO_LAYERS)
    engine = Engine(model, Plan(1, 20_000, 16))
    now = engine.prefill(PROMPTS[:1])
    size = tree.num_bytes(now.cache)
    engine.advance(engine.start(now, PROMPTS[:1], [0], GREEDY), np.zeros(1, bool))
    assert engine.temporary_bytes() < size / 4


def test_weights_in_the_compute_dtype_compute_the_same(one_device):
    config = cases.model_config(dtype="bfloat16")
    model = cases.random_model(config)
    cast = load.in_compute_dtype(model, config)
    assert cast.embedding_VD[...].dtype == "bfloat16"
    assert cast.final_norm.scale_D[...].dtype == "float32"
    tokens = PROMPTS[3]
    logits_TV, cast_TV = (cases.full_logits(m, tokens) for m in (model, cast))
    np.testing.assert_array_equal(logits_TV, cast_TV)
