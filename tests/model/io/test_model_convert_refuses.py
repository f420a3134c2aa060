"""Checkpoints that cannot be taken: one message that names the file and tensor, and exit with 2."""

import json
import subprocess
import sys

import hf_cases as cases
import numpy as np
import pytest
import tokenizer_cases
from safetensors.numpy import save_file

from core.command import cli
from model import convert

WEIGHTS, NORM = "model.safetensors", "model.norm.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
SHARD = "model-00002-of-00003.safetensors"


def refused(capsys, *arguments) -> str:
    """The one message with which the command ends."""
    with pytest.raises(SystemExit) as exit, cli.exits():
        convert.main([str(argument) for argument in arguments])
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("error: ")


def change(values, **changes):
    """The tensors with some changed, or taken away (None)."""
    names = {"q": Q, "norm": NORM}
    values = {**values, **{names.get(name, name): x for name, x in changes.items()}}
    return {name: x for name, x in values.items() if x is not None}


def edit(path, **changes):
    """Changes fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_header(path, name, **changes):
    """Changes a tensor's row in the header, which keeps its length."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    table[name] |= changes
    text = json.dumps(table, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(raw[:8] + text.ljust(length) + raw[8 + length :])


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:-num_bytes])


def last_tensor(path) -> str:
    """The name of the tensor at the end of a file."""
    raw = path.read_bytes()
    table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    table.pop("__metadata__", None)
    return max(table, key=lambda name: table[name]["data_offsets"])


def index_without(hf, name, **more):
    weight_map = json.loads((hf / cases.INDEX).read_text())["weight_map"]
    weight_map = {n: file for n, file in weight_map.items() if n != name}
    edit(hf / cases.INDEX, weight_map={**weight_map, **more})


def many_missing(hf):
    values = {name: x for name, x in cases.tensors().items() if "mlp" not in name}
    save_file(values, hf / WEIGHTS)


def resave(**changes):
    return lambda hf: save_file(change(cases.tensors(), **changes), hf / WEIGHTS)


MATRIX = np.ones((4, 4), np.float32)
BAD = {  # what is done to a good directory of one file, and what the message says
    "missing": (resave(q=None), f"hf does not fit its config.json: it lacks {Q}"),
    "many missing": (many_missing, "up_proj.weight, ... (9 in all)"),
    "extra": (
        resave(**{"model.layers.3.mlp.bias": MATRIX}),
        "it has model.layers.3.mlp.bias, not of this model",
    ),
    "both": (resave(q=None, new=MATRIX), f"it lacks {Q}; it has new, not of this model"),
    "shape": (resave(q=MATRIX), f"hf does not fit its config.json: {Q} is (4, 4), not (32, 16)"),
    "dtype": (
        resave(norm=np.ones(16, np.float64)),
        f"hf: {NORM} is F64; supported are F32, F16, BF16",
    ),
    "integers": (resave(norm=np.ones(16, np.int8)), f"{NORM} is I8; supported are"),
    "longer": (
        lambda hf: (hf / WEIGHTS).write_bytes((hf / WEIGHTS).read_bytes() + b"123"),
        "but its header tells of",
    ),
    "header cut": (
        lambda hf: (hf / WEIGHTS).write_bytes((hf / WEIGHTS).read_bytes()[:100]),
        f"hf/{WEIGHTS} of 100 bytes ends within its header",
    ),
    "empty": (lambda hf: (hf / WEIGHTS).write_bytes(b""), "of 0 bytes ends within its header"),
    "not JSON": (
        lambda hf: (hf / WEIGHTS).write_bytes((4).to_bytes(8, "little") + b"{{{{"),
        f"hf/{WEIGHTS} has a header that cannot be read",
    ),
    "offsets": (
        lambda hf: edit_header(hf / WEIGHTS, NORM, shape=[8]),
        f"hf/{WEIGHTS}: {NORM} of BF16 (8,) cannot be bytes",
    ),
    "pickle": (
        lambda hf: (hf / WEIGHTS).rename(hf / "pytorch_model.bin"),
        "hf holds its weights in pytorch_model.bin, a PyTorch pickle: opening one runs whatever "
        "code its author put in. Take the safetensors files",
    ),
    "no index": (
        lambda hf: (hf / WEIGHTS).rename(hf / SHARD),
        f"hf has {SHARD}, but neither {WEIGHTS} nor {cases.INDEX}",
    ),
    "no weights": (lambda hf: (hf / WEIGHTS).unlink(), "hf has no weights: neither"),
    "no config": (lambda hf: (hf / "config.json").unlink(), "hf has no config.json"),
    "config not JSON": (
        lambda hf: (hf / "config.json").write_text("{"),
        "hf/config.json is damaged",
    ),
    "no heads": (
        lambda hf: edit(hf / "config.json", num_attention_heads=0),
        "model_type='llama' is damaged: num_attention_heads=0 must be a whole number",
    ),
    "family": (lambda hf: edit(hf / "config.json", model_type="mamba"), "llama"),
    "two kinds": (
        lambda hf: (hf / cases.INDEX).write_text("{}"),
        f"hf has both {WEIGHTS} and {cases.INDEX}",
    ),
}
BAD_SHARDS = {  # the same for three files and their index
    "shard lost": (
        lambda hf: (hf / SHARD).unlink(),
        f"hf/{cases.INDEX} names {SHARD}, not there; get them again",
    ),
    "outside": (
        lambda hf: index_without(hf, NORM, **{NORM: "../other.safetensors"}),
        f"hf/{cases.INDEX} names '../other.safetensors', which is not in its directory",
    ),
    "not in its shard": (
        lambda hf: index_without(hf, NORM, **{NORM: "model-00001-of-00003.safetensors"}),
        f"names tensors that are not there: {NORM} (in model-00001-of-00003.safetensors)",
    ),
    "not in the index": (
        lambda hf: index_without(hf, NORM),
        f"does not name tensors that are there: {NORM} (in model-00002-of-00003.safetensors)",
    ),
    "no weight_map": (
        lambda hf: edit(hf / cases.INDEX, weight_map=None),
        f"hf/{cases.INDEX} has no weight_map",
    ),
}


@pytest.mark.parametrize("case", [*BAD, *BAD_SHARDS])
def test_bad_directories(tmp_path, capsys, case):
    files = 1 if case in BAD else 3
    hf = cases.write(tmp_path / "hf", cases.tensors(), files)
    spoil, message = {**BAD, **BAD_SHARDS}[case]
    spoil(hf)
    assert message in refused(capsys, "--from_hf", hf, "--to_bundle", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("files", [1, 3])
def test_a_truncated_file_names_the_tensor(tmp_path, capsys, files):
    hf = cases.write(tmp_path / "hf", cases.tensors(), files)
    path = hf / (WEIGHTS if files == 1 else SHARD)
    size, name = path.stat().st_size, last_tensor(path)
    cut(path, 1)
    message = refused(capsys, "--from_hf", hf, "--to_bundle", tmp_path / "bundle")
    told = f"{path} is truncated: it has {size - 1} bytes of {size}, which cuts off {name}; get"
    assert message.startswith(told)
    cut(path, 3000)
    message = refused(capsys, "--from_hf", hf, "--to_bundle", tmp_path / "bundle")
    assert " tensors after it; get it again" in message
    assert not (tmp_path / "bundle").exists()


def test_targets_that_are_there_stay(tmp_path, capsys):
    hf = cases.write(tmp_path / "hf", cases.tensors())
    convert.from_hf(hf, tmp_path / "bundle")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    to_bundle = "--from_hf", hf, "--to_bundle"
    to_hf = "--from_bundle", tmp_path / "bundle", "--to_hf"
    for arguments in (
        (*to_bundle, tmp_path / "bundle"),
        (*to_hf, hf),
        (*to_hf, hf / "config.json"),
    ):
        message = refused(capsys, *arguments)
        assert f"{arguments[-1]} is there already: name another, or remove it" in message
    (tmp_path / "new.partial").mkdir()
    assert "new.partial is left of" in refused(capsys, *to_bundle, tmp_path / "new")
    message = refused(capsys, *to_hf, hf / "config.json" / "x")
    assert message.endswith("config.json/x cannot be written: Not a directory")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


UNOPENABLE = {  # what the files say, and what the message says
    "eos": (
        dict(generation_config={"eos_token_id": 99_999}),
        "eos_token_id=99999 is beyond the 304",
    ),
    "one of two": (
        dict(config={"eos_token_id": [301, 400]}),
        "hf/config.json: eos_token_id=400 is",
    ),
    "text": (dict(generation_config={"eos_token_id": "301"}), "eos_token_id='301' must be a token"),
    "pad": (dict(generation_config={"pad_token_id": 304}), "pad_token_id=304 is beyond the 304"),
    "table": (
        dict(config={"vocab_size": 64}),
        "the tokenizer has 304 tokens, but config.json says",
    ),
    "suffix": (
        dict(model=dict(treat_whitespace_as_suffix=True)),
        "tokenizer.model: it writes spaces after words, which is not supported",
    ),
    "pieces": (dict(model={}), "the tokenizer has 360 tokens, but config.json"),
    "word": (dict(generation_config={"eos_token_id": 5}), "it is an ordinary word of the vocab"),
    "list": (
        dict(generation_config=[]),
        "hf/generation_config.json is damaged: it holds no object",
    ),
}


@pytest.mark.parametrize("case", UNOPENABLE)
def test_what_no_command_would_open_is_not_imported(tmp_path, capsys, case):
    files, message = UNOPENABLE[case]
    told = {"vocab_size": 304, "eos_token_id": 301, **files.get("config", {})}
    values = cases.tensors(vocab_size=told["vocab_size"])
    hf = cases.write(tmp_path / "hf", values, **told)
    if "model" in files:
        tokenizer_cases.sentencepiece_model(hf, **files["model"])
    else:
        tokenizer_cases.byte_level(hf, generation_config=files.get("generation_config", {}))
    assert message in refused(capsys, "--from_hf", hf, "--to_bundle", tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_bundles_that_cannot_be_exported(tmp_path, capsys):
    hf = cases.write(tmp_path / "hf", cases.tensors())
    convert.from_hf(hf, tmp_path / "bundle")
    capsys.readouterr()
    to_hf = "--to_hf", tmp_path / "out"
    assert "is no bundle" in refused(capsys, "--from_bundle", hf / "x", *to_hf)
    message = refused(capsys, "--from_bundle", tmp_path / "bundle", *to_hf, "--step", 4)
    assert "step=4 is not in" in message
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    config["model"]["mlp_dim"] = 32
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(config))
    message = refused(capsys, "--from_bundle", tmp_path / "bundle", *to_hf)
    assert "mlp.down_FD of (3, 32, 16) is (3, 24, 16) there" in message
    config["model"]["norm"] = "layer"
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(config))
    refused(capsys, "--from_bundle", tmp_path / "bundle", *to_hf)
    assert not (tmp_path / "out").exists()


WAYS = "give --from_hf DIR --to_bundle DIR, or --from_bundle DIR --to_hf DIR; --help shows"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", WAYS),
        ("--from_hf a", WAYS),
        ("--from_hf a --to_hf b", WAYS),
        ("--from_hf a --to_bundle b --from_bundle c", WAYS),
        ("--from_hf a --to_bundle b --dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--from_bundle a --to_hf b --shard_gb 0", "--shard_gb=0.0 must be more than 0"),
        ("--from_bundle a --to_hf b --shards 2", "unrecognized arguments: --shards 2"),
        ("--from_hf nowhere --to_bundle b", "nowhere: there is no such directory"),
    ],
)
def test_command_lines(capsys, arguments, expected):
    assert expected in refused(capsys, *arguments.split())


def test_the_command_itself(tmp_path):
    """Exit with 2 and one line; help with an example."""
    command = [sys.executable, "-m", "model.convert"]
    done = subprocess.run(
        [*command, "--from_hf", tmp_path, "--to_bundle", tmp_path / "x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path} has no weights")
    assert len(done.stderr.splitlines()) == 1
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "python -m model.convert --from_hf TinyLlama-1.1B --to_bundle" in done.stdout


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ValueError("os_error_code='28'")])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, error):
    cases.write(tmp_path / "hf", cases.tensors())

    def full(source, path, done):
        (path / "half").write_text("")
        raise error

    monkeypatch.setattr(convert.hf_import, "save", full)
    with pytest.raises(SystemExit, match="could not be written, and nothing of it is left: .*28"):
        convert.from_hf(tmp_path / "hf", tmp_path / "bundle")
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
