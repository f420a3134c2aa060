"""Files of infer.decode: prompts as they come, and rows that are there whatever happens after."""

import io
import json
import os

import infer_cases as cases
import jax
import pytest
from conftest import make_mesh

from core.config import UserError
from core.sharding import MeshConfig
from data.tokenizer import load as tokenizers
from infer import decode, load, rows, text
from infer.config import DecodeConfig


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A workdir with a bundle of two layers and its tokenizer."""
    with jax.set_mesh(make_mesh((1, 1, 1))):
        workdir = tmp_path_factory.mktemp("bundle")
        cases.save(workdir, cases.model_config(num_layers=2))
    return workdir


@pytest.fixture(autouse=True)
def small_mesh(monkeypatch):
    monkeypatch.setattr(decode, "make_mesh", lambda _: make_mesh((1, 1, 1)))


def run(bundle, **fields):
    """The rows of `python -m infer.decode` with these fields."""
    fields = {"max_tokens": 12, "temperature": 0.0, **fields}
    return decode.main(cases.experiment(bundle, decode=DecodeConfig(**fields), mesh=MeshConfig()))


def test_rows_that_have_ended_are_in_the_file_when_the_run_is_cut_off(
    bundle, tmp_path, monkeypatch
):
    lines = [{"text": "a", "max_tokens": n, "min_tokens": n} for n in (2, 30, 3, 2)]
    prompts, output = cases.write_jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    output.write_text('{"of": "an earlier run"}\n')
    calls = []

    def update(self):
        calls.append(len(output.read_text().splitlines()))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(decode.StreamPrinter, "update", update)
    with pytest.raises(KeyboardInterrupt):
        run(bundle, prompts=prompts, output=str(output), batch_size=3)
    assert calls == [2, 2], "a row is there when it and all before it have ended"
    first, *rows = map(json.loads, output.read_text().splitlines())
    assert first == {"of": "an earlier run"}
    assert [len(row["tokens"]) for row in rows] == [2, 3]
    assert all(row["finish_reason"] and row["text"] for row in rows)


def test_a_reader_of_stdout_that_leaves_ends_no_run_that_writes_a_file(
    bundle, tmp_path, monkeypatch
):
    reader, writer = os.pipe()
    os.close(reader)
    output = tmp_path / "out.jsonl"
    with open(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        rows = run(bundle, prompt="the", output=str(output))
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"tokens": [1, true]}', "tokens must be a list of integers, and True is bool"),
        ('{"tokens": [1.0]}', "tokens must be a list of integers, and 1.0 is float"),
        ('{"tokens": [-1]}', "line 1: token -1 is not in the vocabulary of 290"),
        ('{"text": null}', 'line 1 must be {"text": ...} or {"tokens": [...]}'),
        ('{"text": "a", "n": NaN}', "line 1 is not JSON: NaN is no number there"),
        ('{"text": "\\ud800"}', "line 1: \\ud800 is half a character"),
        ('{"text": "a", "text": "b"}', "line 1: it names 'text' twice"),
        ("\n" + "[" * 100_000, "in.jsonl line 2 is nested more than 100 levels deep"),
        ('{"text": ' + "1" * 5000 + "}", "line 1: it holds a number of 5,000 digits"),
        ('{"text": "a", "logit_bias": {"' + "1" * 5000 + '": 1}}', "which is not the id of a tok"),
        ('{"text": "a\0"}', "line 1 is not JSON: Invalid control character"),
        (b'{"text": "\xff"}', "in.jsonl is not UTF-8"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_refused_lines(bundle, tmp_path, lines, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(UserError) as error:
        rows.read_rows(DecodeConfig(prompts=str(path)), load.find(bundle))
    assert message in str(error.value) and "decode.prompts=" in str(error.value)


def test_prompts_of_windows_and_of_a_locale_without_utf8(bundle, tmp_path, monkeypatch):
    tokenizer = tokenizers.load(bundle / "tokenizer")
    (tmp_path / "p.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    prompts = text.read(str(tmp_path / "p.JSONL"), "decode.prompts", tokenizer, 290)
    assert [(prompt.text, prompt.where[-6:]) for prompt in prompts] == [
        ("a", "line 1"),
        ("b", "line 3"),
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\u2603\n".encode()), "ascii"))
    (prompt,) = text.read("-", "decode.prompts", tokenizer, 290)
    assert prompt.text == "\u2603"
