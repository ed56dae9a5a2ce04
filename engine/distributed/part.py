"""What a process loads of a model: the whole, or the part of one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.batch.builder import NewBuffer, zeros
from engine.config import EngineConfig, ModelConfig
from engine.distributed.adapters import ShardedAdapters
from engine.distributed.group import RankGroup
from engine.distributed.parallelize import build_parallel
from engine.distributed.plan import ShardingPlan, check_num_ranks
from engine.distributed.weights import column_block, shard
from engine.lora.slots import LoraAdapters
from engine.model import CausalLM, Parameters
from engine.weights import Weight


class WholeModel:
    """A model in one process."""

    rank = 0
    num_ranks = 1

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.new_buffer: NewBuffer = zeros

    def settings(self, config: EngineConfig) -> EngineConfig:
        return config

    def least(self, *numbers: int) -> list[int]:
        return list(numbers)

    def weights(self, weights: Iterable[tuple[str, Weight]], dtype: torch.dtype) -> Iterable[tuple[str, Weight]]:
        return weights

    def build(self, parameters: Parameters, **options: Any) -> CausalLM:
        return CausalLM(self.config, parameters, **options)

    def new_adapters(self, model: CausalLM, max_loras: int, max_rank: int) -> LoraAdapters:
        return LoraAdapters(model.linears, max_loras, max_rank)


class ModelPart(WholeModel):
    """The part of one rank in a model."""

    def __init__(self, config: ModelConfig, path: Path, group: RankGroup) -> None:
        """`config` and `path` are those of the whole model. Raises ValueError if it does not divide."""
        check_num_ranks(config, group.num_ranks)
        self.group = group
        self.rank, self.num_ranks = group.rank, group.num_ranks
        self.plan = ShardingPlan(config, group.rank, group.num_ranks, column_block(path, config))
        super().__init__(self.plan.local_config())
        self.new_buffer = group.memory.integers

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

    def new_adapters(self, model: CausalLM, max_loras: int, max_rank: int) -> ShardedAdapters:
        return ShardedAdapters(model.linears, max_loras, max_rank, self.plan, self.group.memory)
