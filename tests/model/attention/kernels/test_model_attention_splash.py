"""What is of splash alone: its list of tiles, its parts, its interpretation, its limits."""

import logging

import attention_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, documents
from conftest import make_mesh, small_tiles
from tolerances import assert_close

from core import sharding
from model.attention import attend, blocks
from model.attention.blocks import MaskedKernel
from model.attention.kernels import reference, splash, splash_call, splash_tiles
from model.attention.kernels import table as kernels
from model.attention.mask import Bidirectional, BlockSparse, Chunk, Full, Positions, Prefix, Window
from model.attention.spec import Heads, full

BLOCK = 16
ENDS = splash_tiles.FIRST | splash_tiles.LAST
MASKS = (
    Full(),
    Bidirectional(),
    Window(5),
    Window(17, sinks=6),
    Bidirectional(9),
    Chunk(9),
    Chunk(16, sinks=3),
    BlockSparse(3, 2),
    BlockSparse(3, 2, 3, sinks=4),
    Prefix(11),
)


def rows(positions, segments):
    """[B, 8, T], as the kernels take it."""
    at_B3T = np.stack([positions, segments, positions], axis=1)
    return np.pad(at_B3T, ((0, 0), (0, 5), (0, 0)))


def entries(mask, q_at, k_at, R, C):
    """({(y, z): flags} of each row, the length of the grid)."""
    listed = jax.jit(splash_call.tile_list, static_argnums=(0, 3, 4))
    tiles_BW, count = listed(mask, rows(*q_at), rows(*k_at), R, C)
    tiles_BW = np.asarray(tiles_BW)
    found = []
    for tiles_W in tiles_BW[:, : int(count)]:
        y_W, z_W = splash_tiles.query_block(tiles_W), splash_tiles.key_block(tiles_W)
        live = [(y, z, t & 15) for y, z, t in zip(y_W, z_W, tiles_W, strict=True) if t & 15]
        assert live == sorted(live), "results stay in VMEM from first to last"
        assert len({entry[:2] for entry in live}) == len(live), "no tile twice"
        idle = set(zip(y_W[len(live) :], z_W[len(live) :], strict=True))
        assert idle <= {live[-1][:2]}, "what does nothing fetches nothing"
        found.append({(y, z): flags for y, z, flags in live})
    return found, int(count)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_list_holds_what_the_mask_allows(mask):
    """Each pair that counts is in a tile of the list, and no mask is left out where it rules."""
    wholes = 0
    for layout in ("one", "packed", "padded", "shuffled", "zigzag"):
        tokens = attention_cases.LAYOUTS[layout]()
        at, R, C = (tokens.q_positions, tokens.q_segments), 4, 2
        places = (x[:, :, None] for x in at), (x[:, None, :] for x in at)
        allowed = np.asarray(mask.pairs(*(Positions(*place) for place in places)))
        allowed = allowed.reshape(len(allowed), attention_cases.T // R, R, -1, C)
        found, _ = entries(mask, at, at, R, C)
        for row, tiles in enumerate(found):
            for y, z in np.ndindex(*allowed.shape[1:4:2]):
                tile, flags = allowed[row, y, :, z], tiles.get((y, z), 0)
                assert flags or not tile.any()
                assert not flags & splash_tiles.WHOLE or tile.all()
                wholes += bool(flags & splash_tiles.WHOLE)
            for y in range(allowed.shape[1]):
                row_flags = [flags & ENDS for (query, _), flags in tiles.items() if query == y]
                row_flags[0] -= splash_tiles.FIRST
                row_flags[-1] -= splash_tiles.LAST
                assert not any(row_flags)
    assert wholes or 0 < mask.extent < 7, "tiles where no mask is needed exist"


def test_the_grid_grows_with_what_is_seen():
    """Causal rows visit half of the tiles; a window, or documents, a few a query block."""
    num_blocks, block = 64, 128
    at = documents((num_blocks * block,), length=num_blocks * block)
    found, count = entries(Full(), at, at, block, block)
    assert count == num_blocks * (num_blocks + 1) / 2
    masked = sum(bool(flags & splash_tiles.PARTIAL) for flags in found[0].values())
    assert masked == num_blocks, "the diagonal alone"
    assert entries(Window(2 * block), at, at, block, block)[1] == 3 * num_blocks - 3
    packed = documents((4 * block,) * 16, length=num_blocks * block)
    assert entries(Full(), packed, packed, block, block)[1] == 16 * 10


def test_the_grid_of_rows_is_that_of_the_fullest():
    at = documents((8 * BLOCK,), (BLOCK,), (), length=8 * BLOCK)
    found, count = entries(Full(), at, at, BLOCK, BLOCK)
    assert [len(tiles) for tiles in found] == [36, 8, 8] and count == 36


def test_a_list_too_long_is_cut_in_parts(monkeypatch):
    """Lists of 6 tiles for 2 rows of 3 x 3, and gradients of one key block at a time."""
    small_tiles(monkeypatch, BLOCK)
    case = Case("packed", window=17, softcap=2.0)
    tokens, (q, k, v, dout) = attention_cases.inputs(case)
    at = Positions(jnp.asarray(tokens.q_positions), jnp.asarray(tokens.q_segments))

    def run(kernel):
        pair = MaskedKernel(kernel, Window(17), 0.3, 2.0)
        out, lse = pair.forward(q, k, v, Heads(), at, at)
        done = dout, lse, blocks.delta(out, dout)
        return out, lse, *pair.backward(q, k, v, Heads(), at, at, *done)

    expected = jax.jit(lambda: run(reference))()
    monkeypatch.setattr(splash, "MAX_TILES", 6)
    monkeypatch.setattr(splash, "RESIDENT", 1)
    text = str(jax.make_jaxpr(lambda: run(splash))())
    assert "f32[3,2,4,8,16]" in text, "three parts of queries"
    actual = jax.jit(lambda: run(splash))()
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert_close(a, b, "attention", what=name)
    monkeypatch.setattr(splash, "MAX_TILES", 5)
    with pytest.raises(NotImplementedError, match=r"(?s)'splash'.*mesh.seq.*'chunked'"):
        run(splash)


@pytest.mark.parametrize("kernel", ["splash", "gpu", "auto"])
def test_the_log_says_what_runs_on_a_cpu(kernel, caplog):
    kernels.log_once.cache_clear()
    with jax.set_mesh(make_mesh((1, 1, 1))), caplog.at_level(logging.INFO, "cakrawala"):
        rules = sharding.training()
        q = jax.device_put(np.zeros((1, 8, 1, 8)), rules("batch", "length", "act_heads", None))
        at = Positions(*[jax.device_put(np.ones((1, 8), np.int32), rules("batch", "length"))] * 2)

        def attended(q, at):
            return attend.attend(q, q, q, at, full(), kernel=kernel, rules=rules)

        for _ in range(2):
            jax.eval_shape(attended, q, at)
    said = [m for m in caplog.messages if m.startswith("attention_kernel")]
    what = "auto: chunked for cpu" if kernel == "auto" else "on cpu it is interpreted"
    assert len(said) == 1 and what in said[0]
