"""Prefill and decode by the real TPU compiler, for a slice that is not there."""

import dataclasses
import functools

import infer_cases as cases
import jax
import jax.numpy as jnp
import pytest

from core import sharding, tree
from core.compile import aot, hlo
from core.sharding import MeshConfig, make_mesh
from infer import load, steps
from infer.sampling.params import Sampling, pack
from model.attention.spec import full
from model.cache import kv_cache
from model.cache.form import CacheConfig
from model.sizes import memory, weights

pytestmark = pytest.mark.usefixtures("compile_only")

LENGTH, CHUNK = 65_536, 64


def in_its_memory(slot):
    """Shapes of keys and values whose shardings say that they are the host's."""
    if not slot.host:
        return slot

    def there(x):
        mesh = jax.sharding.get_mesh()
        place = jax.NamedSharding(mesh, x.sharding.spec, memory_kind="pinned_host")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    k_LBKSH, v_LBKSH = jax.tree.map(there, (slot.k_LBKSH, slot.v_LBKSH))
    return dataclasses.replace(slot, k_LBKSH=k_LBKSH, v_LBKSH=v_LBKSH)


def program(name, form=CacheConfig(), length=LENGTH, kind="compute", **fields):  # noqa: B008 (immutable)
    """(compiled, bytes of the cache) of one text on 2 shards of its length and 2 of the heads."""
    rules = sharding.prefilling() if name == "extend" else sharding.decoding()
    # Several layers and kv heads on a device: one alone has a layout that every use likes.
    sizes = dict(pattern=(full(),), num_layers=4, num_kv_heads=4, head_dim=128)
    sizes |= dict(dtype="bfloat16", attention_kernel="chunked") | fields
    config = cases.model_config(**sizes)
    rounding = weights.rounding(config, rules, kind, None)
    model = load.shapes(config, rules, rounding)

    def state():
        held = kv_cache.create(config, 1, length, rules, form)
        last_BD = jnp.zeros((1, config.embed_dim), jnp.bfloat16, out_sharding=rules("batch", None))
        now = steps.Prefilled(held, last_BD)
        row_B = jnp.zeros(1, jnp.int32, out_sharding=rules("batch"))
        keys_B = jax.vmap(jax.random.key)(row_B)
        packed = jax.tree.map(lambda x: row_B.astype(x.dtype), pack([Sampling(temperature=0)]))
        return now, row_B, steps.State(now, row_B, row_B, row_B > 0, keys_B, packed, None)

    now, row_B, decoding = jax.eval_shape(state)
    slots = tuple(map(in_its_memory, now.cache.slots))
    now = dataclasses.replace(now, cache=dataclasses.replace(now.cache, slots=slots))
    decoding = dataclasses.replace(decoding, prefilled=now)
    if name == "extend":
        place = jax.NamedSharding(jax.sharding.get_mesh(), rules("batch", None))
        tokens_BT = jax.ShapeDtypeStruct((1, CHUNK), jnp.int32, sharding=place)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        step, args = steps.extend, (now, steps.PromptChunk(tokens_BT, number, row_B), row_B)
    else:
        step = functools.partial(steps.advance, eos=(), vocab_size=320)
        args = decoding, decoding.done_B
    lowered = jax.jit(step, donate_argnums=1).trace(model, *args)
    return lowered.lower(lowering_platforms=("tpu",)).compile(), tree.num_bytes(now.cache)


@pytest.mark.parametrize(
    "form", [CacheConfig(), CacheConfig(k_cache="int8", v_cache="int4")], ids=lambda form: form.name
)
@pytest.mark.parametrize("name", ["extend", "advance"])
def test_a_tpu_copies_no_cache_and_sends_none(name, form):
    with jax.set_mesh(make_mesh(MeshConfig(seq=2, model=2), aot.slice_devices("v5e:2x2"))):
        compiled, cache_bytes = program(name, form)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes > cache_bytes / 4
    assert memory.temp_size_in_bytes < cache_bytes / 4 / 8
    for collective in hlo.count(compiled.as_text(), scope="").collectives:
        assert collective.bytes < cache_bytes / 4 / 8, collective


@pytest.mark.parametrize("name", ["extend", "advance"])
def test_a_tpu_fetches_a_layer_from_the_host_while_it_computes_the_one_before(name):
    """The device has two layers of four, and what it computes; the cache stays where it is."""
    with jax.set_mesh(make_mesh(MeshConfig(seq=2, model=2), aot.slice_devices("v5e:2x2"))):
        compiled, cache_bytes = program(name, CacheConfig(cache_host=True))
    memory, on_device = compiled.memory_analysis(), cache_bytes / 4
    assert memory.host_argument_size_in_bytes > 0.99 * on_device
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes
    assert memory.argument_size_in_bytes < on_device / 8
    assert memory.temp_size_in_bytes < 0.7 * on_device
    assert any(map(_in_order, compiled.as_text().split("\n\n")))


def _in_order(computation):
    """Whether the loop over a layer's keys is between the start and the end of a copy."""
    marks = "dynamic-slice-start(", " while(", "dynamic-slice-done("
    start, loop, done = map(computation.find, marks)
    return 0 < start < loop < done


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", [pytest.param("extend", marks=pytest.mark.slow), "advance"])
def test_a_tpu_makes_no_float_weight(name, kind):
    """None of a whole layer: a matrix as bfloat16 would be more than all temporaries are."""
    sizes = dict(embed_dim=2048, mlp_dim=131_072, num_heads=8)  # more than its vector memory
    with jax.set_mesh(make_mesh(MeshConfig(seq=2, model=2), aot.slice_devices("v5e:2x2"))):
        compiled, cache_bytes = program(name, length=256, kind=kind, **sizes)
    config = cases.model_config(num_layers=4, num_kv_heads=4, head_dim=128, **sizes)
    planned = memory.weight_bytes(dataclasses.replace(config, dtype="bfloat16"), kind, None)
    found = compiled.memory_analysis()
    assert found.argument_size_in_bytes == pytest.approx((planned + cache_bytes / 2) / 2, rel=0.05)
    matrix_bytes = 2 * 2048 * 131_072 // 2  # of one device
    assert found.temp_size_in_bytes < matrix_bytes / 2
