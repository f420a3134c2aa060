"""Who sees how far? Tiny models that find a value by its key, one for each kind of attention.

    python -m data.prepare --config=configs/long_context_lab.py:full
    python -m train.pretrain --config=configs/long_context_lab.py:full
    python -m evals.recall --config=configs/long_context_lab.py:full

The argument is full, sliding, sinks, moba or nsa; `:extended` goes on from runs/lab-full with YaRN
at four times the length. `make lab` does all of it and writes docs/long-context-lab.md.

Hardware: 2 CPU cores, 4 GiB.
Time: minutes a model.
Expected: `:full` finds 95% of the values at 1,024 tokens and 9% at 16,384; with YaRN, without
training, 100% and 95%; `:sliding` finds 26% at 1,024.
"""

from ml_collections import ConfigDict

from core.config import Experiment, UserError, editable
from core.sharding import MeshConfig
from data.config import DataConfig
from evals.config import BenchConfig, RecallConfig
from infer.config import DecodeConfig, ScoreConfig
from model.attention.spec import AttentionSpec, full, moba, nsa, sliding
from model.config import ModelConfig
from model.ops.rope import Rope
from train.config import TrainConfig

LENGTH, FACTOR = 1024, 16  # tokens that models are trained for, and times as many to ask at
BASE = 100_000.0  # with 10,000 a text of 1024 is too long after so few steps
# The second layer. In all models the first one sees two tokens: enough to tie a key to the value
# before it, and the same at every length, so that only the search for the key is put to the test.
SHORT = "short", "short-nsa"
KINDS = {
    "full": full(rope=Rope(BASE)),
    "sliding": sliding(256, rope=Rope(BASE)),
    "sinks": sliding(252, sinks=4, rope=Rope(BASE)),
    "moba": moba(16, 16, rope=Rope(BASE)),
    # Of sixteen tokens made one, the key is too small a part to be found: 62% at 1,024 with YaRN.
    "nsa": nsa(block=16, top=16, window=64, compress=4, step=2, rope=Rope(BASE)),
}


def get_config(arg: str = "") -> ConfigDict:
    """The experiment of one kind of attention; `:tiny` is full in seconds."""
    arg = arg or "full"
    if arg not in (*KINDS, *SHORT, "extended", "tiny"):
        raise UserError(
            f"configs/long_context_lab.py takes no argument {arg!r}; it has :tiny, :extended, "
            f"{', '.join(f':{name}' for name in (*KINDS, *SHORT))}"
        )
    config = editable(experiment(arg, KINDS.get(arg.removeprefix("short-"), KINDS["full"])))
    if arg in SHORT:
        short(config)
    elif arg != "tiny":
        goes_on(config, "short-nsa" if arg == "nsa" else "short")
    if arg in KINDS:
        config.recall.ropes = ("none", "yarn")
    if arg == "full":
        config.recall.ropes = ("none", "pi", "ntk", "dynamic", "yarn")
    if arg == "extended":
        extended(config)
    if arg == "tiny":
        tiny(config)
    return config


def experiment(name: str, kind: AttentionSpec) -> Experiment:
    """Two layers, the second of a kind, at the trained length."""
    return Experiment(
        name=f"lab-{name}",
        data=DataConfig(
            source="recall", recall_tokens=LENGTH - 2, limit_documents=2500, vocab_size=576
        ),
        model=ModelConfig(
            vocab_size=576,
            context=LENGTH,
            num_layers=2,
            embed_dim=64,
            num_heads=2,
            num_kv_heads=2,
            head_dim=64,
            mlp_dim=64,
            pattern=(sliding(2, rope=Rope(BASE)), kind),
            init_scale=0.1,
            dtype="float32",
        ),
        mesh=MeshConfig(),
        train=TrainConfig(
            steps=400,
            batch_size=4,
            length=LENGTH,
            learning_rate=5e-3,
            schedule="wsd",
            warmup=20,
            decay_fraction=0.3,
            weight_decay=0.0,
            beta2=0.99,
            log_every=25,
            eval_batches=8,
        ),
        decode=DecodeConfig(),
        score=ScoreConfig(),
        bench=BenchConfig(),
        recall=RecallConfig(
            lengths=tuple(LENGTH * 2**i for i in range(5)), factor=FACTOR, samples=16
        ),
    )


def short(config: ConfigDict) -> None:
    """Returns the first stage's length: an eighth, at which there is little to overlook."""
    config.model.context = LENGTH // 8
    config.data.update(recall_tokens=LENGTH // 8 - 2, limit_documents=15_000, recall_seed=1)
    config.train.update(length=LENGTH // 8, batch_size=32, steps=250)
    config.train.decay_fraction = 0.1
    config.recall.lengths = (LENGTH // 8,)


def goes_on(config: ConfigDict, name: str) -> None:
    """Continues from the first stage in the same words, on texts of the full length."""
    config.data.recall_shortest = config.data.recall_tokens // 2
    config.train.start = f"runs/lab-{name}"
    config.data.tokenizer = f"runs/lab-{name}/tokenizer"


def extended(config: ConfigDict) -> None:
    """A little training at four times the length, with RoPE for sixteen times."""
    rope = Rope(BASE, scaling="yarn", factor=FACTOR, original=LENGTH)
    config.model.update(context=4 * LENGTH, pattern=(sliding(2, rope=rope), full(rope=rope)))
    config.data.update(recall_tokens=4 * LENGTH - 2, recall_seed=2, limit_documents=500)
    goes_on(config, "full")
    config.train.update(length=4 * LENGTH, batch_size=1, steps=60)
    config.train.update(warmup=5, learning_rate=1e-3)


def tiny(config: ConfigDict) -> None:
    """Every size as small as it goes."""
    config.data.update(limit_documents=1500, recall_tokens=400, validation_fraction=0.2)
    config.model.update(context=256, embed_dim=32, head_dim=8, mlp_dim=32)
    config.train.update(steps=10, warmup=2, batch_size=8, length=64, save_every=5, log_every=1)
    config.decode.max_tokens = 16
    config.bench.update(contexts=(64, 128), prefill_chunk=64)
    config.recall.update(lengths=(128, 256), records=8, samples=2, prefill_chunk=64)
