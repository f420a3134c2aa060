"""Sections that the commands of evals/ read: bench and recall."""

import dataclasses
from typing import Literal

from core.config import UserError, setting
from infer.config import BundleSection, Weights
from model.cache.form import CacheConfig


@dataclasses.dataclass(frozen=True)
class BenchConfig(BundleSection, Weights, CacheConfig):
    """The context-window report of `python -m evals.bench`."""

    EXCLUSIVE = {
        **CacheConfig.EXCLUSIVE,
        ("compare", "topology"): "neither runs a model, and they are two commands",
    }
    NEEDS = {**CacheConfig.NEEDS, **Weights.NEEDS}

    checkpoint: str = setting("", "a bundle; empty is the workdir, or random weights")
    contexts: tuple[int, ...] = setting(
        (),
        "tokens before the decoded ones; () is 1K, 2K, 4K ... up to what fits",
        low=1,
        high=2**24,
    )
    kv: tuple[str, ...] = setting(
        (),
        "other caches to compare: plain, int8, k8v4, int4, host, stream (1024 + 4), "
        "quest (128 pages)",
        commas="names",
    )
    beyond: bool = setting(False, "measure contexts longer than model.context too")
    batch_size: int = setting(1, "rows at a time, over all devices", low=1)
    repeats: int = setting(3, "timed calls of 8 decoded tokens; the median counts", low=1)
    decode_samples: int = setting(
        100, "single tokens timed one by one; the 99th percentile needs 100", low=1
    )
    price_per_hour: float = setting(0.0, "of all devices, for the cost; 0 is none", low=0)
    memory_gib: float = setting(0.0, "GiB of a device to plan for; 0 is what it has", low=0)
    text: tuple[str, ...] = setting(
        (),
        "globs of .txt files to tell the loss on; () is the validation split in WORKDIR/data",
        commas="paths",
    )
    loss_rows: int = setting(4, "texts a context for the loss by position; 0 is off", low=0)
    tasks: tuple[str, ...] = setting(
        (),
        "needle, passkey, RULER's kinds by name, ruler (all of those) or all; () is none",
        commas="names",
    )
    task_samples: int = setting(10, "samples of each task, or of each depth", low=1)
    depths: tuple[float, ...] = setting(
        (0.0, 0.25, 0.5, 0.75, 1.0), "of needle and passkey in their haystack", low=0, high=1
    )
    haystack: tuple[str, ...] = setting(
        (), "globs of .txt files; () is the built-in filler", commas="paths"
    )
    questions: str = setting("", "a JSON file for qa_1 and qa_2")
    compare: tuple[str, ...] = setting(
        (), "reports to overlay, folders or report.json; no model is run", commas="paths"
    )
    topology: str = setting(
        "", "a TPU slice to predict for by its compiler, as v5p:2x2x1; no model is run"
    )
    output: str = setting("", "a folder; empty is WORKDIR/bench (compare: WORKDIR/compare)")

    def check(self) -> None:
        if len(self.compare) == 1:
            raise UserError(f"compare={self.compare} is one report: name two or more")
        for name in ("contexts", "kv", "depths", "tasks"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{name}={values} names one of them twice")


@dataclasses.dataclass(frozen=True)
class RecallConfig(BundleSection):
    """The questions that `python -m evals.recall` asks a model trained on data.source=recall."""

    lengths: tuple[int, ...] = setting(
        (1024, 2048, 4096, 8192, 16384), "tokens of a text with its question and answer", low=1
    )
    ropes: tuple[Literal["none", "pi", "ntk", "dynamic", "yarn"], ...] = setting(
        ("none",), "how RoPE is extended beyond model.context; each gives rows of its own"
    )
    factor: float = setting(16.0, "of model.context that ropes extend to", low=1)
    records: int = setting(32, "keys in a text, at even depths", low=1)
    asked: int = setting(8, "of them that are asked for, at even depths too", low=1)
    samples: int = setting(16, "texts a length", low=1)
    seed: int = setting(0, "of the texts", low=0)
    output: str = setting("", "a JSON file; empty is WORKDIR/recall.json")

    def check(self) -> None:
        for field in ("lengths", "ropes"):
            if not getattr(self, field):
                raise UserError(f"{field}=() is empty: give at least one")
