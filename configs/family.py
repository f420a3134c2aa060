"""A published size of GPT-2, LLaMA, Mistral, Qwen, Falcon or Gemma: to plan with, or to train.

    python -m model.describe --config=configs/family.py:llama-2-7b
    python -m train.aot --config=configs/family.py:llama-3.2-1b --config.aot.topology=v5e:2x4
    python -m train.pretrain --config=configs/family.py:gpt2-124m

The argument is a name in model/families (PRESETS), gpt2-124m by default; a wrong one lists them.
Weights are random: python -m model.convert brings published ones, and configs/finetune.py goes on
from those.

Hardware: for describe and aot a laptop. Expected: model.describe answers in seconds.
"""

import dataclasses

from ml_collections import ConfigDict

from core.config import Experiment, UserError, editable
from core.sharding import MeshConfig
from data.config import DataConfig
from evals.config import BenchConfig
from infer.config import DecodeConfig, ScoreConfig
from model import families
from model.config import ModelConfig
from train.config import AotConfig, TrainConfig


def get_config(arg: str = "") -> ConfigDict:
    """The experiment of the size `arg`; `:tiny` is the smallest one's in seconds, on a CPU."""
    if arg == "tiny":
        return tiny()
    arg = arg or "gpt2-124m"
    if arg not in families.PRESETS:
        raise UserError(
            f"configs/family.py:{arg} is no published size; there are :tiny, "
            f"{', '.join(f':{name}' for name in families.PRESETS)}"
        )
    return editable(experiment(arg, families.PRESETS[arg]))


def experiment(name: str, model: ModelConfig) -> Experiment:
    """Rows of at most 2048 tokens; a tokenizer as large as the model's is trained on the data."""
    return Experiment(
        name=name,
        data=DataConfig(source="files", files=("texts/*.txt",), vocab_size=model.vocab_size),
        model=model,
        mesh=MeshConfig(),
        train=TrainConfig(length=min(model.context, 2048), learning_rate=3e-4, save_every=500),
        aot=AotConfig(),
        decode=DecodeConfig(prompt="def read_lines(path):\n"),
        score=ScoreConfig(),
        bench=BenchConfig(),
    )


def tiny() -> ConfigDict:
    """GPT-2, every size as small as it goes."""
    sizes = dict(vocab_size=512, context=512, num_layers=2, embed_dim=32, mlp_dim=64)
    heads = dict(num_heads=4, num_kv_heads=4, head_dim=8, dtype="float32")
    model = dataclasses.replace(families.PRESETS["gpt2-124m"], **sizes, **heads)
    config = editable(experiment("family-tiny", model))
    config.data.update(source="stdlib", files=(), limit_documents=40, validation_fraction=0.2)
    config.train.update(steps=10, warmup=2, length=64, save_every=5, log_every=1)
    config.train.learning_rate = 4e-3
    config.decode.max_tokens = 16
    config.bench.update(contexts=(64, 128), prefill_chunk=64)
    return config
