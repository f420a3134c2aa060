"""Attention on a mesh, forward and backward, from numpy arrays to numpy arrays."""

import dataclasses
import functools
from typing import get_args

import jax
import numpy as np
from attention_cases import UNTIL, documents
from conftest import make_mesh
from tolerances import assert_close

from core import layout, sharding
from core.sharding import Layout
from model.attention import attend
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec, Heads

H = 8
RESULTS = "out", "dq", "dk", "dv", "dsink"


@dataclasses.dataclass(frozen=True)
class Run:
    """What is attended to, by how many heads, over rows of these documents; where and how."""

    spec: AttentionSpec
    rows: tuple[tuple[int, ...], ...]  # lengths of the documents of each row; the rest is padding
    length: int
    heads: tuple[int, int] = (4, 2)  # of queries, of keys and values
    strategy: str = "local"
    sizes: tuple[int, int, int] = (1, 1, 1)  # of the mesh: data, seq, model
    ulysses: int = 1
    order: str = "contiguous"
    kernel: str = "chunked"
    until: str = ""  # a key of UNTIL

    @property
    def alone(self) -> "Run":
        """The same on one device, every score at once."""
        what = self.spec, self.rows, self.length, self.heads
        return Run(*what, kernel="reference", until=self.until)


@functools.cache
def results(run: Run) -> tuple[np.ndarray | None, ...]:
    """(out, dq, dk, dv, dsink) in the order of the documents; the last is None without sinks."""
    spec, (N, K), draw = run.spec, run.heads, np.random.default_rng(0)
    arrays = [
        draw.standard_normal((len(run.rows), run.length, n, H)).astype(np.float32)
        for n in (N, K, K, N)
    ]
    sink = np.linspace(-1, 2, N, dtype=np.float32) if spec.sink_logit else None
    slope = 2.0 ** -np.arange(1, N + 1, dtype=np.float32) if spec.alibi else None
    with jax.set_mesh(make_mesh(run.sizes)):
        rules = sharding.training(run.strategy, run.ulysses, run.order)
        places = layout.order(run.order, run.length, rules.ring_size())
        at = documents(*run.rows, length=run.length)
        if run.until:
            at = *at, UNTIL[run.until](at[0])
        at = Positions(*(jax.device_put(x[:, places], rules("batch", "length")) for x in at))
        place = rules("batch", "length", "act_heads", None)
        q, k, v, dout = (jax.device_put(x[:, places], place) for x in arrays)
        heads = Heads(sink, slope)
        heads = jax.tree.map(lambda x: jax.device_put(x, rules("act_heads")), heads)
        how = dict(kernel=run.kernel, rules=rules)

        @jax.jit
        def both(q, k, v, dout, sink):
            def out(q, k, v, sink):
                each = heads._replace(sink_N=sink)
                return attend.attend(q, k, v, at, spec, heads=each, **how)

            result, pull = jax.vjp(out, q, k, v, sink)
            return result, *pull(dout)

        *found, dsink = jax.tree.map(np.asarray, both(q, k, v, dout, heads.sink_N))
        return *(x[:, np.argsort(places)] for x in found), dsink


def like(order: Layout, length: int, shards: int, window: int) -> Layout:
    """The first order in which a ring ends as early: one program serves both."""

    def reach(order):
        return window and layout.reach(order, length, shards, window)

    return next(o for o in get_args(Layout) if reach(o) == reach(order))


def assert_equal_to_one_device(run: Run) -> None:
    for name, a, b in zip(RESULTS, results(run), results(run.alone), strict=True):
        if b is not None:
            # Gradients of queries and keys vanish where a token sees itself alone.
            assert_close(a, b, "attention", what=name, at_least=np.abs(results(run.alone)[0]).max())
