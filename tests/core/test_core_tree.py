"""Names of leaves are what checkpoints hold: they may not change by accident."""

import jax
import numpy as np
from conftest import make_mesh

from core import tree
from core.sharding import whole
from model import transformer
from model.attention.spec import full, sliding
from model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=16,
    context=8,
    num_layers=3,
    embed_dim=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    mlp_dim=8,
    pattern=(sliding(2), full()),
    norm="layer",
    qk_norm=True,
    tied_head=False,
)
BLOCK = [
    "attention.k_DKH",
    "attention.k_norm.bias_D",
    "attention.k_norm.scale_D",
    "attention.o_NHD",
    "attention.q_DNH",
    "attention.q_norm.bias_D",
    "attention.q_norm.scale_D",
    "attention.v_DKH",
    "attention_norm.bias_D",
    "attention_norm.scale_D",
    "mlp.down_FD",
    "mlp.gate_DF",
    "mlp.up_DF",
    "mlp_norm.bias_D",
    "mlp_norm.scale_D",
]


def test_names_of_a_model_are_stable():
    with jax.set_mesh(make_mesh((1, 1, 1))):
        leaves = tree.named_leaves(transformer.abstract(CONFIG, whole()))
    blocks = [f"stages.{at}.{name}" for at in ("0.0", "0.1", "1.0") for name in BLOCK]
    ends = ["embedding_VD", "head_VD", "final_norm.scale_D", "final_norm.bias_D"]
    assert sorted(leaves) == sorted(blocks + ends)
    assert leaves["stages.0.1.attention.q_DNH"].shape == (1, 4, 2, 2)


def test_with_leaves_is_the_inverse_of_named_leaves():
    original = {"a": [np.arange(3), {"b": np.ones(2)}], "c": np.zeros(())}
    leaves = tree.named_leaves(original)
    assert list(leaves) == ["a.0", "a.1.b", "c"]
    changed = tree.with_leaves(original, {name: x + 1 for name, x in leaves.items()})
    assert jax.tree.structure(changed) == jax.tree.structure(original)
    np.testing.assert_array_equal(changed["a"][1]["b"], [2, 2])
    np.testing.assert_array_equal(changed["a"][0], [1, 2, 3])


def test_sizes():
    leaves = [np.zeros((3, 4), np.float32), np.zeros(5, np.int8)]
    assert tree.num_elements(leaves) == 17
    assert tree.num_bytes(leaves) == 53
