"""model.describe against arrays that are really made, and programs that are really compiled."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from core import checkpoint, sharding, tree
from core.compile import hlo
from core.config import Experiment, to_json
from infer import load
from model import describe, transformer
from model.attention.spec import full, moba, nsa, sliding
from model.cache import kv_cache
from model.config import ModelConfig
from model.sizes import flops, memory, parts, weights
from model.sizes import table as describe_table
from train import optimizer, state
from train.config import TrainConfig

WITHIN = 0.02
CONFIG = ModelConfig(
    vocab_size=96,
    context=256,
    num_layers=5,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=80,
    pattern=(sliding(16, sinks=2), full()),
    attention_kernel="reference",
)
CASES = {
    "rings": CONFIG,
    "float32": dataclasses.replace(CONFIG, dtype="float32", tied_head=False, mlp="plain"),
    "bfloat16": dataclasses.replace(CONFIG, param_dtype="bfloat16", norm="layer", qk_norm=True),
    "chosen": dataclasses.replace(
        CONFIG, pattern=(moba(8, 3), nsa(8, 4, 16, 8, 4), full(sink_logit=True))
    ),
}


@pytest.fixture(params=CASES)
def config(request, one_device):
    return CASES[request.param]


@functools.cache
def made(config):
    return transformer.create(config, sharding.whole(), jax.random.key(0))


def nbytes(arrays):
    return sum(x.nbytes for x in jax.tree.leaves(arrays))


def test_parts_add_up_to_the_model(config):
    counted = parts.count(config)
    assert sum(part.total for part in counted.values()) == tree.num_elements(made(config))
    slots = [config.pattern[i % len(config.pattern)] for i in range(config.num_layers)]
    for name in ("attention q", "mlp", "other"):
        if name in counted:
            layers = counted[name].per_layer
            assert counted[name].total == sum(layers[config.pattern.index(s)] for s in slots)
    assert ("head" in counted) != config.tied_head


def test_names_end_in_their_dims(config):
    """What decides on matrices is read from the names."""
    for name, x in parts.shapes(config).items():
        dims = name.rpartition("_")[2]
        assert len(dims) == len(x.shape) - name.startswith("stages."), name
        assert ("D" in dims) >= (config.embed_dim in x.shape[-len(dims) :]), name


def test_parameters_that_other_models_have():
    names = {
        "positions_PD": "positions",
        "stages.0.1.attention.q_bias_NH": "biases",
        "stages.0.1.mlp.down_bias_D": "biases",
        "stages.0.1.attention_post_norm.scale_D": "norms",
        "stages.0.1.attention_norm.bias_D": "norms",
    }
    assert {name: parts.part(name) for name in names} == names


def test_what_is_added_or_looked_up_multiplies_nothing(monkeypatch):
    before = flops.matrix_parameters(CONFIG)
    more = {
        "positions_PD": (256, 32),
        "stages.0.0.attention.q_bias_NH": (3, 4, 16),
        "stages.0.0.mlp.up_bias_F": (3, 80),
        "stages.0.0.mlp_post_norm.scale_D": (3, 32),
    }
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in more.items()}
    everything = parts.shapes(CONFIG) | leaves
    monkeypatch.setattr(parts, "shapes", lambda config: everything)
    assert flops.matrix_parameters(CONFIG) == before
    assert parts.count(CONFIG)["positions"].total == 256 * 32


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_weights_are_what_decoding_holds(config, form):
    held = load.in_compute_dtype(made(config), dataclasses.replace(config, dtype=form))
    assert memory.weight_bytes(config, form, 128) == nbytes(held)


@pytest.mark.parametrize("kind, group", [("int8", None), ("int8", 8), ("int4", None), ("int4", 8)])
def test_rounded_weights_are_what_decoding_holds(config, kind, group):
    """As XLA counts the arguments of a program, and not as JAX does."""
    form = weights.rounding(config, sharding.whole(), kind, group)
    named = tree.named_leaves(made(config)).items()  # load.held gives a CPU the table twice
    held = {name: load.rounded_weight(name, x, config, form) for name, x in named}
    program = jax.jit(lambda model: 0, keep_unused=True).lower(held).compile()
    counted = program.memory_analysis().argument_size_in_bytes
    assert memory.weight_bytes(config, kind, group) == nbytes(held) == counted


@pytest.mark.parametrize("batch, length", [(1, 8), (3, 200)])
def test_cache_is_what_create_allocates(config, batch, length):
    arrays = kv_cache.create(config, batch, length, sharding.whole())
    kv, everything = memory.cache_bytes(config, batch, length, config.dtype)
    assert everything == nbytes(arrays)
    assert kv == kv_cache.kv_bytes(config, batch, length, sharding.whole())


def test_quantised_cache_by_hand():
    """Three rings of 18 tokens and two layers of all 200, K=2: vectors of 16 and a scale each."""
    vectors = 3 * 2 * 2 * (3 * 18 + 2 * 200)
    assert memory.cache_bytes(CONFIG, 3, 200, "int8")[0] == vectors * (16 + 2)
    assert memory.cache_bytes(CONFIG, 3, 200, "int4")[0] == vectors * (8 + 2)
    assert memory.token_bytes(CONFIG, "int4") == 5 * 2 * 2 * 10
    assert memory.token_bytes(CONFIG, "bfloat16") == 5 * 2 * 2 * 16 * 2


def test_training_state_is_what_train_allocates(config):
    names = tree.named_leaves(made(config))
    fresh = state.create(config, sharding.whole(), optimizer.make(TrainConfig(), names), seed=0)
    grads = jax.eval_shape(
        jax.grad(lambda model: model(*[jnp.ones((1, 32), jnp.int32)] * 3)[0].sum()), fresh.model
    )
    found = memory.state_bytes(config)
    assert found.parameters == nbytes(fresh.model)
    assert found.gradients == tree.num_bytes(grads)
    assert found.moments == pytest.approx(nbytes(fresh.opt_state), rel=WITHIN)


def compiled_flops(config, step, *args):
    abstract = transformer.abstract(config, sharding.whole())
    text = jax.jit(step).lower(abstract, *args).compile().as_text()
    program = hlo.count(text, "nothing")
    return program.flops + program.loop_flops  # a loop over tiles makes one trip here


@pytest.mark.parametrize("name", ["rings", "float32"])
def test_forward_flops_are_those_of_the_compiled_program(one_device, name):
    """The reference kernel computes every score: all keys."""
    config, tokens_BT = CASES[name], jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def forward(model, tokens_BT):
        return model.logits(model(tokens_BT, tokens_BT, tokens_BT)[0])

    a_token = flops.forward_flops_per_token(config, 128, "dense")
    assert compiled_flops(config, forward, tokens_BT) == pytest.approx(256 * a_token, rel=WITHIN)


def test_forward_flops_are_those_that_xla_counts(one_device):
    """One layer, which XLA counts whole; wide, so that all but products is little."""
    wide = dict(embed_dim=512, head_dim=128, mlp_dim=2048, num_layers=1, pattern=(full(),))
    config = dataclasses.replace(CONFIG, **wide, dtype="float32")  # else each cast is a FLOP
    tokens_BT = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    abstract = transformer.abstract(config, sharding.whole())
    step = jax.jit(lambda model, x_BT: model.logits(model(x_BT, x_BT, x_BT)[0]))
    counted = step.lower(abstract, tokens_BT).compile().cost_analysis()["flops"]
    a_token = flops.forward_flops_per_token(config, 64, "dense")
    assert counted == pytest.approx(64 * a_token, rel=WITHIN)


def test_decode_flops_are_those_of_a_step_over_the_cache(one_device):
    """Full attention over a cache of 99 tokens, which is one tile, and the new one."""
    config = dataclasses.replace(CONFIG, pattern=(full(),))
    held = jax.eval_shape(lambda: kv_cache.create(config, 2, 99, sharding.whole()))

    def decode(model, held, token_BT):
        hidden_BTD, held = model(token_BT, token_BT, token_BT, held)
        return model.logits(hidden_BTD), held

    counted = compiled_flops(config, decode, held, jax.ShapeDtypeStruct((2, 1), jnp.int32))
    for convention in ("seen", "dense"):
        a_token = flops.decode_flops_per_token(config, 100, convention)
        assert counted == pytest.approx(2 * a_token, rel=WITHIN)


def test_training_flops_are_three_forwards_and_windows_are_seen():
    count = flops.training_flops_per_token
    for convention in ("seen", "dense"):
        forward = flops.forward_flops_per_token(CONFIG, 64, convention)
        assert count(CONFIG, 64, convention) == 3 * forward
    assert flops.decode_flops_per_token(CONFIG, 200, "seen") == (
        2 * flops.matrix_parameters(CONFIG) + 4 * 4 * 16 * (3 * (16 + 2) + 2 * 200)
    )


def temporaries(config, remat, tokens):
    """Bytes that XLA allocates beside the arguments and results of a gradient."""
    at = [jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 3
    gradient = jax.grad(lambda model, *at: model(*at, remat=remat)[0].sum())
    lowered = jax.jit(gradient).lower(transformer.abstract(config, sharding.whole()), *at)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("remat", ["attention", "dots", "none"])
def test_activations_kept_are_those_that_xla_allocates(one_device, remat):
    """Beyond remat="full", whose own by hand: inputs of 16 layers, final norm, RoPE."""
    plain = dict(num_layers=16, pattern=(full(),), attention_kernel="chunked")
    config = dataclasses.replace(CASES["float32"], **plain)
    full_bytes = memory.kept_bytes(config, "full").device
    assert full_bytes == pytest.approx(4 * (16 * 32 + 3 * 32 + 2 * 8), rel=WITHIN)
    more = memory.kept_bytes(config, remat).device - full_bytes
    allocated = temporaries(config, remat, 512) - temporaries(config, "full", 512)
    assert allocated == pytest.approx(512 * more, rel=WITHIN)


def test_what_is_offloaded_is_on_the_host():
    kept = {remat: memory.kept_bytes(CONFIG, remat) for remat in ("attention", "offload", "full")}
    both = kept["offload"]
    assert both.device + both.host == kept["attention"].device
    assert both.device < kept["full"].device and kept["full"].host == 0


HUGE = ModelConfig(  # Llama 3 405B (arXiv 2407.21783, table 3)
    vocab_size=128_256,
    context=131_072,
    num_layers=126,
    embed_dim=16_384,
    num_heads=128,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=53_248,
    tied_head=False,
)


@pytest.fixture
def bundle(tmp_path):
    """A bundle with no weights yet."""
    checkpoint.create(tmp_path / "huge", to_json(Experiment("huge", model=HUGE)), None)
    return tmp_path / "huge"


def test_a_large_model_from_its_bundle_makes_no_array(bundle):
    """Nor does a backend start: JAX refuses another number of devices after that."""
    code = "import jax; from model import describe; describe.run(); "
    code += "jax.config.update('jax_num_cpu_devices', 3)"
    argv = [sys.executable, "-c", code, f"--bundle={bundle}", "--json"]
    found = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    assert found["parameters"]["total"] == 405_853_388_800
    assert found["weight_bytes"]["bfloat16"] == pytest.approx(2 * 405_853_388_800, rel=1e-4)
    rows = found["decode"]
    assert {row["context"] for row in rows} == {2**10, 2**12, 2**14, 2**16, 2**17, 2**18, 2**20}
    longest = rows[-1]
    assert (longest["context"], longest["cache"]) == (2**20, "int4")
    assert longest["total_bytes"]["int4"] == longest["cache_bytes"] + found["weight_bytes"]["int4"]


def test_tables_hold_the_figures(bundle, capsys):
    describe.main([f"--bundle={bundle}", "--contexts=4096", "--batches=1,8"])
    out = capsys.readouterr().out
    assert "405,853,388,800" in out and "…" not in out
    kv = 2 * 126 * 8 * 128 * 2 * 4096  # 2.11 GB
    assert describe_table.size(kv) == "2.11 GB" and "2.11 GB" in out and "16.9 GB" in out
    assert [describe_table.size(n) for n in (0, 7, 999, 1000, 12_345)] == [
        "0 B", "7 B", "999 B", "1.00 kB", "12.3 kB",
    ]  # fmt: skip


def test_a_config_with_its_overrides(capsys):
    argv = ["--config=configs/quickstart.py", "--config.model.num_layers=8", "--contexts=512"]
    found = describe.main([*argv, "--cache=int8", "--weights=int4", "--group=32", "--json"])
    capsys.readouterr()
    assert found["model"]["num_layers"] == 8 and found["quantisation"]["weights_group"] == {
        "int4": 32
    }
    assert [row["cache"] for row in found["decode"]] == ["int8"]
    assert list(found["weight_bytes"]) == ["int4"]


@pytest.mark.parametrize(
    "argv, parts_of_message",
    [
        ([], ["--config=FILE", "--bundle=DIR"]),
        (["--bundle=nowhere"], ["nowhere", "config.json"]),
        (["--config=configs/quickstart.py", "--bundle=x"], ["one of the two"]),
        (["--config=configs/quickstart.py", "--context=5"], ["--contexts?"]),
        (["--config=configs/quickstart.py", "--contexts=0"], ["contexts=(0,)", ">= 1"]),
        (
            ["--config=configs/quickstart.py", "--group=64"],
            ["64", "352 inputs", "mlp.down_FD", "32"],
        ),
        (["--config=configs/quickstart.py", "--cache=int3"], ["'int3'", "'int4'"]),
        (["--config=configs/quickstart.py", "--weights=()"], ["weights=()"]),
        (["7B"], ["7B", "--name=value"]),
        (["--bundle="], ["--bundle is empty"]),
        (["--bundle=a", "--bundle=b"], ["given 2 times: a, b"]),
        (["--bundles=a"], ["--bundles is not a field"]),
        (["--config=configs/quickstart.py", "--contexts"], ["--contexts has no value"]),
        (["--config=configs/quickstart.py", "--contexts=1e30"], ["contexts[0]=1e+30 is beyond"]),
        (["--config=configs/quickstart.py", "--group=1", "--group=2"], ["--group is given twice"]),
    ],
)
def test_mistake_is_one_message(argv, parts_of_message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["model.describe", *argv])
    with pytest.raises(SystemExit) as stop:
        describe.run()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    for part in parts_of_message:
        assert part in err
