"""The whole life of a small model on a laptop's CPU: offline, on the Python standard library.

    python -m data.prepare --config=configs/quickstart.py
    python -m train.pretrain --config=configs/quickstart.py
    python -m infer.decode --config=configs/quickstart.py
    python -m evals.bench --config=configs/quickstart.py

Hardware: 2 CPU cores, 4 GiB. Expected: 7 minutes in all, 1.964 bits per byte on the validation
documents of Python 3.11.7's library, where gzip -9 needs 2.202.
"""

from ml_collections import ConfigDict

from core.config import Experiment, UserError, editable
from core.sharding import MeshConfig
from data.config import DataConfig
from evals.config import BenchConfig
from infer.config import DecodeConfig, ScoreConfig
from model.attention.spec import full, sliding
from model.config import ModelConfig
from model.ops.rope import Rope
from train.config import TrainConfig


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; `:tiny` is the same in seconds."""
    config = editable(
        Experiment(
            name="quickstart",
            data=DataConfig(source="stdlib", vocab_size=4096),
            model=ModelConfig(
                vocab_size=4096,
                context=16384,
                num_layers=4,
                embed_dim=128,
                num_heads=2,
                num_kv_heads=1,
                head_dim=64,
                mlp_dim=352,
                pattern=(sliding(128), sliding(128), sliding(128), full(rope=Rope(100_000.0))),
                dtype="float32",  # CPUs multiply it faster than bfloat16
            ),
            mesh=MeshConfig(),
            train=TrainConfig(
                steps=1400,
                batch_size=4,
                length=512,
                learning_rate=6e-3,
                eval_every=700,
                save_every=350,
            ),
            decode=DecodeConfig(
                prompt="def read_lines(path):\n", max_tokens=160, temperature=0.7, top_p=0.95
            ),
            score=ScoreConfig(),
            bench=BenchConfig(contexts=(1024, 4096, 16384), loss_rows=2),
        )
    )
    if arg == "tiny":
        tiny(config)
    elif arg:
        raise UserError(f"configs/quickstart.py takes no argument {arg!r}; it has :tiny")
    return config


def tiny(config: ConfigDict) -> None:
    """Every size as small as it goes."""
    config.name, config.workdir = "quickstart-tiny", "runs/quickstart-tiny"
    config.data.update(limit_documents=40, vocab_size=512, validation_fraction=0.2)
    config.model.update(vocab_size=512, context=512, embed_dim=32, head_dim=8, mlp_dim=64)
    config.train.update(steps=10, warmup=2, batch_size=8, length=64, eval_every=0, save_every=5)
    config.train.log_every = 1
    config.decode.max_tokens = 16
    config.bench.update(contexts=(128,), prefill_chunk=64, repeats=1, decode_samples=1)
