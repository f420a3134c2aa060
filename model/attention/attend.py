"""The one entry of attention over the tokens of whole rows: what is seen, where and how.

attend(q_BTNH, k_BTKH, v_BTKH, at, full(), kernel="chunked", rules=training())
"""

import jax

from core.config import Unsupported
from core.sharding import Rules
from model.attention import blocks
from model.attention.block_topk import select
from model.attention.mask import Positions
from model.attention.spec import AttentionSpec, Heads
from model.attention.strategies.table import AttentionCall


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    at: Positions,
    spec: AttentionSpec,
    *,
    kernel: str,
    rules: Rules,
    heads: Heads = Heads(),  # noqa: B008 (immutable)
) -> jax.Array:
    """out [B, T, N, H]: the tokens of each row attend to each other as `spec` says.

    Arguments are sharded by `rules`; N is a multiple of K, and both divide over act_heads.
    """
    if spec.kind == "stream":
        raise Unsupported(
            "kind='stream' is how a cache is read, and there is none here: take kind='full' or "
            "'sliding' in model.pattern, and set cache_window and cache_sinks when decoding"
        )
    attention = AttentionCall.of(q_BTNH, k_BTKH, at, spec, kernel, rules).way.attention
    q_spec = rules("batch", "length", "act_heads", None)
    kv_spec = rules("batch", "length", "act_kv_heads", None)
    at_spec = jax.tree.map(lambda _: rules("batch", "length"), at)
    heads_spec = heads_sharding(heads, rules)

    def of_device(q_BTNH, k_BTKH, v_BTKH, heads, at):
        if spec.kind == "moba":
            axes = rules.axes("length")
            chosen_BTNC = select.moba(q_BTNH, k_BTKH, at, spec.block, spec.top, axes)
            heads = heads._replace(chosen=chosen_BTNC)
        # The gradient of what all shards share is summed where it is made to vary.
        heads = jax.tree.map(lambda x_N: blocks.vary(x_N, q_BTNH), heads)
        return attention(q_BTNH, k_BTKH, v_BTKH, heads, at, at)

    return jax.shard_map(
        of_device, in_specs=(q_spec, kv_spec, kv_spec, heads_spec, at_spec), out_specs=q_spec
    )(q_BTNH, k_BTKH, v_BTKH, heads, at)


def heads_sharding(heads: Heads, rules: Rules) -> Heads:
    """The PartitionSpec of each field that is there."""
    head = rules("act_heads")
    specs = Heads(head, head, rules("batch", "length", "act_heads", None))
    return Heads(*(None if x is None else spec for x, spec in zip(heads, specs, strict=True)))
