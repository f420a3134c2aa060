"""Makes each process's rows one global Batch on the mesh."""

import jax
from jax.sharding import NamedSharding

from core.config import UserError
from core.sharding import Rules
from data.batch import Batch
from train.config import TrainConfig


class BatchSharder:
    """Assembly of the global Batch from the rows that each process reads."""

    def __init__(self, config: TrainConfig, rules: Rules):
        check(config, rules)
        self._shape = config.batch_size, config.length
        self._sharding = NamedSharding(jax.sharding.get_mesh(), rules("batch", "length"))
        self.index, self.count = self._group()

    def _group(self) -> tuple[int, int]:
        """(index, count) among groups of processes that hold the same rows: `seq` may span them."""
        rows: dict[int, set[int]] = {}
        for device, (row_slice, _) in self._sharding.devices_indices_map(self._shape).items():
            first, *_ = row_slice.indices(self._shape[0])
            rows.setdefault(device.process_index, set()).add(first)
        groups = sorted({tuple(sorted(r)) for r in rows.values()})
        return groups.index(tuple(sorted(rows[jax.process_index()]))), len(groups)

    def __call__(self, batch: Batch) -> Batch:
        """The global Batch; `batch` holds the rows of this process, numpy [B / count, T]."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._sharding, x, self._shape), batch
        )


def check(config: TrainConfig, rules: Rules) -> None:
    """UserError unless rows and length divide over the mesh in use."""
    rows, shards = config.batch_size // config.accumulation, rules.size("batch")
    if rows % shards:
        raise UserError(
            f"train.batch_size={config.batch_size} in {config.accumulation} microbatch(es) of "
            f"{rows} rows does not divide over mesh.data={shards}"
        )
    if config.length % rules.size("length"):
        raise UserError(
            f"train.length={config.length} does not divide over mesh.seq={rules.size('length')}"
        )
