"""What a rank loads of a model, and the process of a rank other than 0, which runs the steps that rank 0 announces."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from engine.config import EngineConfig, EngineProcessConfig, ModelConfig, load_model_config
from engine.loading import LoadedModel, Progress, WholeModel, load_model
from engine.model import CausalLM, Parameters
from engine.parts.distributed.execution import ShardedAdapters, follow, lead
from engine.parts.distributed.group import Follower, Leader, RankConfig, RankGroup
from engine.parts.distributed.parallelize import build_parallel
from engine.parts.distributed.plan import ShardingPlan, check_num_ranks, column_block, divide, shard
from engine.scheduling.record import StepClock
from engine.shared.launcher import collect_garbage, die_with_parent
from engine.shared.logs import configure_logging
from engine.shared.machine import divide_cpus
from engine.weights import Weight

logger = logging.getLogger("lightwell.engine")


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
        self.new_adapters = partial(ShardedAdapters, self.plan)

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


def use_own_cores(rank: int, num_ranks: int, *, binds: bool) -> None:
    """Give this rank its share of the threads, and if it `binds`, cores of its own. Call this in the main thread.

    Memory comes from the NUMA node of the thread that first writes to it, so it is that of the rank's cores. Raises
    ValueError if there are fewer cores than ranks.
    """
    num_threads = torch.get_num_threads()
    share = divide(num_threads, num_ranks, 1)[rank]
    num_own = share.stop - share.start
    if binds:
        allowed = os.sched_getaffinity(0)
        check_cores(len(allowed), num_ranks)
        own = divide_cpus(allowed, num_ranks)[rank]
        os.sched_setaffinity(0, own)
        num_own = min(max(1, num_own), len(own))
    torch.set_num_threads(max(1, num_own))


def check_cores(num_cores: int, num_ranks: int) -> None:
    """Raise ValueError if there are fewer cores than ranks."""
    if num_cores < num_ranks:
        raise ValueError(
            f"--cpu-affinity auto: {num_ranks} ranks need a core each, but this process may use {num_cores}"
        )


def load(
    process_config: EngineProcessConfig,
    on_rank_death: Callable[[str], None],
    clock: StepClock | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model, of which this process is rank 0. `on_rank_death` is that of `Leader`, the others of `load_model`.

    Raises ValueError if the model does not divide among so many ranks, and as `load_model` does.
    """
    config = process_config.config
    num_ranks = config.tensor_parallel_size
    check_num_ranks(load_model_config(Path(config.model_path)), num_ranks)
    binds = config.cpu_affinity == "auto"
    if binds:
        check_cores(len(os.sched_getaffinity(0)), num_ranks)
    group = Leader(process_config, on_rank_death)  # whose processes inherit the cores that this one may use
    use_own_cores(0, num_ranks, binds=binds)
    with group.loading():
        loaded = load_model(config, clock, progress, partial(ModelPart, group))
    return dataclasses.replace(loaded, runner=lead(group, loaded.runner, loaded.adapters))


# The process.


def main() -> None:
    """Read `RankConfig` from standard input, and follow rank 0 until it ends. Signals to stop are for that process."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=RankConfig)
    die_with_parent(config.parent)
    close_log = configure_logging("error", config.process.log_format)  # rank 0 logs the rest, which is much the same
    exit_code = run(config)
    close_log()
    os._exit(exit_code)


def run(config: RankConfig) -> int:
    """Load this rank's part and follow. Return the exit code."""
    settings = config.process.config
    try:
        use_own_cores(config.rank, settings.tensor_parallel_size, binds=settings.cpu_affinity == "auto")
        group = Follower(config)
        loaded = load_model(settings, make_part=partial(ModelPart, group))
        torch.set_num_threads(loaded.runner.kernels.num_torch_threads)
        collect_garbage()
        follow(group, loaded.runner, loaded.adapters)
    except (ValueError, OSError) as error:
        logger.error("rank %d: %s", config.rank, error)
        return 1
    except Exception:
        logger.exception("rank %d cannot go on", config.rank)
        return 1
    return 0


if __name__ == "__main__":
    main()
