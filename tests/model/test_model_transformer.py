"""The transformer over meshes, caches and remat policies: one function, whatever computes it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import documents
from conftest import make_mesh
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from tolerances import assert_close

from core import sharding, tree
from core.config import UserError
from model import transformer
from model.attention.mask import Positions
from model.attention.spec import block_sparse, chunked, dilated, full, moba, nsa, prefix, sliding
from model.cache import kv_cache
from model.cache.flash_decode import NewKV
from model.config import ModelConfig
from model.initializers import ParamInit
from model.ops import rope
from model.ops.rope import Rope

# Two scanned groups of two slots, and a tail of one.
CONFIG = ModelConfig(
    vocab_size=64,
    context=64,
    num_layers=5,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    pattern=(sliding(4), full(softcap=5.0, rope=Rope(100.0))),
    attention_kernel="reference",
    dtype="float32",
)
# One slot compiles in half the time, for what does not depend on the pattern.
SMALL = dataclasses.replace(CONFIG, num_layers=2, pattern=(sliding(6, softcap=5.0),))
YARN = dict(scaling="yarn", factor=2.0, original=8)
WITH_ALL = dataclasses.replace(
    SMALL,
    norm="layer",
    qk_norm=True,
    tied_head=False,
    block="sandwich",
    bias=("qkv", "out", "mlp"),
    query_scale=0.5,
    learned_positions=True,
    embed_scale=4.0,
    logit_softcap=30.0,
    pattern=(sliding(6, sinks=2, sink_logit=True, alibi=1.0, rope=Rope(**YARN)),),
)
KINDS = dataclasses.replace(
    CONFIG,
    num_layers=5,
    pattern=(
        sliding(4, sinks=2, sink_logit=True, alibi=1.0, rope=None),
        chunked(5),
        dilated(3, 2),
        block_sparse(2, 2, stride=3, sinks=3),
        prefix(6),
    ),
)
CHOOSING = dataclasses.replace(
    CONFIG, num_layers=2, pattern=(moba(4, 2), nsa(4, 3, 5, compress=4, step=2))
)
B, T = 8, 16
ONE = (1, 1, 1)


@functools.cache
def batch(length: int = T):
    """Tokens, and one document a row: (tokens, positions, segments), each [B, length]."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, length), np.int32)
    return tokens, *documents(*[(length,)] * B, length=length)


def place(rules, arrays):
    return [jax.device_put(x, rules("batch", "length")) for x in arrays]


def create(config, rules):
    """The model with random weights, norms too; made by NumPy, which has nothing to compile."""
    planned = transformer.abstract(config, rules)
    random, leaves = np.random.default_rng(0), {}
    for name, leaf in tree.named_leaves(planned).items():
        value = random.standard_normal(leaf.shape) * 0.2 + name.endswith("scale_D")
        leaves[name] = jax.device_put(value.astype(leaf.dtype), leaf.sharding.spec)
    return tree.with_leaves(planned, leaves)


forward = jax.jit(lambda model, *args: model(*args)[0])
hidden_and_cache = jax.jit(lambda model, held, *args: model(*args, cache=held))


def loss(model, args, remat="none"):
    """A smooth function of all logits."""
    hidden, _ = model(*args, remat=remat)
    return jnp.square(jax.nn.logsumexp(model.logits(hidden), -1)).mean()


@functools.cache
def loss_and_gradients(config, sizes, remat="none"):
    """((loss, gradients by name), bytes of temporary memory)."""
    with jax.set_mesh(make_mesh(sizes)):
        rules = sharding.training()
        args = create(config, rules), place(rules, batch())
        run = jax.jit(jax.value_and_grad(functools.partial(loss, remat=remat)))
        compiled = run.lower(*args).compile()
        value, gradients = compiled(*args)
        results = float(value), jax.tree.map(np.asarray, tree.named_leaves(gradients))
        return results, compiled.memory_analysis().temp_size_in_bytes


def assert_same_gradients(actual, expected):
    assert_close(actual[0], expected[0], "model", what="loss")
    for name, gradient in expected[1].items():
        assert np.abs(gradient).max() > 0, f"{name} has no gradient"
        assert_close(actual[1][name], gradient, "model", what=name)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(WITH_ALL, (2, 2, 2)), (WITH_ALL, (1, 4, 2)), (CHOOSING, (2, 2, 2))]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((WITH_ALL, (8, 1, 1)), (WITH_ALL, (1, 2, 4)), (CHOOSING, (1, 2, 4)))
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_loss_and_gradients_are_the_same_on_every_mesh(config, sizes):
    """(1, 2, 4) has more shards of the heads than there are kv heads."""
    expected, _ = loss_and_gradients(config, ONE)
    assert_same_gradients(loss_and_gradients(config, sizes)[0], expected)


@pytest.mark.parametrize("remat", transformer.REMAT_POLICIES)
def test_remat_saves_memory_and_changes_no_gradient(remat):
    expected, most = loss_and_gradients(WITH_ALL, ONE)
    actual, fewer = loss_and_gradients(WITH_ALL, ONE, remat)
    assert_same_gradients(actual, expected)
    assert fewer < most


def test_each_policy_keeps_less():
    """Bytes that the backward waits for: the residuals of a gradient, counted without running."""

    def kept(remat):
        with jax.set_mesh(make_mesh(ONE)):
            rules = sharding.training()
            model, args = transformer.abstract(WITH_ALL, rules), place(rules, batch())
            pull = jax.eval_shape(lambda m: jax.vjp(lambda m: loss(m, args, remat), m)[1], model)
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    sizes = [kept(remat) for remat in ("none", "dots", "attention", "full")]
    assert sizes == sorted(set(sizes), reverse=True), sizes


def test_the_future_changes_nothing(one_device):
    """Exactly nothing: the same program runs on both."""
    model = create(CONFIG, sharding.whole())
    tokens, positions, segments = batch()
    before = forward(model, tokens, positions, segments)
    changed = tokens.copy()
    changed[:, 9] = (changed[:, 9] + 1) % CONFIG.vocab_size
    after = forward(model, changed, positions, segments)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (np.abs(before - after)[:, 9:].max(axis=(0, 2)) > 0).all()


def test_no_gradient_flows_from_the_past_to_the_future(one_device):
    """Tokens are all different, so that each has a row of the embedding to itself."""
    model = create(CONFIG, sharding.whole())
    tokens = np.random.default_rng(0).permutation(CONFIG.vocab_size)[None, :T]
    positions, segments = documents((T,), length=T)

    @jax.jit
    def reach(model, at):
        def one(model):
            hidden, _ = model(tokens, positions, segments)
            return jnp.sin(hidden[0, at]).sum()

        return jnp.abs(jax.grad(one)(model).embedding_VD[...]).max(axis=1)[tokens[0]]

    for at in (0, 5, T - 1):
        flows = np.asarray(reach(model, at)) > 0
        np.testing.assert_array_equal(flows, np.arange(T) <= at)


def test_packed_documents_are_as_alone(one_device):
    model, half = create(CONFIG, sharding.whole()), T // 2
    tokens, where = batch()[0], documents(*[(half, half)] * B, length=T)
    packed = np.asarray(forward(model, tokens, *where))
    alone = documents(*[(half,)] * 2 * B, length=half)
    alone = forward(model, tokens.reshape(2 * B, half), *alone)
    assert_close(packed.reshape(2 * B, half, -1), alone, "model")
    changed = tokens.copy()
    changed[:, 3] = (changed[:, 3] + 1) % CONFIG.vocab_size
    after = np.asarray(forward(model, changed, *where))
    np.testing.assert_array_equal(packed[:, half:], after[:, half:])
    assert (np.abs(packed - after)[:, 3:half].max(axis=(0, 2)) > 0).all()


@pytest.mark.parametrize(
    ("config", "sizes", "sizes_kept"),
    [
        (SMALL, (1, 2, 4), [6]),
        (CONFIG, (2, 2, 2), [4, 24, 4]),
        (KINDS, (1, 4, 2), [4 + 4, 8, 8, 24, 24]),
        pytest.param(CHOOSING, (1, 4, 2), [24, 24], marks=pytest.mark.slow),
    ],
    ids=["more-shards-than-kv-heads", "all-sharded", "every-kind", "choosing"],
)
def test_prefill_and_decode_equal_the_full_forward(config, sizes, sizes_kept):
    """Chunks of 11, 1, 11 and 1: longer than the window, whose ring goes round."""
    with jax.set_mesh(make_mesh(sizes)):
        rules = sharding.decoding()
        model, arrays = create(config, rules), batch(24)
        expected = forward(model, *place(rules, arrays))
        held = kv_cache.create(config, B, 24, rules)
        parts = []
        for start, end in ((0, 11), (11, 12), (12, 23), (23, 24)):
            args = place(rules, [x[:, start:end] for x in arrays])
            hidden, held = hidden_and_cache(model, held, *args)
            parts.append(np.asarray(hidden))
        assert_close(np.concatenate(parts, axis=1), expected, "model")
        np.testing.assert_array_equal(held.seen_B, 24)
        assert [slot.positions_BS.shape[1] for slot in held.slots] == sizes_kept


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "strategy"), [((1, 4, 1), "ring"), ((2, 2, 2), "ulysses")])
def test_dealt_chunks_that_choose_equal_the_full_forward(sizes, strategy):
    """The tokens of a chunk are on the shards that keep them; blocks lie on all shards."""
    with jax.set_mesh(make_mesh(ONE)):
        whole = sharding.whole()
        expected = np.asarray(forward(create(CHOOSING, whole), *batch(24)))
    with jax.set_mesh(make_mesh(sizes)):
        rules = sharding.prefilling(strategy)
        model, held = create(CHOOSING, rules), kv_cache.create(CHOOSING, B, 24, rules)
        parts = []
        for start, end in ((0, 8), (8, 20), (20, 24)):
            args = [kv_cache.deal(jnp.asarray(x[:, start:end]), start, rules) for x in batch(24)]
            hidden, held = hidden_and_cache(model, held, *args)
            order = np.argsort(np.asarray(args[1]), axis=1)[..., None]
            parts.append(np.take_along_axis(np.asarray(hidden), order, 1))
    assert_close(np.concatenate(parts, axis=1), expected, "model")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, id="near and far"),
        pytest.param(CHOOSING, id="choosing", marks=pytest.mark.slow),
    ],
)
def test_ragged_rows_decode_as_each_alone(one_device, config):
    """Prompts of 1 to 8 tokens side by side, padded; then each row goes on where it stands."""
    model, (tokens, positions, segments) = create(config, sharding.whole()), batch()
    expected = np.asarray(forward(model, tokens, positions, segments))
    rows, lengths = np.arange(B), np.arange(1, B + 1)
    prompt = (np.arange(B) < lengths[:, None]).astype(np.int32)
    held = kv_cache.create(config, B, T, sharding.whole())
    hidden, held = hidden_and_cache(model, held, tokens[:, :B], positions[:, :B] * prompt, prompt)
    for row, length in enumerate(lengths):
        assert_close(hidden[row, :length], expected[row, :length], "model", what=f"row {row}")
    for step in range(T - B):
        at = lengths + step
        args = (x[rows, at][:, None] for x in (tokens, positions, segments))
        hidden, held = hidden_and_cache(model, held, *args)
        assert_close(hidden[:, 0], expected[rows, at], "model", what=f"step {step}")
    np.testing.assert_array_equal(held.seen_B, lengths + T - B)


def test_a_ring_keeps_the_newest_tokens_in_whatever_order_they_come(one_device):
    """10 tokens for 6 slots: position p, which here is also its key, is kept at p modulo 6."""
    rules = sharding.whole()
    order = np.random.default_rng(0).permutation(10)
    positions = np.stack([order, order[::-1]]).astype(np.int32)
    at = Positions(positions, np.ones_like(positions))
    kv = np.broadcast_to(at.positions_BT[None, :, :, None, None], (2, 2, 10, 2, 8))
    held = kv_cache.create(SMALL, 2, 24, rules)
    (slot,) = held.write([NewKV(kv.astype(np.float32), -kv.astype(np.float32))], at, rules).slots
    newest = np.broadcast_to(np.array([6, 7, 8, 9, 4, 5])[:, None], (6, 8))
    np.testing.assert_array_equal(slot.positions_BS, [newest[:, 0]] * 2)
    np.testing.assert_array_equal(slot.k_LBKSH, np.broadcast_to(newest, (2, 2, 2, 6, 8)))
    np.testing.assert_array_equal(slot.v_LBKSH, np.broadcast_to(-newest, (2, 2, 2, 6, 8)))


def test_scan_equals_a_loop_over_layers(one_device):
    """Layer l takes slot l % 2 of the pattern; its weights are row l // 2 of the slot's stack."""
    model = create(CONFIG, sharding.whole())
    tokens, positions, segments = batch()

    @jax.jit
    def one_layer(block, x):
        cos_sin = rope.table(positions, block.attention.spec.rope, CONFIG.head_dim)
        return block(x, Positions(positions, segments), cos_sin, None)[0]

    x = model.embedding_VD[...][tokens]
    for layer in range(CONFIG.num_layers):
        row, slot = divmod(layer, 2)
        stacked = model.stages[0][slot] if layer < 4 else model.stages[1][0]
        block = jax.tree.map(lambda leaf, row=row % 2: leaf[row], stacked)
        assert block.attention.spec == CONFIG.pattern[slot]
        x = one_layer(block, x)
    expected = model.final_norm(x)
    assert_close(forward(model, tokens, positions, segments), expected, "model")


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        (dict(num_heads=6), (1, 2, 4), "model.num_heads=6 does not divide over mesh.model=4"),
        (dict(mlp_dim=30), (1, 2, 4), "model.mlp_dim=30 does not divide over mesh.model=4"),
        (dict(vocab_size=61), (2, 2, 2), "model.vocab_size=61 does not divide over mesh.model=2"),
        (
            dict(num_heads=12, num_kv_heads=6),
            (1, 2, 4),
            "model.num_kv_heads=6 and mesh.model=4: one must be a multiple of the other",
        ),
        (
            dict(embed_dim=20),
            (8, 1, 1),
            "model.embed_dim=20 does not divide over the 8 devices of mesh.data x mesh.seq",
        ),
    ],
)
def test_check_mesh_names_field_and_mesh(changes, sizes, message):
    config = dataclasses.replace(SMALL, **changes)
    with jax.set_mesh(make_mesh(sizes)), pytest.raises(UserError, match=message):
        transformer.abstract(config, sharding.training())


PLACES = {
    "embedding_VD": ("model", ("data", "seq")),
    "head_VD": ("model", ("data", "seq")),
    "q_DNH": (None, ("data", "seq"), "model", None),
    "k_DKH": (None, ("data", "seq"), "model", None),
    "v_DKH": (None, ("data", "seq"), "model", None),
    "o_NHD": (None, "model", None, ("data", "seq")),
    "up_DF": (None, ("data", "seq"), "model"),
    "gate_DF": (None, ("data", "seq"), "model"),
    "down_FD": (None, "model", ("data", "seq")),
}


def test_parameters_live_where_the_rules_say():
    config = dataclasses.replace(SMALL, tied_head=False, qk_norm=True)
    with jax.set_mesh(make_mesh((2, 2, 2))):
        leaves = transformer.create(config, sharding.training(), jax.random.key(0))
        leaves = tree.named_leaves(leaves)
        planned = tree.named_leaves(transformer.abstract(config, sharding.training()))
    kinds = set()
    for name, leaf in leaves.items():
        kind = name.split(".")[-1]
        kinds.add(kind)
        assert leaf.sharding.spec == planned[name].sharding.spec, name
        if kind in PLACES:
            assert leaf.sharding.spec == PartitionSpec(*PLACES[kind]), name
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size, name
        else:
            assert kind == "scale_D"
            assert leaf.sharding.is_fully_replicated, name
    assert set(PLACES) < kinds


def test_initial_values_do_not_depend_on_the_mesh():
    values = []
    for sizes in (ONE, (2, 2, 2)):
        with jax.set_mesh(make_mesh(sizes)):
            make = ParamInit(SMALL, sharding.training(), jax.random.key(0))
            values.append(make.normal(0, (16, 32), ("embed", "mlp"))[...])
    np.testing.assert_array_equal(*values)
    assert np.std(values[0]) == pytest.approx(SMALL.init_scale, rel=0.1)


def test_a_step_lowers_for_a_mesh_that_is_not_there():
    """256 devices of an abstract mesh: every sharding is right before a pod is booked."""
    mesh = AbstractMesh((16, 4, 4), sharding.AXES, axis_types=(AxisType.Explicit,) * 3)
    config = dataclasses.replace(CONFIG, embed_dim=64)
    with jax.sharding.use_abstract_mesh(mesh):
        rules = sharding.training()
        model = transformer.abstract(config, rules)
        place = jax.NamedSharding(mesh, rules("batch", "length"))
        args = [jax.ShapeDtypeStruct((32, T), jnp.int32, sharding=place)] * 3
        run = jax.jit(jax.grad(functools.partial(loss, remat="full")))
        text = run.trace(model, args).lower(lowering_platforms=("tpu",)).as_text()
    assert '["data"=16, "seq"=4, "model"=4]' in text
    assert "collective_permute" in text
