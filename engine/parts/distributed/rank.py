"""The process of a rank other than 0: loads its part of the model, and runs the steps that rank 0 announces."""

from __future__ import annotations

import logging
import os
import signal
import sys
from functools import partial

import msgspec
import torch

from engine.loading import load_model
from engine.parts.distributed.execution import follow
from engine.parts.distributed.group import Follower, RankConfig
from engine.parts.distributed.part import ModelPart, use_own_cores
from engine.shared.launcher import collect_garbage, die_with_parent
from engine.shared.logs import configure_logging

logger = logging.getLogger("lightwell.engine")


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
