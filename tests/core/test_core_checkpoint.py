"""Bundles: any mesh to any mesh, bit for bit; damage is named; failing saves hurt nothing."""

import json
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mesh
from jax.sharding import NamedSharding, PartitionSpec

from core import checkpoint, sharding
from core.checkpoint import Bundle
from core.config import Experiment, UserError, to_json
from core.sharding import MeshConfig
from core.storage.files import LISTING
from model.attention.spec import full, sliding
from model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=64,
    context=32,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    pattern=(sliding(8), full()),
)
SPECS = {
    "table": PartitionSpec("model", ("data", "seq")),
    "layers": [PartitionSpec(None, ("data", "seq")), PartitionSpec()],
}


def values(seed: int):
    """A tree of three arrays, one of them bfloat16."""
    random = np.random.default_rng(seed)
    matrix, vector = random.standard_normal((2, 16, 8)), random.standard_normal(5)
    layers = [matrix[1].astype(jnp.bfloat16), vector.astype(np.float32)]
    return {"table": matrix[0].astype(np.float32), "layers": layers}


def placed(tree):
    """The tree on the mesh in use."""
    return jax.tree.map(jax.device_put, tree, SPECS)


def abstract():
    def leaf(x, spec):
        sharding = NamedSharding(jax.sharding.get_mesh().abstract_mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, values(0), SPECS)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), b)


@pytest.fixture
def directory(tmp_path):
    checkpoint.create(tmp_path / "run", '{"name": "x"}', None)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A bundle with steps 10 and 20, saved on 8 devices."""
    path = tmp_path_factory.mktemp("saved") / "run"
    checkpoint.create(path, '{"name": "x"}', None)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        bundle = Bundle(path)
        for step in (10, 20):
            bundle.save(step, {"model": placed(values(step))}, {"row": step})
        bundle.close()
    return path


@pytest.fixture
def copy(saved, tmp_path):
    """The bundle `saved`, to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What our logger warns of."""
    monkeypatch.setattr(logging.getLogger("cakrawala"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="cakrawala")
    return caplog


def largest_file(step):
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def complaint(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_opens_on_any_mesh_bit_for_bit(saved, sizes):
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        bundle = Bundle(saved)
        restored = bundle.restore(bundle.choose(), model=abstract())
        bundle.close()
    assert restored["data"] == {"row": 20}
    assert_equal(restored["model"], values(20))
    specs = jax.tree.map(lambda x: x.sharding.spec, restored["model"])
    assert specs == SPECS
    assert restored["model"]["table"].sharding.mesh == mesh


def test_an_older_step_opens_too(saved, one_device):
    bundle = Bundle(saved)
    assert bundle.steps() == [10, 20]
    restored = bundle.restore(bundle.choose(10), model=abstract())
    bundle.close()
    assert_equal(restored["model"], values(10))


def test_a_step_cut_off_is_skipped_with_a_word(copy, warnings):
    (copy / "20" / LISTING).unlink()
    bundle = Bundle(copy)
    assert not bundle.is_complete(20)
    assert bundle.choose() == 10
    (record,) = warnings.records
    assert f"20/{LISTING} is missing, so 20 is no step; using step 10" in record.getMessage()
    message = complaint(bundle.choose, 20)
    assert message.startswith(
        f"step=20 is not in {copy}; the steps there are: 10; {copy}/20/{LISTING}"
    )


def test_a_truncated_file_is_named_with_both_sizes(copy):
    path = largest_file(copy / "20")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    bundle = Bundle(copy)
    assert f"{path} has {size - 5} bytes instead of {size}" in complaint(bundle.choose, 20)
    assert bundle.choose() == 10


def test_a_lost_file_is_named(copy):
    path = largest_file(copy / "10")
    path.unlink()
    message = complaint(Bundle(copy).choose, 10)
    assert f"{path} is missing" in message
    assert message.endswith("no older step is complete")


def test_no_complete_step(copy, directory):
    assert complaint(Bundle(directory).choose).endswith(
        "has no complete step: nothing was saved yet"
    )
    for step in (10, 20):
        (copy / str(step) / LISTING).unlink()
    message = complaint(Bundle(copy).choose)
    assert "has no complete step" in message
    assert f"10/{LISTING} is missing" in message
    assert f"20/{LISTING} is missing" in message


def test_a_step_that_was_never_there(saved):
    message = complaint(Bundle(saved).choose, 15)
    assert message.startswith("step=15 is not in ")
    assert message.endswith("the steps there are: 10, 20")


def test_no_bundle(tmp_path):
    assert "is no bundle: it has no config.json" in complaint(Bundle, tmp_path)


def test_a_wrong_shape_or_name_is_told(saved, one_device):
    bundle = Bundle(saved)
    wrong = abstract()
    wrong["layers"][0] = jax.ShapeDtypeStruct((16, 9), jnp.bfloat16)
    assert complaint(bundle.restore, 20, model=wrong).endswith(
        "20/model: layers.0 of (16, 9) is (16, 8) there"
    )
    wrong = {**abstract(), "head": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert complaint(bundle.restore, 20, model=wrong).endswith("head of (3,) is not there")
    less = {"table": abstract()["table"]}
    assert "layers.0 of (16, 8) is there, and has no place" in complaint(
        bundle.check, 20, model=less
    )
    bundle.close()


def test_keep_keeps_the_newest(directory, one_device):
    bundle = Bundle(directory, keep=2)
    for step in (2, 10, 9, 30):
        bundle.save(step, {"model": placed(values(step))}, {"row": step})
    bundle.close()
    assert bundle.steps() == [10, 30]
    assert bundle.is_complete(10)
    assert bundle.is_complete(30)


def test_a_failing_save_leaves_the_older_step(copy, one_device):
    """Files are limited to 100 kB while 1 MB is saved, as on a full disk."""
    bundle = Bundle(copy, keep=1)
    noise = np.random.default_rng(0).standard_normal((2, 1 << 17)).astype(np.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(Exception, match=r"(?i)too large|failed|error"):
            bundle.save(30, {"model": {"noise": jax.device_put(noise)}}, {"row": 30})
            bundle.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bundle.is_complete(10)
    assert bundle.is_complete(20)
    assert not bundle.is_complete(30)
    assert bundle.choose() == 20
    bundle.save(40, {"model": placed(values(40))}, {"row": 40})
    bundle.close()
    assert bundle.choose() == 40


def test_saving_a_step_again_replaces_it(copy, one_device):
    bundle = Bundle(copy)
    bundle.save(20, {"model": placed(values(3))}, {"row": 3})
    bundle.wait()
    restored = bundle.restore(20, model=abstract())
    bundle.close()
    assert restored["data"] == {"row": 3}
    assert_equal(restored["model"], values(3))


def test_arrays_may_go_while_the_save_goes_on(directory, one_device):
    """The train step donates its state: arrays are copied before `save` returns."""
    bundle = Bundle(directory)
    tree = placed(values(1))
    bundle.save(1, {"model": tree}, {})
    jax.block_until_ready(
        jax.jit(lambda t: jax.tree.map(jnp.zeros_like, t), donate_argnums=0)(tree)
    )
    jax.tree.map(lambda x: x.delete(), tree)
    bundle.wait()
    assert_equal(bundle.restore(1, model=abstract())["model"], values(1))
    bundle.close()


def test_config_reads_only_the_sections_named(tmp_path):
    mesh = MeshConfig(simulate=8)
    experiment = Experiment(name="x", model=MODEL, mesh=mesh)
    text = json.loads(to_json(experiment))
    text["train"] = {"a field of the future": 3}
    checkpoint.create(tmp_path / "run", json.dumps(text), None)
    bundle = Bundle(tmp_path / "run")
    assert bundle.config(model=ModelConfig) == Experiment(name="x", model=MODEL)
    assert bundle.config(mesh=sharding.MeshConfig, model=ModelConfig) == experiment


def test_the_tokenizer_travels_along(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocabulary").write_text("a b c")
    checkpoint.create(tmp_path / "run", '{"name": "x"}', tmp_path / "words")
    tokenizer = Bundle(tmp_path / "run").tokenizer
    assert (tokenizer / "vocabulary").read_text() == "a b c"
    checkpoint.create(tmp_path / "other", '{"name": "x"}', None)
    assert Bundle(tmp_path / "other").tokenizer is None
