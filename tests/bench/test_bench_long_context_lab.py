"""The tables and the picture of the lab, from figures that are made up."""

import json

import pytest

from bench import long_context_lab as lab

ROPES = "none", "pi", "yarn"


def rows(*ropes, base=90.0):
    return [
        {
            "rope": rope,
            "length": length,
            "accuracy": base - i,
            "by_depth": [base, 0.0],
            "asked": 64,
        }
        for rope in ropes
        for i, length in enumerate((1024, 2048))
    ]


@pytest.fixture
def models():
    names = [*lab.SHORT, *lab.KINDS, lab.EXTENDED]
    how = dict(steps=10, tokens=40960, train_seconds=90.0, loss=1.5)
    found = {name: {**how, "rows": rows("none", base=50 + i)} for i, name in enumerate(names)}
    for i, name in enumerate(lab.KINDS):
        found[name]["rows"] = rows("none", base=20 + i) + rows("yarn", base=60 + i)
    found["full"]["rows"] = rows(*ROPES)
    return found


def test_a_pause_in_training_does_not_count(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"train": {"steps": 30, "batch_size": 4, "length": 100}})
    )
    steps = [{"step": 10 * i, "tokens_per_second": v} for i, v in enumerate((50, 40, 1))]
    lines = [*steps, {"step": 30, "eval_loss": 1.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "recall.json").write_text(json.dumps({"rows": rows("none")}))
    found = lab.collect(tmp_path)
    assert found["tokens"] == 12000 and found["train_seconds"] == 12000 / 40
    assert found["loss"] == 1.25 and found["rows"] == rows("none")


def test_tables_have_a_line_for_each_kind_and_each_rope(models):
    text = lab.markdown(models)
    assert "| second layer | 1,024 | 2,048 |" in text
    assert "| full | 90.0 | 89.0 |" in text
    assert "| sliding | 21.0 | 20.0 |" in text and "| sliding | 61.0 | 60.0 |" in text
    assert "| yarn | 90.0 | 89.0 |" in text
    assert f"| {lab.TRAINED} | 57.0 | 56.0 |" in text
    assert "| short-nsa | 10 | 0.0 M | 1.5 | 1.500 |" in text
    assert "of 64 greedy\nanswers at 2 even depths" in text


def test_the_picture_is_drawn(models, tmp_path):
    lab.picture(models, tmp_path / "lab.png")
    assert (tmp_path / "lab.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "lab.png").read_bytes()) > 30_000
