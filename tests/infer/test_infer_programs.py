"""What infer compiles: each program once for a bucket of shapes, kept for the next start, and none
that copies the cache.
"""

import os
import subprocess
import sys

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh

from infer.engine import Engine, Plan, ahead
from infer.programs import bucket
from infer.sampling.params import Sampling, pack
from infer.speculative.speculate import Speculator
from model.attention.spec import full, sliding

LENGTH, WINDOW = 65_536, 32_768
GREEDY = pack([Sampling(temperature=0, max_tokens=4)])
CONFIG = """
from core.config import Experiment, editable
from core.sharding import MeshConfig
from infer.config import DecodeConfig

def get_config(arg=""):
    return editable(
        Experiment("case", {workdir!r}, mesh=MeshConfig(), decode=DecodeConfig(temperature=0.0))
    )
"""


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 64),
        (65, 128),
        (255, 256),
        (257, 320),
        (1025, 1152),
        (4096, 4096),
        (4097, 4608),
        (131_073, 147_456),
    ],
)
def test_buckets(size, expected):
    assert bucket(size) == expected


def test_prompts_of_other_lengths_compile_nothing_more(one_device):
    """40 to 48 tokens a row, in batches of one and of two rows, with 1 to 5 chunks each."""
    model = cases.random_model(cases.model_config(num_layers=2))
    plans = {Plan.of(2, prompt, 48 - prompt, 8)._replace(new=0) for prompt in (1, 7, 40)}
    assert len(plans) == 1
    engine = Engine(model, plans.pop())
    for lengths, limits in (((3, 40), (9, 8)), ((1,), (5,)), ((16, 24), (12, 1))):
        prompts = [np.arange(n, dtype=np.int32) for n in lengths]
        packed = pack([Sampling(temperature=0, max_tokens=n) for n in limits])
        state = engine.start(
            engine.prefill(prompts, new=limits), prompts, [0] * len(prompts), packed
        )
        made = list(engine.decode(state, np.zeros(2, bool)))
        assert sum((part.tokens_BC >= 0).sum() for part in made) == sum(limits)
    assert sorted(name for name, *_ in engine.programs.compiled) == [
        "advance", "empty", "extend", "keys",
    ]  # fmt: skip


def test_the_next_call_is_under_way_while_one_is_shown():
    calls = []

    def advance(state, stopped_B):
        calls.append(state)
        return state + 1, (state == 3, f"text {state}")

    seen = [(text, len(calls)) for (text,) in ahead(advance, 0, np.zeros(2, bool))]
    assert seen == [("text 0", 2), ("text 1", 3), ("text 2", 4), ("text 3", 5)]
    stopped_B = np.zeros(2, bool)
    for shown, _ in enumerate(ahead(advance, 9, stopped_B)):
        stopped_B[:] = shown == 1  # the caller has seen enough
    assert calls[5:] == [9, 10, 11]


SLOTS = {"full": (full(),), "ring": (sliding(WINDOW),), "both": (full(), sliding(WINDOW))}


@pytest.mark.parametrize("seq", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "slots", ["both", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "ring"))]
)
def test_the_cache_is_written_in_place(slots, seq):
    """Every byte of it that a device holds is aliased, and nothing of its size is beside it."""
    with jax.set_mesh(make_mesh((1, seq, 1))):
        pattern = SLOTS[slots]
        # Wide heads: the scores of all keys, which a CPU has at a time, are small beside these.
        sizes = dict(num_layers=len(pattern), head_dim=64)
        model = cases.random_model(cases.model_config(pattern=pattern, **sizes))
        engine = Engine(model, Plan(1, LENGTH, 16))
        prompt = [np.arange(5, dtype=np.int32)]
        now = jax.block_until_ready(engine.prefill(prompt))
        arrays = jax.tree.leaves(now.cache)
        mine = sum(x.addressable_shards[0].data.nbytes for x in arrays)
        least = min(x.addressable_shards[0].data.nbytes for x in arrays if x.ndim == 5)
        engine.advance(engine.start(now, prompt, [0], GREEDY), np.zeros(1, bool))
        now = jax.block_until_ready(engine.prefill(prompt))
        state = engine.start(now, prompt, [0], GREEDY)
        for _ in Speculator(engine, 1, 2).decode(state, np.zeros(1, bool), prompt, None):
            pass
    checked = set()
    for (name, *_), program in engine.programs.compiled.items():
        if name in ("extend", "advance", "guess"):
            checked.add(name)
            memory = program.memory_analysis()
            assert memory.alias_size_in_bytes >= mine
            assert memory.temp_size_in_bytes < least / 2, name
    assert len(checked) == 3


@pytest.mark.slow
def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    with jax.set_mesh(make_mesh((1, 1, 1))):
        cases.save(tmp_path, cases.model_config(num_layers=2))
    (tmp_path / "case.py").write_text(CONFIG.format(workdir=str(tmp_path)))

    def start(prompt, new, **environment):
        """The files kept, and how many programs were read from them and how many compiled."""
        command = [sys.executable, "-m", "infer.decode", f"--config={tmp_path / 'case.py'}"]
        more = [f"--config.decode.prompt={prompt}", f"--config.decode.max_tokens={new}"]
        told = {"JAX_LOG_COMPILES": "1", "JAX_EXPLAIN_CACHE_MISSES": "1"}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | told | environment
        done = subprocess.run(command + more, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kept = {path.name for path in (tmp_path / "programs").glob("*-cache")}
        return kept, done.stderr.count("cache hit for"), done.stderr.count("CACHE MISS for")

    kept, *_ = start("a", 9, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not kept
    kept, read, compiled = start("a", 9)
    assert read == 0 and 4 <= len(kept) <= compiled
    again, read, compiled = start("a b", 7)  # of the same bucket
    assert again == kept and read == len(kept) and compiled == 0
