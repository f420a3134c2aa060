"""Prompts in which tokens see later ones, as those of an image or of a prefix do."""

import infer_cases as cases
import jax
import numpy as np
import pytest
from conftest import make_mesh
from tolerances import assert_close

from core.config import Unsupported
from infer.engine import Engine, Plan

MODEL = cases.model_config(num_layers=2)  # a sliding layer and a full one
LENGTHS = 19, 14


def prompts(*groups):
    """Random rows, and their `until` if the tokens of each group (first, last) see each other."""
    rows, until = [], []
    for length, of_row in zip(LENGTHS, groups, strict=True):
        rows.append(np.random.default_rng(length).integers(0, 320, length).astype(np.int32))
        until.append(np.arange(length, dtype=np.int32))
        for first, last in of_row:
            until[-1][first : last + 1] = last
    return rows, until


@pytest.mark.parametrize(("sizes", "chunk"), [((1, 1, 1), 6), ((1, 1, 1), 16), ((1, 4, 1), 8)])
def test_a_chunk_ends_where_no_token_looks_beyond_it(sizes, chunk):
    """Groups of both rows lie across every border of a grid of chunks; row 1 begins with one."""
    rows, until = prompts([(2, 5), (7, 8), (12, 15)], [(0, 3), (6, 8)])
    with jax.set_mesh(make_mesh(sizes)):
        model = cases.random_model(MODEL)
        engine = Engine(model, Plan.of(len(rows), max(LENGTHS), 0, chunk)).resized(len(rows), chunk)
        logits_BV = np.asarray(model.logits(engine.prefill(rows, until=until).last_BD[:, None]))
        for row, seen, logits_1V in zip(rows, until, logits_BV, strict=True):
            assert_close(logits_1V[0], cases.full_logits(model, row, seen)[-1], "model")
            assert np.abs(logits_1V[0] - cases.full_logits(model, row)[-1]).max() > 0.1


def test_groups_that_no_chunk_holds_are_refused():
    rows, until = prompts([(2, 5)], [(4, 8)])
    with jax.set_mesh(make_mesh((1, 1, 1))):
        engine = Engine(cases.random_model(MODEL), Plan.of(2, 19, 0, 16)).resized(2, 4)
        with pytest.raises(
            Unsupported, match="tokens 2 to 8 of the rows see each other.*has 4 tokens"
        ):
            engine.prefill(rows, until=until)
