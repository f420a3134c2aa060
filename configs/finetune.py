"""Training goes on from a bundle: fine-tuning, or a longer context, of a model that is there.

    python -m train.pretrain --config=configs/finetune.py:runs/quickstart
    python -m train.pretrain --config=configs/finetune.py:runs/quickstart \\
        --config.model.context=65536 --config.train.length=65536 --config.train.batch_size=1

The argument is the bundle, one trained here or one that model.convert made. Its model section is
the start of this one: sizes stay, and what it says of windows, RoPE and context may change. Its
tokenizer, if it has one, is that of data.prepare. `:tiny` is the same loop with random weights.

Hardware: that of the bundle. Expected: a first loss that is the bundle's own on this text.
"""

from pathlib import Path

from ml_collections import ConfigDict

from core.checkpoint import TOKENIZER, read_config
from core.config import Experiment, UserError, editable
from core.sharding import MeshConfig
from data.config import DataConfig
from evals.config import BenchConfig
from infer.config import DecodeConfig, ScoreConfig
from model.config import TINY, ModelConfig
from train.config import TrainConfig


def get_config(arg: str = "") -> ConfigDict:
    """The experiment that begins with the bundle `arg`; `:tiny` needs none."""
    if arg == "tiny":
        return tiny()
    if not arg:
        raise UserError("configs/finetune.py needs a bundle: configs/finetune.py:BUNDLE, or :tiny")
    try:
        model = read_config(arg, model=ModelConfig).model
    except UserError as error:
        raise UserError(f"configs/finetune.py:{arg}: {error}; it also has :tiny") from None
    config = editable(experiment(f"{Path(arg).name}-finetune", model, start=arg))
    config.model.param_dtype = "float32"  # steps this small vanish in bfloat16
    if (Path(arg) / TOKENIZER).is_dir():
        config.data.tokenizer = str(Path(arg) / TOKENIZER)
    return config


def experiment(name: str, model: ModelConfig, start: str) -> Experiment:
    """Short and gentle: a tenth of the usual rate, and it falls to nothing."""
    return Experiment(
        name=name,
        data=DataConfig(source="files", files=("texts/*.txt",)),
        model=model,
        mesh=MeshConfig(),
        train=TrainConfig(
            start=start,
            length=min(model.context, 2048),
            learning_rate=3e-4,
            final_fraction=0.0,
            eval_every=100,
            save_every=500,
        ),
        decode=DecodeConfig(prompt="def read_lines(path):\n"),
        score=ScoreConfig(),
        bench=BenchConfig(),
    )


def tiny() -> ConfigDict:
    """Every size as small as it goes, from random weights."""
    config = editable(experiment("finetune-tiny", TINY, start=""))
    config.data.update(source="stdlib", files=(), limit_documents=40, vocab_size=512)
    config.data.validation_fraction = 0.2
    config.train.update(steps=10, warmup=2, length=64, eval_every=0, save_every=5, log_every=1)
    config.train.learning_rate = 4e-3
    config.decode.max_tokens = 16
    config.bench.update(contexts=(64, 128), prefill_chunk=64)
    return config
