"""Log-probabilities fused with the output projection, and the loss of pre-training.

    logprobs_BT = token_logprobs(hidden_BTD, table_VD, targets_BT, rules=rules)
    loss, nll = next_token_loss(hidden_BTD, table_VD, targets_BT, weights_BT, z_loss=0, rules=rules)

Both work on a chunk of tokens at a time: logits of one chunk exist at once, never [B, T, V].
`token_logprobs` is the primitive of objectives in general; its backward pass computes the logits
again, as only then the gradient of each log-probability is known. In `next_token_loss` that is the
token's weight, which is known before: while the logits exist their gradient is computed too, so
none are computed twice (as in Liger Kernel, arXiv 2410.10989).
"""

import functools

import jax
import jax.numpy as jnp

from core.sharding import Rules

CHUNK = 1024  # tokens: large enough for the matrix units, small enough to be no memory peak


def token_logprobs(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    rules: Rules,
    softcap: float = 0.0,
) -> jax.Array:
    """Returns the log-probability of each target, float32 [B, T], in nats; differentiable.

    `table_VD` is the output table, whose rows may be sharded; `softcap` is that of the logits.
    """
    rows, vocab = rules.axes("batch", "length"), rules.axes("act_vocab")

    def local(hidden_BTD, table_VD, targets_BT):
        # Every shard of the tokens has a gradient of the table: pcast sums them on the way back.
        table_VD = jax.lax.pcast(table_VD, rows, to="varying")
        hidden_RD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        logprobs_R = _logprobs((softcap, vocab), hidden_RD, table_VD, targets_BT.ravel())
        return logprobs_R.reshape(targets_BT.shape)

    by_token = rules("batch", "length")
    in_specs = rules("batch", "length", "act_embed"), rules("act_vocab", None), by_token
    return jax.shard_map(local, in_specs=in_specs, out_specs=by_token)(
        hidden_BTD, table_VD, targets_BT
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(how, hidden_RD, table_VD, targets_R):
    return _logprobs_forward(how, hidden_RD, table_VD, targets_R)[0]


def _logprobs_forward(how, hidden_RD, table_VD, targets_R):
    def chunk(_, chunk):
        hidden_CD, targets_C = chunk
        _, lse_C, hit_CV, logits_CV = _softmax(how, hidden_CD, table_VD, targets_C)
        return None, (_of_target(how, hit_CV, logits_CV) - lse_C, lse_C)

    _, found = jax.lax.scan(chunk, None, _chunked(hidden_RD, targets_R))
    logprobs_R, lse_R = (x.ravel()[: len(targets_R)] for x in found)
    return logprobs_R, (hidden_RD, table_VD, targets_R, lse_R)


def _logprobs_backward(how, saved, slopes_R):
    hidden_RD, table_VD, targets_R, lse_R = saved

    def chunk(dtable_VD, chunk):
        hidden_CD, targets_C, lse_C, slope_C = chunk
        hit_CV, logits_CV = _logits(how, hidden_CD, table_VD, targets_C)
        p_CV = jnp.exp(logits_CV - lse_C[:, None])
        dlogits_CV = (jnp.where(hit_CV, 1.0, 0.0) - p_CV) * slope_C[:, None]
        return _products(how, dtable_VD, dlogits_CV, logits_CV, hidden_CD, table_VD)

    chunks = _chunked(hidden_RD, targets_R, lse_R, slopes_R)
    dtable_VD, dhidden_RD = jax.lax.scan(chunk, table_VD.astype(jnp.float32) * 0, chunks)
    return _rows_of(how, dhidden_RD, hidden_RD), dtable_VD.astype(table_VD.dtype), None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def next_token_loss(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float,
    rules: Rules,
    softcap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """(loss, nll), both float32 sums over weighted tokens, in nats.

    loss = sum w (nll + z_loss lse^2); the second term (PaLM, arXiv 2204.02311) keeps the
    logits' normaliser near zero. `softcap` is that of the logits. Only `loss` is differentiated.
    """
    rows, vocab = rules.axes("batch", "length"), rules.axes("act_vocab")

    def local(hidden_BTD, table_VD, targets_BT, weights_BT):
        # Every shard of the tokens has a gradient of the table: pcast sums them on the way back.
        table_VD = jax.lax.pcast(table_VD, rows, to="varying")
        hidden_RD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        how = z_loss, softcap, vocab
        sums = _sums(how, hidden_RD, table_VD, targets_BT.ravel(), weights_BT.ravel())
        return jax.lax.psum(sums, rows)

    by_token = rules("batch", "length")
    return jax.shard_map(
        local,
        in_specs=(
            rules("batch", "length", "act_embed"),
            rules("act_vocab", None),
            by_token,
            by_token,
        ),
        out_specs=(rules(), rules()),
    )(hidden_BTD, table_VD, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(how, hidden_RD, table_VD, targets_R, weights_R):
    def chunk(sums, chunk):
        hidden_CD, targets_C, weights_C = chunk
        _, lse_C, hit_CV, logits_CV = _softmax(how[1:], hidden_CD, table_VD, targets_C)
        return _add(how, sums, lse_C, hit_CV, logits_CV, weights_C), None

    zero = weights_R[0] * 0
    chunks = _chunked(hidden_RD, targets_R, weights_R)
    return jax.lax.scan(chunk, (zero, zero), chunks)[0]


def _forward(how, hidden_RD, table_VD, targets_R, weights_R):
    z_loss, *of_logits = how

    def chunk(carry, chunk):
        sums, dtable_VD = carry
        hidden_CD, targets_C, weights_C = chunk
        p_CV, lse_C, hit_CV, logits_CV = _softmax(of_logits, hidden_CD, table_VD, targets_C)
        sums = _add(how, sums, lse_C, hit_CV, logits_CV, weights_C)
        slope_C = weights_C * (1 + 2 * z_loss * lse_C)
        dlogits_CV = p_CV * slope_C[:, None] - jnp.where(hit_CV, weights_C[:, None], 0.0)
        dtable_VD, dhidden_CD = _products(
            of_logits, dtable_VD, dlogits_CV, logits_CV, hidden_CD, table_VD
        )
        return (sums, dtable_VD), dhidden_CD

    zero = weights_R[0] * 0
    start = (zero, zero), table_VD.astype(jnp.float32) * 0
    (sums, dtable_VD), dhidden_RD = jax.lax.scan(
        chunk, start, _chunked(hidden_RD, targets_R, weights_R)
    )
    return sums, (_rows_of(of_logits, dhidden_RD, hidden_RD), dtable_VD.astype(table_VD.dtype))


def _backward(how, saved, slopes):
    slope, _ = slopes
    # In float32: a slope rounded to bfloat16 would scale the whole gradient by up to 0.4%.
    dhidden_RD, dtable_VD = ((x * slope).astype(x.dtype) for x in saved)
    return dhidden_RD, dtable_VD, None, None


_sums.defvjp(_forward, _backward)


def _chunked(*arrays):
    """[R, ...] -> [R / C, C, ...], padded with zeros (weight 0) where C does not divide R."""
    rows = len(arrays[0])
    num = -(-rows // CHUNK)
    size = -(-rows // num)
    pad = num * size - rows

    def split(x):
        padded = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)) if pad else x
        return padded.reshape(num, size, *x.shape[1:])

    return jax.tree.map(split, arrays)


def _logits(how, hidden_CD, table_VD, targets_C):
    """(where the target is, logits); V is this shard's part of the vocabulary."""
    softcap, vocab = how
    logits_CV = jnp.einsum("CD,VD->CV", hidden_CD, table_VD, preferred_element_type=jnp.float32)
    if softcap:
        logits_CV = softcap * jnp.tanh(logits_CV / softcap)
    first = jax.lax.axis_index(vocab) * len(table_VD)
    return targets_C[:, None] - first == jnp.arange(len(table_VD))[None], logits_CV


def _softmax(how, hidden_CD, table_VD, targets_C):
    """(softmax, lse, where the target is, logits)."""
    _, vocab = how
    hit_CV, logits_CV = _logits(how, hidden_CD, table_VD, targets_C)
    max_C = jax.lax.pmax(logits_CV.max(axis=-1), vocab)
    exp_CV = jnp.exp(logits_CV - max_C[:, None])
    sum_C = jax.lax.psum(exp_CV.sum(axis=-1), vocab)
    return exp_CV / sum_C[:, None], max_C + jnp.log(sum_C), hit_CV, logits_CV


def _of_target(how, hit_CV, logits_CV):
    """The logit of each target, [C]."""
    _, vocab = how
    return jax.lax.psum(jnp.where(hit_CV, logits_CV, 0.0).sum(axis=-1), vocab)


def _products(how, dtable_VD, dlogits_CV, logits_CV, hidden_CD, table_VD):
    """(dtable with this chunk's, dhidden of the chunk) from the gradient of its logits."""
    softcap, _ = how
    if softcap:
        dlogits_CV *= 1 - jnp.square(logits_CV / softcap)
    dlogits_CV = dlogits_CV.astype(table_VD.dtype)
    dhidden_CD = dlogits_CV @ table_VD
    more_VD = jnp.einsum("CV,CD->VD", dlogits_CV, hidden_CD, preferred_element_type=jnp.float32)
    return dtable_VD + more_VD, dhidden_CD


def _rows_of(how, dhidden_XCD, hidden_RD):
    """Chunks of dhidden as rows, without padding, summed over the shards of the vocabulary."""
    _, vocab = how
    dhidden_RD = dhidden_XCD.reshape(-1, hidden_RD.shape[1])[: len(hidden_RD)]
    return jax.lax.psum(dhidden_RD, vocab)


def _add(how, sums, lse_C, hit_CV, logits_CV, weights_C):
    z_loss, *of_logits = how
    target_C = _of_target(of_logits, hit_CV, logits_CV)
    nll = (weights_C * (lse_C - target_C)).sum()
    loss = nll + z_loss * (weights_C * jnp.square(lse_C)).sum()
    return sums[0] + loss, sums[1] + nll
