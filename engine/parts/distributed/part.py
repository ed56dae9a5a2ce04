"""What a rank loads of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.config import EngineConfig, ModelConfig
from engine.model import CausalLM, Parameters
from engine.parts.distributed.adapters import ShardedAdapters
from engine.parts.distributed.group import RankGroup
from engine.parts.distributed.parallelize import build_parallel
from engine.parts.distributed.plan import ShardingPlan, check_num_ranks
from engine.parts.distributed.weights import column_block, shard
from engine.weights import Weight
from engine.whole_model import WholeModel


class ModelPart(WholeModel):
    """The part of one rank in a model."""

    def __init__(self, group: RankGroup, config: ModelConfig, path: Path) -> None:
        """`config` and `path` are those of the whole model. Raises ValueError if it does not divide."""
        check_num_ranks(config, group.num_ranks)
        self.group = group
        self.rank, self.num_ranks = group.rank, group.num_ranks
        self.plan = ShardingPlan(config, group.rank, group.num_ranks, column_block(path, config))
        super().__init__(self.plan.local_config(), path)
        self.new_buffer = group.memory.integers
        self.new_adapters = partial(ShardedAdapters, self.plan, group.memory)

    def settings(self, config: EngineConfig) -> EngineConfig:
        """Return the settings of one rank: its share of memory, and no CUDA graphs, which record no messages."""

        def share(num_bytes: int | None) -> int | None:
            return None if num_bytes is None else num_bytes // self.num_ranks

        return msgspec.structs.replace(
            config,
            kv_cache_memory=share(config.kv_cache_memory),
            memory_limit=share(config.memory_limit),
            enforce_eager=True,
        )

    def least(self, *numbers: int) -> list[int]:
        """Return the least of each of the ranks' numbers. All ranks wait for each other."""
        return self.group.least(*numbers)

    def weights(self, weights: Iterable[tuple[str, Weight]], dtype: torch.dtype) -> Iterator[tuple[str, Weight]]:
        return shard(weights, self.plan, dtype)

    def build(self, parameters: Parameters, **options: Any) -> CausalLM:
        return build_parallel(self.plan, parameters, self.group.new_collectives(options["kernels"]), **options)
