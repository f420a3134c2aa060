"""Quality of a model through the cache, against slow and obvious restatements."""

import dataclasses

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from core.config import UserError
from evals import bench
from evals.config import BenchConfig
from evals.report import cases as variants
from evals.report import predict, rows, sweep
from evals.report.measuring import measure, peaks, quality, quality_steps
from evals.report.measuring.measure import Measured
from evals.report.measuring.quality import Material
from evals.ruler import tasks
from infer import load
from infer.engine import Engine, Plan
from model.attention.spec import full, sliding
from model.ops.rope import Rope

CONFIG = BenchConfig(tasks=("all",), task_samples=3, depths=(0.0, 1.0))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("bundle")
    with jax.set_mesh(make_mesh((1, 1, 1))):
        cases.save(workdir)
    return workdir


def material(tokenizer):
    tokens = np.random.default_rng(3).integers(0, 290, 400, np.int32)
    starts = np.array([0, 30, 170, 300])
    return Material(tokenizer, tokens, starts, "noise", (), None, None)


def test_loss_by_position_is_that_of_the_full_forward(one_device):
    """Buckets 1-63 and 64-99 of rows of 100 tokens, in chunks of 16 with a window of 6.

    The first text reaches into the second document, whose first token does not count.
    """
    model = cases.random_model(cases.model_config(context=128))
    engine = Engine(model, Plan(2, 100, 16))
    texts = quality.spans(material(None), 3, 100)
    assert [text.tokens[0] for text in texts] == [material(None).tokens[s] for s in (0, 30, 300)]
    found = quality.by_position(quality.scores(engine), texts)
    losses = np.stack(
        [
            [-row[token] for row, token in zip(logits, text.tokens[1:], strict=False)]
            for text in texts
            for logits in [np.asarray(jax.nn.log_softmax(cases.full_logits(model, text.tokens)))]
        ]
    )
    assert [(b["first"], b["last"], b["tokens"]) for b in found] == [(1, 63, 188), (64, 99, 108)]
    losses[0, 29] = np.nan
    assert found[0]["loss"] == pytest.approx(np.nanmean(losses[:, :63]), abs=1e-4)
    assert found[1]["loss"] == pytest.approx(losses[:, 63:].mean(), abs=1e-4)
    assert abs(found[0]["loss"] - found[1]["loss"]) > 1e-3


def test_buckets_double():
    score = lambda rows: [-np.arange(1.0, len(row)) for row in rows]  # noqa: E731
    text = lambda size: quality.Span(np.zeros(size), np.zeros(size, bool))  # noqa: E731
    found = quality.by_position(score, [text(301)])
    edges = [(b["first"], b["last"]) for b in found]
    assert edges == [(1, 63), (64, 127), (128, 255), (256, 300)]
    assert [b["loss"] for b in found] == [32.0, 95.5, 191.5, 278.0]
    assert quality.by_position(score, [text(2)])[0]["last"] == 1


def test_spans_start_where_documents_do():
    of = material(None)
    for length, count in ((101, 3), (371, 1), (400, 1), (401, 0)):
        found = quality.spans(of, 9, length)
        assert len(found) == count and all(len(text.tokens) == length for text in found)
    assert len(quality.spans(of, 2, 50)) == 2


def oracle(given):
    """A model that has read everything."""
    return [" and ".join(sample.references) for sample in given]


@pytest.mark.parametrize("kind", [k for k in (*tasks.KINDS, "needle", "passkey") if "qa" not in k])
def test_who_solves_a_task_has_100_and_who_does_not_has_0(kind):
    of = material(Bytes())
    solved = quality.task(kind, 6000, of, CONFIG, oracle)
    assert solved["score"] == 100 and solved["samples"] == (6 if kind in quality.BY_DEPTH else 3)
    assert quality.task(kind, 6000, of, CONFIG, lambda given: [""] * len(given))["score"] == 0
    if kind in quality.BY_DEPTH:
        shallow = quality.task(
            kind, 6000, of, CONFIG,
            lambda given: [s.references[0] if s.depths[0] < 0.5 else "?" for s in given],
        )  # fmt: skip
        cells = {cell["depth"]: cell["score"] for cell in shallow["depths"]}
        assert cells == {0.0: 100, 1.0: 0} and shallow["score"] == 50


def test_questions_need_a_file(tmp_path):
    path = cases.write_jsonl(tmp_path / "q.json", [])
    rows = '[{"question": "who?", "answers": ["Ada", "Bo"], "context": "It was Bo."}]'
    (tmp_path / "q.json").write_text(rows)
    experiment = cases.experiment(tmp_path)

    def read(**fields):
        config = BenchConfig(tasks=("qa_1",), **fields)
        return quality.read(dataclasses.replace(experiment, bench=config), Bytes(), 320)

    with pytest.raises(UserError, match="task_samples=10, but .* has 1 questions"):
        read(questions=path)
    of = read(questions=path, task_samples=1)
    config = BenchConfig(tasks=("qa_1",), task_samples=1)
    answer = lambda given: ["Bo, I think"]  # noqa: E731 -- one of the answers will do
    assert quality.task("qa_1", 1000, of, config, answer) == {"score": 100.0, "samples": 1}
    everything = quality.chosen(BenchConfig(tasks=("ruler",), questions=path))
    assert everything == tasks.KINDS and len(everything) == 13
    assert len(quality.chosen(BenchConfig(tasks=("all", "vt")))) == 13  # 11 of RULER's, and two


def test_a_context_too_short_for_a_task_is_skipped_with_the_reason():
    found = quality.task("cwe", 100, material(Bytes()), CONFIG, oracle)
    assert "cwe does not fit in length=100" in found["skipped"] and "score" not in found


def test_answers_are_greedy_continuations(one_device, bundle):
    """Three prompts of different lengths and limits, two at a time."""
    found = load.find(bundle)
    model = cases.random_model()
    engine = Engine(model, Plan(2, 64, 16), found.tokenizer)
    texts, limits = ("the cat sat", "a", "on the mat the"), (9, 12, 3)
    given = [sample(*pair) for pair in zip(texts, limits, strict=True)]
    answers = quality.answers(engine, found.tokenizer)(given)
    for text, limit, answer in zip(texts, limits, answers, strict=True):
        prompt = [found.tokenizer.bos, *found.tokenizer.encode(text)]
        tokens = cases.greedy(model, prompt, limit, found.tokenizer.vocab_size)
        ends = [i for i, token in enumerate(tokens) if token in found.tokenizer.eos]
        assert answer == found.tokenizer.decode(tokens[: ends[0] if ends else limit])


def sample(text, limit):
    return tasks.Sample("x", text, "", ("y",), (0.0,), 0, limit, "")


def test_effective_length_is_by_rulers_rule():
    def row(context, mean, kinds=13):
        return dict(context=context, quality={"ruler": mean, "ruler_kinds": kinds})

    found = quality.effective([row(4096, 90.0), row(8192, 85.7), row(16384, 85.6)])
    assert found["length"] == 8192 and found["kinds"] == 13
    assert found["average"] == pytest.approx((90 + 85.7 + 85.6) / 3)
    assert quality.effective([row(1024, 99.0, kinds=9), row(4096, 10.0)])["length"] is None
    assert quality.effective([dict(context=8, quality={})]) == {}


def test_the_mean_is_of_rulers_kinds_alone():
    scores = {"vt": 40.0, "fwe": 60.0, "passkey": 90.0}
    found = {kind: dict(score=score, depths=[]) for kind, score in scores.items()}
    found |= {"cwe": {"skipped": "too short"}}
    summary = quality.summary(found)
    assert summary["ruler"] == 50 and summary["ruler_kinds"] == 2 and summary["tasks"] == scores
    assert summary["skipped"] == {"cwe": "too short"} and "loss" not in summary


@pytest.mark.slow
def test_the_report_tells_quality_of_the_model_as_it_is(bundle, tmp_path, monkeypatch):
    """Through the command: the loss on a text, a task, a context that is too short for it."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 60)
    monkeypatch.setattr(bench, "make_mesh", lambda _: make_mesh((1, 1, 1)))
    monkeypatch.setattr(peaks, "SECONDS", 1e-3)
    fast = Measured(1.0, [(16, 1.0)], 1.1, 0.1, [0.1], 8, 8, 8, None, 0.0)
    monkeypatch.setattr(measure, "measure", lambda *_: fast)
    config = BenchConfig(
        contexts=(32, 500), beyond=True, text=(str(text),), loss_rows=2, tasks=("passkey",),
        task_samples=1, depths=(0.0, 0.5, 1.0), output=str(tmp_path / "out"),
    )  # fmt: skip
    report = bench.main(cases.experiment(bundle, bench=config))
    short, long, *others = report["rows"]
    assert [row["quality"] for row in others] == [{}, {}], "the model was not trained with those"
    assert "passkey does not fit in length=32" in short["quality"]["skipped"]["passkey"]
    assert long["quality"]["tasks"] == {"passkey": 0.0} and len(long["quality"]["passkey"]) == 3
    with jax.set_mesh(make_mesh((1, 1, 1))):
        tokenizer = load.find(bundle).tokenizer
        tokens = [tokenizer.bos, *tokenizer.encode(text.read_text())][:500]
        model = cases.random_model(cases.model_config(context=512))
        logprobs = jax.nn.log_softmax(cases.full_logits(model, tokens))
        loss = -np.mean([logprobs[i, token] for i, token in enumerate(tokens[1:])])
    assert long["quality"]["loss"] == pytest.approx(loss, abs=1e-4)
    assert "loss" not in short["quality"], "the longest row tells of all positions"
    page = (tmp_path / "out/report.md").read_text()
    assert f"Loss in nats by position, on {text}" in page and "passkey" in page
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"quality.png", "needle.png"} <= names and "rows.jsonl" not in names


def test_the_loss_is_of_the_longest_row_that_has_text(one_device):
    def lengths(pattern):
        model = cases.random_model(cases.model_config(context=512, pattern=pattern))
        config = BenchConfig(contexts=(64, 128, 256, 512), loss_rows=2)
        planned = sweep.plan(variants.of(model), config, None)
        texts = material(None)  # of 400 tokens
        found = quality_steps.steps(planned, texts, config, peaks.Peaks(1e9, 1e10), None)
        return [row.context for row, what, _ in found if what == "loss"]

    assert lengths((sliding(6), full())) == [256]
    dynamic = Rope(scaling="dynamic", factor=2.0, original=64)
    assert lengths((full(rope=dynamic),)) == [64, 128, 256]


def test_steps_are_planned_on_any_mesh():
    with jax.set_mesh(make_mesh((8, 1, 1))):
        config = BenchConfig(contexts=(64,), loss_rows=2)
        planned = sweep.plan(variants.of(cases.random_model()), config, None)
        found = quality_steps.steps(planned, material(None), config, peaks.Peaks(1e9, 1e10), None)
        assert [what for _, what, _ in found] == ["loss"] and found[0][2].step.seconds > 1


def test_batches_are_as_large_as_fit(one_device):
    (case, _) = variants.of(cases.random_model())
    config = BenchConfig(contexts=(48,), prefill_chunk=16)
    row = rows.plan(case, 48, config, None)
    needs = {n: predict.memory(case, Plan.of(n, 48, 0, 16)).total for n in (1, 2, 4, 8)}
    for size, need in needs.items():
        assert quality_steps.plan(row, config, need).batch == size
        assert quality_steps.plan(row, config, need - 1).batch == max(1, size // 2)
    assert quality_steps.plan(row, config, None).batch == 8


class Bytes:
    """A tokenizer of characters, in which every task fits."""

    bos, eos, vocab_size = None, (), 256

    def encode(self, text, special=False):
        return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)

    def encode_batch(self, texts, special=False):
        return [self.encode(text) for text in texts]
