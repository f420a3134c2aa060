"""One step is the same on every mesh and however it is cut up; every TrainConfig field counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases
from conftest import MESHES, make_mesh
from tolerances import assert_close
from train_cases import MODEL, TRAIN

from core import sharding, tree
from core.config import UserError
from data.loader import train_batches
from data.store import TokenStore
from model import transformer
from model.attention.spec import full
from train import optimizer, pretrain, state, step
from train.config import OPERATIONAL, TrainConfig

# Adam divides by the root of the mean square: where a gradient is all rounding, an epsilon above
# it keeps the update from being so too.
STEADY = dataclasses.replace(TRAIN, epsilon=1e-3, z_loss=1e-3)
SHALLOW = dataclasses.replace(MODEL, num_layers=1, pattern=(full(),))


def steps(sizes, config=STEADY, seeds=(0, 1), model=MODEL, **rules):
    """(metrics of each step, {name: array} of the state after them); batches have these seeds."""
    with jax.set_mesh(make_mesh(sizes)):
        current, train_step, rules = train_cases.begin(config, model, **rules)
        found = []
        for seed in seeds:
            current, metrics = train_step(current, train_cases.batch(rules, seed=seed))
            found.append({name: float(value) for name, value in metrics.items()})
        assert int(current.step) == len(seeds)
        leaves = tree.named_leaves((current.model, current.opt_state))
        return found, {name: np.asarray(leaf) for name, leaf in leaves.items()}


@pytest.fixture(scope="module")
def plain():
    """Two steps on one device, all at once."""
    return steps((1, 1, 1))


def assert_same(actual, expected):
    for found, wanted in zip(actual[0], expected[0], strict=True):
        assert found == pytest.approx(wanted, rel=2e-5)
    assert actual[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        assert_close(actual[1][name], wanted, "train", what=name)


def test_the_step_moves_everything(plain):
    """Else the tests below would compare what never changed."""
    (first, second), leaves = plain
    assert first["loss"] == pytest.approx(np.log(MODEL.vocab_size), rel=0.02)
    assert first["loss"] != second["loss"] and first["grad_norm"] > 0.1
    assert first["tokens"] < 8 * 32, "the batch has targets without weight"
    with jax.set_mesh(make_mesh((1, 1, 1))):
        fresh, _, _ = train_cases.begin(STEADY)
        before = tree.named_leaves((fresh.model, fresh.opt_state))
        for name, leaf in before.items():
            assert np.abs(np.asarray(leaf) - leaves[name]).max() > 0, name


@pytest.mark.parametrize("sizes", MESHES[1:])
def test_equal_on_every_mesh(plain, sizes):
    assert_same(steps(sizes), plain)


def test_equal_in_another_order_around_a_ring_of_groups(plain):
    rules = dict(strategy="ring", ulysses=2, layout="zigzag")
    assert_same(steps((1, 4, 2), **rules), plain)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_accumulation_changes_nothing(plain, sizes):
    assert_same(steps(sizes, dataclasses.replace(STEADY, accumulation=4)), plain)


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_remat_changes_nothing(plain, remat):
    assert_same(steps((1, 1, 1), dataclasses.replace(STEADY, remat=remat)), plain)


def test_parameters_stay_where_the_rules_put_them():
    with jax.set_mesh(make_mesh((2, 2, 2))):
        current, train_step, rules = train_cases.begin(STEADY)
        before = {k: x.sharding for k, x in tree.named_leaves(current).items()}
        current, _ = train_step(current, train_cases.batch(rules))
        after = tree.named_leaves(current)
        for name, leaf in after.items():
            assert leaf.sharding.is_equivalent_to(before[name], leaf.ndim), name
        assert not after["model.embedding_VD"].sharding.is_fully_replicated
        moments = [n for n in after if "opt_state" in n and n.endswith("embedding_VD")]
        assert len(moments) == 2
        for name in moments:
            assert not after[name].sharding.is_fully_replicated, name


def test_state_is_donated(one_device):
    current, train_step, rules = train_cases.begin(STEADY)
    train_step(current, train_cases.batch(rules))
    kept = [n for n, x in tree.named_leaves(current).items() if x.ndim and not x.is_deleted()]
    assert not kept, f"these are held twice: {kept}"


def test_bfloat16_compute(plain):
    """Parameters and loss stay float32; the loss is that of float32, less rounding."""
    found, leaves = steps((1, 1, 1), model=dataclasses.replace(MODEL, dtype="bfloat16"))
    assert all(x.dtype == np.float32 for x in leaves.values() if x.ndim)
    for actual, wanted in zip(found, plain[0], strict=True):
        assert actual["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
        assert actual["loss"] != wanted["loss"], "nothing was computed in bfloat16"
        assert actual["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2e-2)


def test_frozen_parameters_stay(one_device):
    """Nor do they count in `grad_norm`: it is the norm of what Adam is given."""
    config = dataclasses.replace(STEADY, freeze=("embedding_VD",), clip=0.0)
    current, train_step, rules = train_cases.begin(config)
    before = {n: np.asarray(x) for n, x in tree.named_leaves(current.model).items()}
    current, metrics = train_step(current, train_cases.batch(rules))
    for name, leaf in tree.named_leaves(current.model).items():
        assert np.array_equal(before[name], leaf) == (name == "embedding_VD"), name
    state = tree.named_leaves(current.opt_state)
    means = [np.asarray(leaf) / (1 - config.beta1) for name, leaf in state.items() if ".mu" in name]
    norm = np.sqrt(sum(np.square(mean, dtype=np.float64).sum() for mean in means))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_eval_step_is_the_loss_before_the_step(plain):
    with jax.set_mesh(make_mesh((1, 1, 1))):
        fresh, _, rules = train_cases.begin(STEADY)
        nll, tokens = step.eval_step(fresh.model, train_cases.batch(rules))
    assert float(tokens) == plain[0][0]["tokens"]
    assert float(nll / tokens) == pytest.approx(plain[0][0]["loss"], rel=1e-5)


def test_batch_without_a_target_is_no_division_by_zero(one_device):
    current, train_step, rules = train_cases.begin(STEADY)
    batch = train_cases.batch(rules)
    batch = dataclasses.replace(batch, weights=batch.weights * 0)
    _, metrics = train_step(current, batch)
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0


GOLDEN = [5.738008, 5.699428, 5.624756, 5.530037, 5.457292]


def test_golden_losses():
    """Five steps on one batch; a change of any number on the way shows here."""
    found, _ = steps((1, 1, 1), seeds=(0,) * 5)
    losses = [round(metrics["loss"], 6) for metrics in found]
    np.testing.assert_allclose(
        losses,
        GOLDEN,
        rtol=1e-4,
        err_msg=f"""
The losses of a tiny model changed. Did you mean to change numbers: the initial weights, the
model, the loss, the optimizer? Then set GOLDEN = {losses}
and say in the commit why they moved. If you meant a refactor, it is not one. If only JAX was
updated, find out which of the two it is before you touch the table.""",
    )


# Every TrainConfig field, the value to flip it to, and where the flip must show.
PROGRAM = dict(
    steps=20,
    batch_size=16,
    length=16,
    accumulation=2,
    learning_rate=1e-3,
    schedule="wsd",
    warmup=3,
    final_fraction=0.5,
    beta1=0.8,
    beta2=0.9,
    epsilon=1e-6,
    weight_decay=0.2,
    clip=0.5,
    z_loss=1e-3,
    freeze=("embedding_VD",),
    remat="full",
)
ONLY_WITH = dict(decay_fraction=("schedule", "wsd"))  # fields that another field switches on
LOOP = dict(log_every=3, eval_every=6, eval_batches=1, save_every=6, keep=1, overwrite=True)
ELSEWHERE = {"seed", "decay", "no_decay", "start", "start_step", "data_changed", *ONLY_WITH}


def test_every_field_is_flipped_somewhere():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert {*PROGRAM, *LOOP} | ELSEWHERE == fields
    assert set(OPERATIONAL) <= LOOP.keys() | ELSEWHERE
    for name, value in (PROGRAM | LOOP).items():
        assert getattr(TRAIN, name) != value, f"{name} is not flipped"


def program(config):
    """The text of the lowered train step, constants included."""
    rules = sharding.training()
    rule = optimizer.make(config, tree.named_leaves(transformer.abstract(SHALLOW, rules)))
    batch = train_cases.batch(rules, config.batch_size, config.length)
    abstract = state.abstract(SHALLOW, rules, rule)
    return step.make_train_step(config, rule, rules).lower(abstract, batch).as_text()


@pytest.fixture(scope="module")
def base_program():
    with jax.set_mesh(make_mesh((1, 1, 1))):
        assert program(TRAIN) == program(TRAIN), "lowering is not deterministic"
        return program(TRAIN)


@pytest.mark.parametrize("name", PROGRAM)
def test_field_changes_the_program(one_device, base_program, name):
    flipped = dataclasses.replace(TRAIN, **{name: PROGRAM[name]})
    assert program(flipped) != base_program, f"train.{name} is not read"


def test_decay_fraction_changes_the_program(one_device):
    wsd = dataclasses.replace(TRAIN, schedule="wsd")
    assert program(wsd) != program(dataclasses.replace(wsd, decay_fraction=0.5))


def test_groups_change_the_program(one_device, base_program):
    """A parameter that changes its group needs both fields."""
    norm, *_ = TRAIN.no_decay
    moved = dataclasses.replace(TRAIN, decay=(*TRAIN.decay, norm), no_decay=())
    assert program(moved) != base_program
    for field in ("decay", "no_decay"):
        with pytest.raises(UserError, match=r"matches neither train\.decay nor train\.no_decay"):
            program(dataclasses.replace(TRAIN, **{field: ()}))


def test_seed_changes_weights_and_data(one_device, prepared):
    other = dataclasses.replace(TRAIN, seed=1)
    rules = sharding.training()
    rule = optimizer.make(TRAIN, tree.named_leaves(transformer.abstract(MODEL, rules)))
    here, there = (state.create(MODEL, rules, rule, c.seed) for c in (TRAIN, other))
    assert (here.model.embedding_VD[...] != there.model.embedding_VD[...]).all()
    store = TokenStore(prepared / "data", "train")
    first, second = (next(train_batches(store, 8, 32, c.seed)) for c in (TRAIN, other))
    assert (first.tokens != second.tokens).any()


def loop(workdir, monkeypatch, seen=None, **fields):
    """What a run does from outside: the rows it logs, evaluates and saves; no real training.

    `seen` gets the highest position of each batch.
    """
    evaluated, seen = [], [] if seen is None else seen

    def fake_step(config, rule, rules):
        names = ("loss", "grad_norm", "learning_rate", "tokens", "tokens_read")
        metrics = {name: jnp.float32(1) for name in names}

        def step(current, batch):
            seen.append(int(batch.positions.max()))
            return current, metrics

        return step

    def fake_evaluate(model, batches, feed, text_bytes, limit):
        evaluated.append(limit)
        seen.extend(int(batch.positions.max()) for batch in batches)
        return {"eval_loss": 1.0, "bits_per_byte": 1.0}

    monkeypatch.setattr(pretrain, "make_train_step", fake_step)
    monkeypatch.setattr(pretrain, "evaluate", fake_evaluate)
    pretrain.main(train_cases.experiment(workdir, **fields))
    saved = sorted(int(path.name) for path in workdir.iterdir() if path.name.isdecimal())
    logged = list(train_cases.rows(workdir))
    return logged, list(train_cases.rows(workdir, "eval_loss")), set(evaluated), saved


def test_fields_of_the_loop(tmp_path, monkeypatch, prepared):
    def run(name, **fields):
        workdir = train_cases.copy(prepared, tmp_path / name)
        return loop(workdir, monkeypatch, **fields)

    every = list(range(1, 13))
    assert run("base") == (every, [12], {3}, [4, 8, 12])
    assert run("log", log_every=LOOP["log_every"]) == ([3, 6, 9, 12], [12], {3}, [4, 8, 12])
    assert run("log last", log_every=5) == ([5, 10, 12], [12], {3}, [4, 8, 12])
    assert run("eval", eval_every=LOOP["eval_every"]) == (every, [6, 12], {3}, [4, 8, 12])
    assert run("some", eval_batches=LOOP["eval_batches"]) == (every, [12], {1}, [4, 8, 12])
    assert run("save", save_every=LOOP["save_every"]) == (every, [12], {3}, [6, 12])
    assert run("end", save_every=0) == (every, [12], {3}, [12])
    assert run("keep", keep=LOOP["keep"]) == (every, [12], {3}, [12])


@pytest.mark.parametrize("learned", [False, True])
def test_learned_positions_are_of_the_table(tmp_path, monkeypatch, prepared, learned):
    """Texts are longer than a row of 32: JAX would take the last of 32 vectors beyond it."""
    workdir, seen = train_cases.copy(prepared, tmp_path / "run"), []
    model = dict(learned_positions=learned, context=32)
    loop(workdir, monkeypatch, seen, model=model)
    assert len(seen) > 12 and (max(seen) == 31) == learned


def test_steps_of_older_versions_are_of_another_order():
    """Their epochs had one row less, and say nothing of their data."""
    with pytest.raises(UserError, match="step 4 was trained on: an older version made that step"):
        pretrain.run.check_data(4, None, {"train": "a"}, changed=False)
    pretrain.run.check_data(4, None, {"train": "a"}, changed=True)


def test_overwrite_starts_again(tmp_path, monkeypatch, prepared):
    workdir = train_cases.copy(prepared, tmp_path / "run")
    loop(workdir, monkeypatch)
    assert loop(workdir, monkeypatch)[2] == set(), "a finished run has nothing to do"
    assert loop(workdir, monkeypatch, overwrite=True)[2] == {3}
