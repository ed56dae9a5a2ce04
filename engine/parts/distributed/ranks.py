"""Load a model whose ranks are in several processes, of which this one is the first."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from engine.config import EngineProcessConfig, load_model_config
from engine.loading import LoadedModel, Progress, load_model
from engine.parts.distributed.cores import check_cores, use_own_cores
from engine.parts.distributed.execution import lead
from engine.parts.distributed.group import Leader
from engine.parts.distributed.part import ModelPart
from engine.parts.distributed.plan import check_num_ranks
from engine.scheduling.record import StepClock


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
