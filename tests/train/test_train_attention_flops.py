"""train.attention_flops against pairs counted one by one."""

import dataclasses

import numpy as np
import pytest
import train_cases

from model.attention.spec import full, sliding
from train.attention_flops import busiest_device


@pytest.mark.parametrize("spec", [full(), sliding(8)], ids=lambda s: s.kind)
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 4, 2)], ids=str)
@pytest.mark.parametrize(("remat", "passes"), [("none", 14), ("attention", 14), ("full", 18)])
def test_pairs_of_the_last_shard(spec, mesh, remat, passes):
    model = dataclasses.replace(train_cases.MODEL, pattern=(spec,), attention_kernel="auto")
    train = dataclasses.replace(train_cases.TRAIN, remat=remat)
    data, seq, heads = mesh
    q, k = np.indices((train.length, train.length))
    seen = (k <= q) & (q - k < (spec.window or train.length))
    pairs = seen[train.length - train.length // seq :].sum()
    width = model.num_layers * model.num_heads * model.head_dim / heads
    expected = passes * width * train.batch_size / data * pairs
    in_order = np.arange(train.length)
    assert busiest_device(model, train, mesh, in_order) == pytest.approx(expected)
