"""model.flops against counting by hand, and against a mask counted token by token."""

import dataclasses

import pytest

from core import tree
from core.sharding import whole
from model import transformer
from model.attention.spec import full, sliding
from model.config import ModelConfig
from model.sizes import flops

# D=4, N=2, K=1, H=2, F=8, V=16; 3 layers: sliding, full, sliding.
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
)


def test_matrix_parameters_by_hand():
    q, k, v, o = 4 * 4, 4 * 2, 4 * 2, 4 * 4
    gate, up, down, head = 4 * 8, 4 * 8, 8 * 4, 16 * 4
    assert flops.matrix_parameters(CONFIG) == 3 * (q + k + v + o + gate + up + down) + head


@pytest.mark.parametrize("mlp", ["gated", "plain"])
def test_matrix_parameters_are_those_of_the_model(one_device, mlp):
    config = dataclasses.replace(CONFIG, mlp=mlp, tied_head=False)
    leaves = tree.named_leaves(transformer.abstract(config, whole()))
    matrices = {n: x.size for n, x in leaves.items() if "norm" not in n and "embedding" not in n}
    assert flops.matrix_parameters(config) == sum(matrices.values())


def test_training_flops_by_hand():
    # Rows of 4: token t sees t + 1 keys, at most 2 through the window: 10 / 4 and 7 / 4 on average.
    matrices = 6 * flops.matrix_parameters(CONFIG)
    seen = 12 * 2 * 2 * (10 / 4 + 7 / 4 + 7 / 4)
    dense = 12 * 2 * 2 * (4 + 4 + 4)
    count = flops.training_flops_per_token
    assert count(CONFIG, 4, "seen") == pytest.approx(matrices + seen)
    assert count(CONFIG, 4, "dense") == pytest.approx(matrices + dense)
