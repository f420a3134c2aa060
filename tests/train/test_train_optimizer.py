"""Schedules at their corners, groups that cover every parameter, and what each group does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_cases import MODEL, TRAIN

from core import sharding, tree
from core.config import UserError
from model import transformer
from model.attention.spec import full, nsa
from train import optimizer
from train.config import TrainConfig

PEAK = 1e-2
NAMES = ("embedding_VD", "stages.0.0.attention.q_DNH", "stages.0.0.mlp_norm.scale_D")


def rates(steps, **fields):
    config = TrainConfig(steps=1000, learning_rate=PEAK, warmup=100, **fields)
    rate = optimizer.schedule(config)
    return [float(rate(step)) / PEAK for step in steps]


def test_cosine():
    found = rates([0, 50, 100, 550, 1000, 5000], schedule="cosine", final_fraction=0.2)
    # Step 0 learns already: 1 / 101. Halfway between 1 and 0.2 in the middle; it stays at its end.
    assert found == pytest.approx([1 / 101, 51 / 101, 1, 0.6, 0.2, 0.2], rel=1e-4)


def test_wsd():
    found = rates(
        [0, 100, 500, 749, 750, 875, 1000, 5000],
        schedule="wsd",
        final_fraction=0.2,
        decay_fraction=0.25,
    )
    assert found == pytest.approx([1 / 101, 1, 1, 1, 1, 0.6, 0.2, 0.2], rel=1e-4)


def test_wsd_that_only_falls():
    """A fall longer than what the warmup leaves begins right after it."""
    found = rates([100, 550, 1000], schedule="wsd", final_fraction=0.0, decay_fraction=1.0)
    assert found == pytest.approx([1, 0.5, 0], abs=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_no_warmup_starts_at_the_peak(schedule):
    rate = optimizer.schedule(
        TrainConfig(steps=10, learning_rate=PEAK, warmup=0, schedule=schedule)
    )
    assert float(rate(0)) == pytest.approx(PEAK)
    assert float(rate(10)) == pytest.approx(PEAK * 0.1)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("tied", [True, False])
def test_default_groups_cover_every_model(one_device, norm, tied):
    """Matrices decay; norms, sinks and weights of a place in a block do not."""
    pattern = full(sink_logit=True), nsa()
    config = dataclasses.replace(
        MODEL, norm=norm, tied_head=tied, qk_norm=True, num_layers=2, pattern=pattern
    )
    names = tree.named_leaves(transformer.abstract(config, sharding.training()))
    found = optimizer.groups(TRAIN, names)
    assert found.keys() == names.keys()
    for name, group in found.items():
        kept = any(part in name for part in ("norm", "sink", "place"))
        assert group == ("no_decay" if kept else "decay"), name


def test_uncovered_parameter_is_named():
    with pytest.raises(UserError, match=r"router\.w_DE matches neither train\.decay nor"):
        optimizer.groups(TRAIN, [*NAMES, "stages.0.0.router.w_DE"])


def test_doubly_covered_parameter_is_named():
    config = TrainConfig(no_decay=(r"\w*norm\.\w+", "embedding_VD"))
    with pytest.raises(UserError, match="embedding_VD matches decay and no_decay"):
        optimizer.groups(config, NAMES)


def test_freeze_that_matches_nothing_is_named():
    with pytest.raises(UserError, match=r"train\.freeze: 'embeding_VD' matches none of .*q_DNH"):
        optimizer.groups(TrainConfig(freeze=("embeding_VD",)), NAMES)


def test_patterns_match_whole_parts():
    """`q_DNH` is not the end of `seq_DNH`, and a part may not be left over at the end."""
    config = TrainConfig(decay=("q_DNH",), no_decay=("a.*",), freeze=())
    assert optimizer.groups(config, ["b.q_DNH"]) == {"b.q_DNH": "decay"}
    for name in ("b.seq_DNH", "b.q_DNH.more"):
        with pytest.raises(UserError, match=name):
            optimizer.groups(config, [name])


def update(grads, parameters=None, **fields):
    """(updates, state, initial state) of one step at the peak rate."""
    config = TrainConfig(steps=10, warmup=0, learning_rate=PEAK, **fields)
    parameters = parameters or {name: jnp.full((4,), 2.0) for name in NAMES}
    rule = optimizer.make(config, parameters)
    first = rule.init(parameters)
    updates, state = rule.update(grads, first, parameters)
    return updates, state, first


def test_decay_only_where_told():
    """With no gradient only weight decay moves a parameter."""
    zeros = {name: jnp.zeros(4) for name in NAMES}
    updates, _, _ = update(zeros, weight_decay=0.1)
    np.testing.assert_allclose(updates[NAMES[0]], -PEAK * 0.1 * 2, rtol=1e-6)
    np.testing.assert_allclose(updates[NAMES[1]], -PEAK * 0.1 * 2, rtol=1e-6)
    np.testing.assert_array_equal(updates[NAMES[2]], 0)


def test_first_step_is_adam():
    """Bias-corrected, the first step has the rate's size, whatever the gradient's."""
    grads = {name: jnp.array([3.0, -3.0, 1e-3, -1e-3]) for name in NAMES}
    updates, _, _ = update(grads, weight_decay=0.0, clip=0.0)
    for name in NAMES:
        np.testing.assert_allclose(updates[name], PEAK * np.array([-1, 1, -1, 1]), rtol=1e-4)


def test_frozen_have_no_update_and_no_state():
    grads = {name: jnp.ones(4) for name in NAMES}
    updates, state, _ = update(grads, freeze=(r"attention\.\w+",))
    np.testing.assert_array_equal(updates[NAMES[1]], 0)
    assert np.abs(updates[NAMES[0]]).min() > 0 and np.abs(updates[NAMES[2]]).min() > 0
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]
    assert len(moments) == 2 * 2, "mean and square of the two that move"
    _, state, _ = update(grads)
    assert len([leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4,)]) == 2 * 3


def adam_mean(grads, **fields):
    """What Adam keeps of the first gradient: (1 - beta1) times what it was given."""
    _, state, _ = update(grads, beta1=0.5, **fields)
    found = {}
    for path, leaf in tree.named_leaves(state).items():
        for name in NAMES:
            if ".mu" in path and path.endswith(name):
                found[name] = np.asarray(leaf) / 0.5
    return found


def test_clip_bounds_the_global_norm():
    grads = {name: jnp.full((4,), 3.0) for name in NAMES}
    clipped = adam_mean(grads, clip=0.25)
    assert float(optax.global_norm(clipped)) == pytest.approx(0.25, rel=1e-5)
    free = adam_mean(grads, clip=0.0)
    np.testing.assert_allclose(free[NAMES[0]], 3.0)
    small = adam_mean({name: jnp.full((4,), 0.01) for name in NAMES}, clip=0.25)
    np.testing.assert_allclose(small[NAMES[0]], 0.01, rtol=1e-6)


def test_clip_counts_what_moves():
    """A frozen parameter's gradient takes no part in the norm."""
    grads = {name: jnp.full((4,), 3.0) for name in NAMES} | {NAMES[1]: jnp.full((4,), 1e6)}
    clipped = adam_mean(grads, clip=0.25, freeze=(r"attention\.\w+",))
    assert float(optax.global_norm(clipped)) == pytest.approx(0.25, rel=1e-5)
