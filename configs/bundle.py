"""Any bundle and nothing else: decode it, score texts with it, measure it.

    python -m infer.decode --config=configs/bundle.py:runs/quickstart \\
        --config.decode.prompt="def read_lines(path):"
    python -m infer.score --config=configs/bundle.py:runs/quickstart \\
        --config.score.input=texts.jsonl
    python -m evals.bench --config=configs/bundle.py:runs/quickstart

The argument is the bundle, one trained here or one that model.convert made; it is the workdir too,
so a report comes into its folder. `:tiny` is a model of random weights, to be trained first.

Hardware: that of the bundle. Expected: the text, losses and speeds of that model.
"""

from pathlib import Path

from ml_collections import ConfigDict

from core.checkpoint import read_config
from core.config import Experiment, UserError, editable
from core.sharding import MeshConfig
from data.config import DataConfig
from evals.config import BenchConfig
from infer.config import DecodeConfig, ScoreConfig
from model.config import TINY, ModelConfig
from train.config import TrainConfig


def get_config(arg: str = "") -> ConfigDict:
    """The experiment of the bundle `arg`; `:tiny` needs none."""
    if arg == "tiny":
        return tiny()
    if not arg:
        raise UserError("configs/bundle.py needs a bundle: configs/bundle.py:BUNDLE, or :tiny")
    try:
        model = read_config(arg, model=ModelConfig).model
    except UserError as error:
        raise UserError(f"configs/bundle.py:{arg}: {error}; it also has :tiny") from None
    return editable(experiment(Path(arg).resolve().name, model, workdir=arg))


def experiment(name: str, model: ModelConfig, workdir: str = "") -> Experiment:
    """Sections as they are by default."""
    return Experiment(
        name=name,
        workdir=workdir,
        data=DataConfig(),
        model=model,
        mesh=MeshConfig(),
        train=TrainConfig(length=min(model.context, 2048)),
        decode=DecodeConfig(),
        score=ScoreConfig(),
        bench=BenchConfig(),
    )


def tiny() -> ConfigDict:
    """Every size as small as it goes, from random weights."""
    config = editable(experiment("bundle-tiny", TINY))
    config.data.update(source="stdlib", limit_documents=40, vocab_size=512)
    config.data.validation_fraction = 0.2
    config.train.update(steps=10, warmup=2, length=64, eval_every=0, save_every=5, log_every=1)
    config.train.learning_rate = 4e-3
    config.decode.max_tokens = 16
    config.bench.update(contexts=(64, 128), prefill_chunk=64)
    return config
