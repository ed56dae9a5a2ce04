"""The processes of a group: how they find each other, on which cores they run, and how their end is noticed."""

import os
import queue
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig, EngineProcessConfig
from engine.parts.distributed.collectives import SharedMemory
from engine.parts.distributed.execution import LeadingRunner
from engine.parts.distributed.group import Leader
from engine.parts.distributed.rank import check_cores, load
from tests.support.processes import processes_of
from tests.support.ranks import fail
from tests.support.tiny_engine import TINY_SHAPE
from tests.support.tiny_models import save_random_model

SECONDS = 60  # bounds hangs only
ALLOWED = os.sched_getaffinity(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(LlamaForCausalLM(LlamaConfig(**TINY_SHAPE)), tmp_path_factory.mktemp("model"), seed=1)


@contextmanager
def started(path: Path) -> Iterator[tuple[Leader, queue.Queue[str]]]:
    """Start a group of two, and return rank 0 and what it hears of deaths."""
    deaths: queue.Queue[str] = queue.Queue()
    config = EngineConfig(model_path=str(path), tensor_parallel_size=2)
    group = Leader(EngineProcessConfig(address="", config=config), deaths.put)
    try:
        yield group, deaths
    finally:
        group.close()


def rank_process() -> psutil.Process:
    (process,) = processes_of("engine.parts.distributed.rank")
    return process


def lose_rank() -> None:
    """Do what a collective does when another rank is killed."""
    rank_process().kill()
    raise RuntimeError("Connection reset by peer")


def test_a_connection_that_breaks_is_no_failure_of_rank_0(folder: Path) -> None:
    """The collective that fails in rank 0 knows less than the end of the other rank tells."""
    with started(folder) as (group, deaths):
        with pytest.raises(RuntimeError), group.everywhere("forward"):
            lose_rank()
        assert deaths.get(timeout=SECONDS) == "rank 1 of 2 was killed by SIGKILL"
        assert deaths.empty()
        with pytest.raises(OSError), group.everywhere("forward"):
            pass
        assert deaths.empty()


@pytest.mark.parametrize("is_loading", [False, True])
def test_a_rank_that_cannot_load_its_part(tmp_path: Path, is_loading: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While rank 0 loads its own, it is for rank 0 to report what is wrong with the model or the settings."""
    logged: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr("engine.parts.distributed.group.logger.error", lambda text, *args: logged.put(text % args))
    with ExitStack() as stack, started(tmp_path) as (group, deaths):
        if is_loading:
            stack.enter_context(group.loading())
        told = logged if is_loading else deaths
        assert told.get(timeout=SECONDS) == "rank 1 of 2 exited with code 1"
    assert deaths.empty()
    assert logged.empty()


def test_the_end_of_the_group_is_no_death(folder: Path) -> None:
    with started(folder) as (group, deaths):
        rank = rank_process()
        assert group.memory.integers((2,)).tolist() == [0, 0]
    assert not rank.is_running()
    assert deaths.empty()


def test_memory_that_is_not_written_takes_none() -> None:
    memory = SharedMemory()
    memory.take(1 << 34)
    assert os.fstat(memory.descriptor).st_blocks == 0
    memory.close()


@contextmanager
def cores_restored() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        os.sched_setaffinity(0, ALLOWED)
        torch.set_num_threads(num_threads)


def test_each_rank_needs_a_core() -> None:
    with pytest.raises(ValueError, match="--cpu-affinity auto: 3 ranks need a core each, but this process may use 2"):
        check_cores(2, 3)


@pytest.mark.skipif(len(ALLOWED) < 2, reason="each rank needs a core")
def test_ranks_run_on_cores_of_their_own(folder: Path) -> None:
    config = EngineConfig(model_path=str(folder), tensor_parallel_size=2, cpu_affinity="auto", max_model_len=64)
    with cores_restored():
        loaded = load(EngineProcessConfig(address="", config=config), fail)
        assert isinstance(loaded.runner, LeadingRunner)
        own, others = os.sched_getaffinity(0), set(rank_process().cpu_affinity())
        assert own | others == ALLOWED
        assert not own & others
        assert torch.get_num_threads() <= len(own)
        loaded.runner.group.close()
