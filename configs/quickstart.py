"""The whole life of a small model on a laptop's CPU, offline, on the Python standard library.

python -m data.prepare --config=configs/quickstart.py
python -m train.pretrain --config=configs/quickstart.py
python -m infer.decode --config=configs/quickstart.py
python -m infer.bench --config=configs/quickstart.py
"""

from core.config import Experiment, editable
from core.sharding import MeshConfig
from data.config import DataConfig
from infer.config import BenchConfig, DecodeConfig, ScoreConfig
from model.attention.spec import full, sliding
from model.config import ModelConfig
from train.config import TrainConfig


def get_config(arg: str = ""):
    """`:tiny` is the same in seconds."""
    config = editable(
        Experiment(
            name="quickstart",
            data=DataConfig(source="stdlib", vocab_size=4096, validation_fraction=0.02),
            model=ModelConfig(
                vocab_size=4096,
                context=16384,
                num_layers=4,
                embed_dim=256,
                num_heads=4,
                num_kv_heads=2,
                head_dim=64,
                mlp_dim=704,
                pattern=(sliding(128), sliding(128), sliding(128), full(rope_base=100_000.0)),
                dtype="float32",  # CPUs are slower in bfloat16
            ),
            mesh=MeshConfig(),
            train=TrainConfig(steps=300, batch_size=8, length=512, save_every=100),
            decode=DecodeConfig(prompt="def ", max_tokens=200, temperature=0.8, top_p=0.95),
            score=ScoreConfig(),
            bench=BenchConfig(),
        )
    )
    return config
