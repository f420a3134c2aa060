"""Public checkpoints in and out: bit for bit, on any mesh, and whole or not there at all."""

import contextlib
import dataclasses
import json
import logging
import signal
import subprocess
import sys

import hf_cases as cases
import jax
import numpy as np
import pytest
import tokenizer_cases
from conftest import make_mesh

from core import sharding, tree
from core.checkpoint import Bundle
from core.command import cli
from core.config import UserError
from core.sharding import prefilling, training
from data.tokenizer import load as tokenizers
from infer import decode, load
from infer.config import DecodeConfig
from model import convert, families, transformer
from model.config import ModelConfig
from model.families.tensor import Layout, Tensor
from model.io import checkpoint_files, hf_export, hf_import


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


@pytest.fixture
def log(caplog, monkeypatch):
    """What our logger says."""
    monkeypatch.setattr(logging.getLogger("cakrawala"), "propagate", True)
    caplog.set_level(logging.INFO, logger="cakrawala")
    return caplog


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [cases.BFLOAT16, np.dtype(np.float32)], ids=str)
def test_both_ways_bit_for_bit(tmp_path, dtype, files, capsys):
    values = cases.tensors(dtype)
    cases.write(tmp_path / "hf", values, files)
    run("--from_hf", tmp_path / "hf", "--to_bundle", tmp_path / "a bundle")
    run("--from_bundle", tmp_path / "a bundle", "--to_hf", tmp_path / "one")
    run("--from_bundle", tmp_path / "a bundle", "--to_hf", tmp_path / "many", "--shard_gb", "8e-6")
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    cases.assert_same(cases.read(tmp_path / "one"), values)
    cases.assert_same(cases.read(tmp_path / "many"), values)
    for name in ("one", "many"):
        told = json.loads((tmp_path / name / "config.json").read_text())
        assert told["torch_dtype"] == dtype.name
        assert {key: told.get(key) for key in cases.config_json()} == cases.config_json()
    run("--from_hf", tmp_path / "many", "--to_bundle", tmp_path / "again")
    configs = [Bundle(tmp_path / name).config(model=ModelConfig) for name in ("a bundle", "again")]
    assert configs[0].model == configs[1].model
    assert configs[0].model.param_dtype == dtype.name
    assert configs[0].name == "a bundle"
    out = capsys.readouterr().out.splitlines()
    assert f"{len(values)} tensors" in out[0] and dtype.name in out[0]
    assert not list(tmp_path.glob("*.partial"))


def test_files_are_at_most_a_shard(tmp_path):
    sizes = [3, 3, 9, 1, 2]
    tensors = [Tensor(str(i), (), None, Layout((n,), None, None)) for i, n in enumerate(sizes)]
    shards = hf_export.shard(tensors, np.dtype(np.float32), limit=24)
    assert [[t.name for t in held] for held in shards] == [["0", "1"], ["2"], ["3", "4"]]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A directory with `hf` and the `bundle` made of it, in float32."""
    path = tmp_path_factory.mktemp("imported")
    cases.write(path / "hf", cases.tensors(np.float32))
    convert.from_hf(path / "hf", path / "bundle")
    return path


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_bundle_opens_on_any_mesh(imported, sizes):
    found = load.find(imported / "bundle")
    found = found._replace(config=dataclasses.replace(found.config, dtype="float32"))
    with jax.set_mesh(make_mesh(sizes)):
        abstract = transformer.abstract(found.config, training())
        with contextlib.closing(Bundle(found.path)) as bundle:
            leaves = tree.named_leaves(bundle.restore(found.step, model=abstract)["model"])
    expected = cases.ours(cases.tensors(np.float32))
    assert leaves.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(leaves[name]), values, err_msg=name)


@pytest.mark.parametrize("rules", [training(), prefilling()], ids=["training", "prefilling"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_loads_onto_a_mesh(imported, sizes, rules):
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        model = hf_import.load(imported / "hf", rules)
        shardings = tree.named_leaves(hf_import.transformer.abstract(model.config, rules))
    leaves = tree.named_leaves(model)
    expected = cases.ours(cases.tensors(np.float32))
    assert leaves.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(leaves[name]), values, err_msg=name)
        assert leaves[name].sharding.spec == shardings[name].sharding.spec
        assert leaves[name].sharding.mesh == mesh


def test_a_device_holds_its_shards_alone(imported, monkeypatch):
    """While loading, too: whatever goes to a device is cut to its shard before."""
    sent = []
    make = jax.make_array_from_callback

    def watch(shape, sharding, values):
        array = make(shape, sharding, values)
        sent.extend((shape, shard.data.shape, sharding) for shard in array.addressable_shards)
        return array

    monkeypatch.setattr(jax, "make_array_from_callback", watch)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        model = hf_import.load(imported / "hf", sharding.training())
    assert len(sent) == 8 * len(cases.tensors())
    assert all(shard == where.shard_shape(shape) for shape, shard, where in sent)
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(model):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    norms = sum(x.nbytes for name, x in tree.named_leaves(model).items() if "norm" in name)
    assert set(held.values()) == {(tree.num_bytes(model) - norms) // 8 + norms}


def test_decodes_an_imported_bundle(imported, tmp_path, monkeypatch):
    """With a config file of another model: the bundle tells its own."""
    experiment = cli.load("configs/quickstart.py:tiny")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"tokens": [1, 2, 3]}\n')
    asked = DecodeConfig(checkpoint=str(imported / "bundle"), prompts=str(prompts), max_tokens=4)
    experiment = dataclasses.replace(cli.freeze(experiment), decode=asked)
    monkeypatch.setattr(decode, "make_mesh", lambda _: make_mesh((1, 1, 1)))
    (row,) = decode.main(experiment)
    assert len(row["tokens"]) == 4


def test_dtypes(tmp_path, log):
    """bfloat16 stays; float16, or a mixture, is held by float32; --dtype casts, and computes."""
    exact = cases.tensors(np.float16)
    mixed = {n: x if "norm" in n else x.astype(cases.BFLOAT16) for n, x in exact.items()}
    half = cases.tensors()
    for name, values, told, asked, expected, computing in (
        ("bfloat16", half, {}, None, "bfloat16", "bfloat16"),
        ("to float32", half, {}, "float32", "float32", "float32"),
        ("float16", exact, dict(torch_dtype="float16"), None, "float32", "float32"),
        (
            "mixed",
            mixed,
            dict(dtype="bfloat16", torch_dtype="float32"),
            None,
            "float32",
            "bfloat16",
        ),
        ("cast", exact, {}, "bfloat16", "bfloat16", "bfloat16"),
    ):
        cases.write(tmp_path / name, values, **told)
        convert.from_hf(tmp_path / name, tmp_path / f"{name}-bundle", asked)
        message = log.records[-1].getMessage()
        assert message.endswith(f"computing in {computing}, the bundle has {expected}")
        model = Bundle(tmp_path / f"{name}-bundle").config(model=ModelConfig).model
        assert (model.dtype, model.param_dtype) == (computing, expected)
        run("--from_bundle", tmp_path / f"{name}-bundle", "--to_hf", tmp_path / f"{name}-back")
        cast = {n: x.astype(expected) for n, x in values.items()}
        cases.assert_same(cases.read(tmp_path / f"{name}-back"), cast)
    back = "--from_bundle", tmp_path / "float16-bundle", "--to_hf", tmp_path / "down"
    run(*back, "--dtype", "bfloat16")
    cast = {name: x.astype(cases.BFLOAT16) for name, x in exact.items()}
    cases.assert_same(cases.read(tmp_path / "down"), cast)
    assert json.loads((tmp_path / "down" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_exports_a_trained_step(imported, tmp_path):
    """Arrays that a mesh of eight saved, all layers in one piece; the newest step, or another."""
    found = load.find(imported / "bundle")
    bundle_json = (imported / "bundle" / "config.json").read_text()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(bundle_json)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        model = hf_import.load(imported / "hf", training())
        bundle = Bundle(tmp_path / "run")
        bundle.save(3, {"model": model}, {})
        bundle.save(7, {"model": jax.tree.map(lambda x: 2 * x, model)}, {})
        bundle.close()
    values = cases.tensors(np.float32)
    run("--from_bundle", tmp_path / "run", "--to_hf", tmp_path / "newest")
    cases.assert_same(cases.read(tmp_path / "newest"), {n: 2 * x for n, x in values.items()})
    run("--from_bundle", tmp_path / "run", "--to_hf", tmp_path / "older", "--step", 3)
    cases.assert_same(cases.read(tmp_path / "older"), values)
    assert found.step == 0


def fused(config):
    """The same tensors, but Q, K and V are one."""
    kept = [t for t in TENSORS(config) if not t.name.endswith(("q_proj.weight", "k_proj.weight"))]
    sizes = config.num_heads, config.num_kv_heads, config.num_kv_heads
    H, D = config.head_dim, config.embed_dim
    cuts = np.cumsum(sizes)[:-1] * H

    def split(x):
        return tuple(part.T.reshape(D, -1, H) for part in np.split(x, cuts))

    def join(*qkv):
        return np.concatenate([x.reshape(D, -1).T for x in qkv])

    layout = Layout((sum(sizes) * H, D), split, join)
    params = tuple(f"stages.0.0.attention.{name}" for name in ("q_DNH", "k_DKH", "v_DKH"))
    return [
        t._replace(name=t.name.replace("v_proj", "qkv"), params=params, layout=layout)
        if t.name.endswith("v_proj.weight")
        else t
        for t in kept
    ]


TENSORS = families.tensors


def test_one_tensor_of_several_parameters(imported, tmp_path, monkeypatch):
    values = cases.tensors()
    for i in range(cases.LAYERS):
        names = [f"model.layers.{i}.self_attn.{n}_proj.weight" for n in "qkv"]
        values[f"model.layers.{i}.self_attn.qkv.weight"] = np.concatenate(
            [values.pop(name) for name in names]
        )
    cases.write(tmp_path / "hf", values)
    monkeypatch.setattr(families, "tensors", fused)
    run("--from_hf", tmp_path / "hf", "--to_bundle", tmp_path / "bundle")
    run("--from_bundle", tmp_path / "bundle", "--to_hf", tmp_path / "back")
    cases.assert_same(cases.read(tmp_path / "back"), values)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        leaves = tree.named_leaves(hf_import.load(tmp_path / "hf", training()))
    for name, expected in cases.ours(cases.tensors()).items():
        np.testing.assert_array_equal(np.asarray(leaves[name]), expected, err_msg=name)


def test_a_tied_head(tmp_path):
    """It may be there twice if it is the same; an export has it once."""
    values = cases.tensors()
    once = {name: x for name, x in values.items() if name != cases.HEAD}
    twice = {**values, cases.HEAD: values[cases.EMBEDDING]}
    for name, held in (("once", once), ("twice", twice)):
        cases.write(tmp_path / name, held, tie_word_embeddings=True)
        run("--from_hf", tmp_path / name, "--to_bundle", tmp_path / f"{name}-bundle")
        run("--from_bundle", tmp_path / f"{name}-bundle", "--to_hf", tmp_path / f"{name}-back")
        cases.assert_same(cases.read(tmp_path / f"{name}-back"), once)
    cases.write(tmp_path / "wrong", values, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head.weight is not equal to model.embed_tokens"):
        run("--from_hf", tmp_path / "wrong", "--to_bundle", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_the_tokenizer_travels_along(tmp_path):
    cases.write(tmp_path / "hf", cases.tensors(vocab_size=304), vocab_size=304)
    tokenizer_cases.byte_level(tmp_path / "hf", generation_config={"eos_token_id": [301, 302]})
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ x }}")
    (tmp_path / "hf" / "README.md").write_text("not a part of it")
    run("--from_hf", tmp_path / "hf", "--to_bundle", tmp_path / "bundle")
    run("--from_bundle", tmp_path / "bundle", "--to_hf", tmp_path / "back")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        content = (tmp_path / "hf" / name).read_bytes()
        assert (tmp_path / "bundle" / "tokenizer" / name).read_bytes() == content
        assert (tmp_path / "back" / name).read_bytes() == content
    assert not (tmp_path / "bundle" / "tokenizer" / "README.md").exists()
    told = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (told["bos_token_id"], told["eos_token_id"]) == (300, [301, 302])
    again = tokenizers.load(tmp_path / "back")
    assert again.fingerprint == tokenizers.load(tmp_path / "bundle" / "tokenizer").fingerprint


KILLED = """
import os, signal, sys
from core import lazy
from model import convert
from model.io import safetensors
count = 0
def killed(function):
    def call(*args):
        global count
        count += 1
        if count > 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call
lazy.chunk = killed(lazy.chunk)
safetensors.TensorWriter.write = killed(safetensors.TensorWriter.write)
convert.main(sys.argv[1:])
"""


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_kill_leaves_nothing_that_looks_whole(imported, tmp_path, way):
    target = tmp_path / "target"
    arguments = {
        "import": ["--from_hf", imported / "hf", "--to_bundle", target],
        "export": ["--from_bundle", imported / "bundle", "--to_hf", target, "--shard_gb", "8e-6"],
    }[way]
    command = [sys.executable, "-c", KILLED, *map(str, arguments)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert not target.exists()
    partial = tmp_path / "target.partial"
    assert any(path.is_file() for path in partial.rglob("*"))
    with pytest.raises(UserError, match="no complete step|neither model.safetensors nor"):
        Bundle(partial).choose() if way == "import" else checkpoint_files.find(partial)
    with pytest.raises(UserError, match="target.partial is left of a conversion"):
        run(*arguments)


def test_a_failure_leaves_nothing(imported, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(hf_export.TensorWriter, "write", fail)
    with pytest.raises(SystemExit, match="nothing of it is left: no space left"):
        run("--from_bundle", imported / "bundle", "--to_hf", tmp_path / "target")
    assert not list(tmp_path.iterdir())
