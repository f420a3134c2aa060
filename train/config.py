"""`TrainConfig`: how long, how fast, and how often to look. `AotConfig`: on which slice."""

import dataclasses
from typing import Literal

from core.config import Section, UserError, setting
from model.transformer import Remat

# Fields that may differ when a run resumes: they change neither the numbers nor the data.
OPERATIONAL = ("log_every", "eval_every", "save_every", "keep", "overwrite", "data_changed")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section):
    """Pre-training with AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

    NEEDS = {("start_step", "start"): "it is a step of the bundle to start from"}

    steps: int = setting(1000, "optimizer steps", low=1)
    batch_size: int = setting(8, "rows a step, over all devices", low=1)
    length: int = setting(512, "tokens a row", low=2)
    accumulation: int = setting(1, "microbatches a step, one after the other", low=1)
    seed: int = setting(0, "of the initial weights and the data order", low=0)

    start: str = setting("", "bundle whose weights a fresh run begins with; empty is random ones")
    start_step: int | None = setting(None, "step of it; None is the newest", low=0)

    learning_rate: float = setting(3e-3, "peak", above=0)
    schedule: Literal["cosine", "wsd"] = setting(
        "cosine", "after the warmup; wsd stays, then falls"
    )
    warmup: int = setting(50, "steps of linear warmup", low=0)
    decay_fraction: float = setting(0.2, "of the steps, in which wsd falls", above=0, high=1)
    final_fraction: float = setting(0.1, "of the peak, where both schedules end", low=0, high=1)
    beta1: float = setting(0.9, "decay of the mean gradient", low=0, high=1)
    beta2: float = setting(0.95, "decay of the mean square", low=0, high=1)
    epsilon: float = setting(1e-8, "added to the root of the mean square", above=0)
    weight_decay: float = setting(0.1, "of parameters named by `decay`, times the rate", low=0)
    clip: float = setting(1.0, "global norm of the gradient at most; 0 is off", low=0)
    z_loss: float = setting(0.0, "weight of the squared log-normaliser", low=0)

    decay: tuple[str, ...] = setting(
        (
            r"embedding_VD",
            r"head_VD",
            r"positions_PD",
            r"attention\.[qkvo]_[A-Z]+",
            r"branches\.(gates|\w+\.in|\w+\.out)_\w+",
            r"mlp\.(gate|up|down)_[A-Z]+",
        ),
        "parameters that decay: regular expressions on their names",
    )
    no_decay: tuple[str, ...] = setting(
        (
            r"\w*norm\.\w+",
            r"scale_1",
            r"\w+_bias_[A-Z]+",
            r"attention\.sink_N",
            r"branches\.\w+\.place_CH",
        ),
        "parameters that do not",
    )
    freeze: tuple[str, ...] = setting((), "parameters that stay as they are, decay or not")

    remat: Remat = setting(
        "attention",
        "redo in the backward pass: none, all but dots, all but attention, full; "
        "offload is attention with what is kept in the host's memory",
    )
    log_every: int = setting(10, "steps between rows of metrics.jsonl", low=1)
    eval_every: int = setting(0, "steps between evaluations; 0 is at the end only", low=0)
    eval_batches: int = setting(0, "batches an evaluation; 0 is the whole split", low=0)
    save_every: int = setting(0, "steps between checkpoints; 0 is at the end only", low=0)
    keep: int = setting(2, "newest checkpoints kept", low=1)
    overwrite: bool = setting(False, "start again where another run already is")
    data_changed: bool = setting(False, "go on where the data is not what the run was trained on")

    def check(self) -> None:
        if self.warmup >= self.steps:
            raise UserError(f"warmup={self.warmup} must be less than steps={self.steps}")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"batch_size={self.batch_size} is not a multiple of "
                f"accumulation={self.accumulation}"
            )


@dataclasses.dataclass(frozen=True)
class AotConfig(Section):
    """Ahead-of-time compile of the train step, on a machine without the TPUs."""

    topology: str = setting("v5e:2x2", "slice to compile for, as v5p:4x4x8; libtpu's names")
    output: str = setting("", "JSON file of the report; empty writes none")
    text: str = setting("", "file for the compiled program, optimised HLO; empty writes none")
