"""The shape of Llama 3 8B (arXiv 2407.21783, table 3) at a long context, to plan a run with.

    python -m train.aot --config=configs/llama3_8b.py
    python -m train.aot --config=configs/llama3_8b.py:1048576 --config.aot.topology=v5p:4x4x8

The argument is the length in tokens, 131072 by default; rows fill up to 1,048,576 tokens a step.

Hardware: a laptop with 4 GiB and the TPU compiler (pip install -e .[aot]); to train, TPU v5p 4x4x8.
Expected: 71 s on 2 cores; it fits (8.9 of 95.7 GiB), 1.44 PFLOP a device and 3.3 s a step at best.
`make aot-ladder` writes docs/aot.md for other lengths and slices.
"""

import dataclasses

from ml_collections import ConfigDict

from core.config import Experiment, UserError, editable
from core.sharding import MeshConfig
from data.config import DataConfig
from evals.config import BenchConfig
from infer.config import DecodeConfig, ScoreConfig
from model import families
from model.attention.spec import full, nsa, sliding
from model.ops.rope import Rope
from train.config import AotConfig, TrainConfig

TOKENS = 2**20  # of a step


def get_config(arg: str = "") -> ConfigDict:
    """The experiment at a length in tokens; `:tiny` is the same in seconds, on a CPU.

    `:LENGTH-sliding` has windows of 4096 beside full, `:LENGTH-nsa` native sparse attention.
    """
    digits, _, variant = arg.partition("-")
    rope = dict(rope=Rope(500_000.0))
    window = sliding(4096, **rope)
    patterns = {
        "": (full(**rope),),
        "sliding": (window, window, window, full(**rope)),
        "nsa": (nsa(**rope),),
    }
    if arg not in ("", "tiny") and not (digits.isdecimal() and variant in patterns):
        raise UserError(
            f"configs/llama3_8b.py takes no argument {arg!r}; it has :tiny, :LENGTH in tokens, "
            ":LENGTH-sliding and :LENGTH-nsa"
        )
    length = int(digits) if digits.isdecimal() else 131_072
    config = editable(
        Experiment(
            name="llama3-8b",
            data=DataConfig(source="files", files=("texts/*.txt",), vocab_size=128_256),
            model=dataclasses.replace(
                families.PRESETS["llama-3-8b"],
                context=length,
                pattern=patterns.get(variant, patterns[""]),
            ),
            mesh=MeshConfig(data=max(1, TOKENS // length), seq=-1),
            train=TrainConfig(
                steps=1000,
                batch_size=max(1, TOKENS // length),
                length=length,
                learning_rate=3e-4,
            ),
            aot=AotConfig(topology="v5p:4x4x8"),
            decode=DecodeConfig(prompt="def read_lines(path):\n"),
            score=ScoreConfig(),
            bench=BenchConfig(),
        )
    )
    if arg == "tiny":
        tiny(config)
    return config


def tiny(config: ConfigDict) -> None:
    """Every size as small as it goes."""
    config.name, config.workdir = "llama3-8b-tiny", "runs/llama3-8b-tiny"
    config.data.update(source="stdlib", files=(), limit_documents=40, vocab_size=512)
    config.data.validation_fraction = 0.2
    config.model.update(vocab_size=512, context=512, num_layers=2, embed_dim=32, num_heads=4)
    config.model.update(num_kv_heads=2, head_dim=8, mlp_dim=64, dtype="float32")
    config.mesh.update(data=-1, seq=1)
    config.train.update(steps=10, warmup=2, batch_size=8, length=64, save_every=5, log_every=1)
    config.train.learning_rate = 4e-3
    config.aot.topology = "v5e:2x2"
    config.decode.max_tokens = 16
    config.bench.update(contexts=(64, 128), prefill_chunk=64)
