"""What choosing blocks starts from: the slots that hold them, and fields that go together."""

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import documents

from core.config import UserError
from model.attention import spec
from model.attention.block_topk import select
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec

NSA = spec.nsa(block=4, top=4, window=5, compress=4, step=2, softcap=3.0)


@pytest.mark.slow
def test_slots_hold_every_whole_block_once():
    draw = np.random.default_rng(0)
    for size, step in ((4, 4), (4, 2), (9, 3), (1, 1)):
        lengths = []
        while sum(lengths) < 100:
            lengths.append(int(draw.choice([1, 3, 4, 5, 9, 30])))
        positions, segments = documents(lengths[:-1], length=120)
        order = draw.permutation(120)
        positions, segments = positions[:, order], segments[:, order]
        found = select.slots(
            Positions(jnp.asarray(positions), jnp.asarray(segments)), size, step, ()
        )
        assert found.segments_BZ.shape == (1, 120 // step)
        blocks = zip(found.segments_BZ[0].tolist(), found.number_BZ[0].tolist(), strict=True)
        expected = [
            (segment, number)
            for segment, length in enumerate(lengths[:-1], 1)
            for number in range((length - size) // step + 1)
        ]
        assert sorted(b for b in blocks if b[0]) == expected
        # Each token is in the slots of the blocks that hold it, and in no other.
        for token in range(120):
            place, segment = int(positions[0, token]), int(segments[0, token])
            slots = [z for z in found.of_token_BTW[0, token].tolist() if z < 120 // step]
            numbers = sorted(int(found.number_BZ[0, z]) for z in slots)
            assert {int(found.segments_BZ[0, z]) for z in slots} <= {segment}
            assert numbers == [
                n for s, n in expected if s == segment and n * step <= place < n * step + size
            ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="moba", block=4), "kind='moba' with top=0: top belongs to"),
        (dict(kind="full", top=3), "kind='full' with top=3: top belongs to kind='moba' or 'nsa'"),
        (dict(kind="moba", block=4, top=2, step=2), "step belongs to kind='nsa'"),
        (dict(kind="nsa", block=4, top=3, window=4, compress=4), "kind='nsa' with step=0"),
        (dict(NSA.__dict__, compress=5), "compress=5: a multiple of step=2"),
        (dict(NSA.__dict__, block=5), "block=5: a multiple of step=2"),
        (dict(NSA.__dict__, top=2), "top is at least 3"),
        (dict(NSA.__dict__, softcap=0.0, alibi=1.0), "neither sink_logit nor alibi"),
        (dict(NSA.__dict__, sink_logit=True), "neither sink_logit nor alibi"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        AttentionSpec(**fields).check()
